"""A decode step on the CPU: norms, linears and attention in one call to the kernels each, in the same modules."""
