"""Packs, streaming, residency, and the transformers models that run on them."""
