"""What `benchmarks/kernels.py` times: one file an operator, each with a function that yields its cases."""

import os

# The processes of the preparation share the processors already. Read when torch's compiler is imported, so set before.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
