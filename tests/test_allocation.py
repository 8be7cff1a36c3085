"""Memory that is kept: a program that allocates the same again touches no new page."""
from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from qsharp_jax import allocation
kept = sys.argv[1] == 'kept' and allocation.keep_freed_memory()

def work():
    global faults
    for number in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 25)  # 256 MiB
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=work)  # of another arena, as XLA's are
thread.start()
thread.join()
print(int(kept), faults)
"""


def faults(how: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, '-c', PROGRAM, how], check=True, capture_output=True, text=True)
    kept, number = map(int, done.stdout.split())
    return kept, number


def test_what_is_freed_is_used_again() -> None:
    kept, number = faults('kept')
    if not kept:
        pytest.skip('this C library is not glibc')
    assert number < 100
    # Without it every page of 4 KiB is new, or every one of 2 MiB where the system makes them so.
    assert faults('given back')[1] >= 128
