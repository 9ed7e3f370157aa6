"""Weight formats and the kernels that compute with packed weights."""
