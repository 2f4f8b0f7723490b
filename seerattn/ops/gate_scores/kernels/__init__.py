"""Triton kernels of the op."""
