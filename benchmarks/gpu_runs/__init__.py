"""Runs of the GPU benchmark, each in a process of its own."""
