"""The threads of the CPU kernels: torch's own, none for little work, and a pool of their own in a forked child."""

import subprocess
import sys

import pytest
import torch
from backends import FUSED

PROGRAM = """
import os

import torch

from pyzero import ops

torch.set_num_threads(4)

def num_threads():
    return len(os.listdir("/proc/self/task"))

def sumsq(tensors):
    out = torch.zeros(1, dtype=torch.float64)
    ops.unscale_(tensors, 1.0, found_inf=torch.zeros(1), sumsq=out, backend="cpu")
    return out.item()

small, large = [torch.ones(64) for _ in range(500)], torch.ones(1 << 20)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def run(program: str) -> list[str]:
    if reason := FUSED[0].missing():
        pytest.skip(reason)
    command = [sys.executable, "-c", PROGRAM + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has threads of another kind")
@pytest.mark.parametrize("numel", (1 << 20, 1 << 16))  # a share for each thread, and for two of them
def test_kernels_run_on_the_threads_that_torch_has(numel):
    before, after = run(f"large.exp(); print(num_threads()); sumsq([large[:{numel}]]); print(num_threads())")
    assert int(before) >= 4
    assert after == before


def test_many_small_tensors_wake_no_thread():
    before, after = run("print(num_threads()); sumsq(small); print(num_threads())")
    assert after == before


def test_a_forked_child_of_a_process_whose_threads_ran_computes_the_same():
    program = """
whole = sumsq([large])
child = os.fork()
if child == 0:
    alone = num_threads()
    same = sumsq([large]) == whole
    os._exit(0 if same and num_threads() == alone + 3 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program) == ["0"]
