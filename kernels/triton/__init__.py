"""Triton kernels, one a file, each with a plain twin it is tested against."""
