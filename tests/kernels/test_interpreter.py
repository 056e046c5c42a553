"""Runs `triton_cases/` in triton's interpreter, in a process of its own: triton decides when it is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = [name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"triton's interpreter needs {' and '.join(MISSING)}, which is not installed")
def test_triton_kernels_in_the_interpreter() -> None:
    cases = sorted(map(str, Path(__file__).with_name("triton_cases").glob("cases_*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *cases, "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d{2,} passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-2000:]
