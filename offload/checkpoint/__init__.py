"""Checkpoints: where they come from, what their tensors are called, and what each model parameter is made of."""
