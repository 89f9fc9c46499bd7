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


@pytest.mark.parametrize("is_forked", (False, True), ids=("torch's threads", "a pool"))
def test_all_threads_round_as_the_callers(is_forked):
    """torch.set_flush_denormal() is of one thread: the others are there already, and do not flush."""
    program = """
import sys

grad = torch.full((1 << 22,), 1.5e-38)  # a tenth of it is subnormal
master, exp_avg, exp_avg_sq = (torch.zeros(1 << 22) for _ in range(3))
bits = exp_avg.view(torch.int32).numpy()  # a forked child must not call torch's own kernels

def count():
    bits.fill(0)
    hyper = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-30, weight_decay=0.0, step=1)
    ops.adam_(master, exp_avg, exp_avg_sq, grad, **hyper, backend="cpu")
    return int((bits != 0).sum())

def check():
    counts = [count()]
    if torch.set_flush_denormal(True):
        counts += [count() for _ in range(5)]
        torch.set_flush_denormal(False)
        counts += [count()]
    print(*counts)
    sys.stdout.flush()

sumsq([large])
"""
    forked = "if os.fork() == 0:\n    check()\n    os._exit(0)\nos.wait()"
    first, *others = run(program + (forked if is_forked else "check()"))
    if not others:
        pytest.skip("this processor does not flush")
    assert (first, *others) == (str(1 << 22), *"00000", str(1 << 22))
