"""What `benchmarks/kernels.py` times: one file an operator, each with a function that yields its cases."""
