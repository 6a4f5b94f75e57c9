"""Triton kernels; their plain PyTorch references are beside what they replace."""
