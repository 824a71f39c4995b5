"""Freed memory is used again, and given back when asked."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from topwork.memory import give_memory_back, reuse_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(100_000_000, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

reuse_memory()
first, again = faults(), faults()
give_memory_back()
print(first, again, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="without glibc nothing changes")
def test_memory_is_used_again_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    first, again, after = map(int, done.stdout.split())
    assert again < first / 10
    assert after > first / 2
