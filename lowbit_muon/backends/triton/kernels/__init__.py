"""The Triton kernels, by what they read; launch parameters are at the top of each file."""
