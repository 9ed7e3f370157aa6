"""Packs: the format, writing, and making them from checkpoints."""
