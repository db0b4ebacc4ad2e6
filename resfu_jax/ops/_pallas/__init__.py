"""Kernels for TPUs. Nothing here imports JAX's Pallas before a program with a kernel is lowered."""
