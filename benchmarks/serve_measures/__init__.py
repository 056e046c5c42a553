"""What `benchmarks/serve.py` measures, one idea a file."""
