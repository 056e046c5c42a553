"""Operators of DeepSeek-style models: a PyTorch reference and Triton kernels for each."""
