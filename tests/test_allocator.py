"""What is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from orchestrator.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_memory_that_is_freed_is_kept():
    """10 blocks of 16,384 pages each, one after the other."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("leave", "keep")
    )
    assert kept < given_back / 10  # with pages of 4 kB 163,840 are given back
