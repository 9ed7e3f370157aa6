"""A CUDA device made up for tests: torch's CUDA backend on host memory, in a build of torch for CPUs."""
