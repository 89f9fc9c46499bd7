"""The Triton kernels compiled for GPUs that are not here: exact arithmetic, 16-byte accesses, no spills."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Not imported here: once imported, triton no longer looks at TRITON_INTERPRET.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

Facts = dict[str, dict[str, list[dict[str, Any]]]]
WORKER = Path(__file__).parents[1] / "support" / "triton_compile.py"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_COUNTEREXAMPLES = ("sm_90", "gfx942")
ADAM, LION = ("adam_kernel", "adam_list_kernel"), ("lion_kernel", "lion_list_kernel")
SGD = ("sgd_kernel", "sgd_list_kernel")
STREAMING = (*ADAM, *LION, *SGD, "scaled_copy_kernel", "reduce_scatter_kernel")
THREADS = 128  # per program, on every target
# Bytes that one element of the main loop reads and writes.
CASES = {
    "adam-bf16-bf16": (14, 14),
    "adam-f32": (16, 12),
    "adam-f16-f16-segments": (14, 14),
    "adam-bf16-bf16-list": (14, 14),
    "adam-bf16-bf16-peers": (14, 20),  # three peers'
    "lion-bf16-bf16": (10, 10),
    "lion-bf16-bf16-list": (10, 10),
    "lion-f16-f16-segments": (10, 10),
    "sgd-bf16-bf16": (10, 10),
    "sgd-bf16-bf16-list": (10, 10),
    "sgd-f16-f16-segments": (10, 10),
    "sgd-bf16-bf16-no-buffer": (6, 6),
    "unscale-bf16": (2, 2),
    "unscale-f32": (4, 4),
    "unscale-f16-reads": (2, 0),
    "pack-f32-bf16": (4, 2),
    "reduce_scatter-bf16-2": (8, 4),
    "reduce_scatter-f32-8": (32, 4),
    "loss_scale": (0, 0),
    "step_scalars": (0, 0),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """Facts by target and case. Processes of their own: interpreted kernels cannot be compiled. Two, side by side."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with ThreadPoolExecutor(2) as pool:
        command = [sys.executable, str(WORKER)]
        options: dict[str, Any] = {"env": env, "capture_output": True, "text": True, "timeout": 600}
        halves = [pool.submit(subprocess.run, [*command, *names], **options) for names in (TARGETS[::2], TARGETS[1::2])]
    facts: Facts = {}
    for half in halves:
        done = half.result()
        assert done.returncode == 0, done.stderr
        facts |= json.loads(done.stdout)
    assert sorted(facts) == sorted(TARGETS)
    assert all(set(CASES) <= set(cases) for cases in facts.values())
    return facts


def streaming(facts: list[dict[str, Any]]) -> dict[str, Any]:
    (kernel,) = [kernel for kernel in facts if kernel["kernel"] in STREAMING]
    return kernel


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_exact_arithmetic(compiled: Facts, target: str, case: str) -> None:
    for kernel in compiled[target][case]:
        assert kernel["flushes"] == 0, kernel
        assert kernel["approximations"] == 0, kernel
        assert kernel["contractions"] == 0, kernel
        if kernel["kernel"] in ("adam_constants_kernel", *LION):
            assert kernel["double_contractions"] == 0, kernel
        if kernel["kernel"] in ADAM:  # 8 elements per thread, in the main path and in the tail's
            assert kernel["divisions"] == kernel["square_roots"] == 16, kernel


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(compiled: Facts, target: str, case: str) -> None:
    for kernel in compiled[target][case]:
        assert kernel["spills"] == 0, kernel


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] != (0, 0)])
@pytest.mark.parametrize("target", TARGETS)
def test_main_loop_is_16_bytes_wide(compiled: Facts, target: str, case: str) -> None:
    """Every byte of a full block moves in 16-byte accesses."""
    read_bytes, written_bytes = CASES[case]
    kernel = streaming(compiled[target][case])
    accesses_per_byte = kernel["block"] / THREADS / 16
    assert kernel["wide_loads"] >= read_bytes * accesses_per_byte, kernel
    assert kernel["wide_stores"] >= written_bytes * accesses_per_byte, kernel


@pytest.mark.parametrize("target", WITH_COUNTEREXAMPLES)
def test_unaligned_views_are_not_read_wide(compiled: Facts, target: str) -> None:
    """The counts above can fail: here they do, and a wide access would fault."""
    for case in ("adam-unaligned", "unscale-unaligned"):
        kernel = streaming(compiled[target][case])
        assert kernel["wide_loads"] == kernel["wide_stores"] == 0, kernel
    aligned = streaming(compiled[target]["reduce_scatter-bf16-2"])
    unaligned = streaming(compiled[target]["reduce_scatter-unaligned"])
    assert unaligned["wide_loads"] == aligned["wide_loads"] - 4  # the shard is still read wide, the slices are not


@pytest.mark.parametrize("target", WITH_COUNTEREXAMPLES)
def test_contraction_would_be_seen(compiled: Facts, target: str) -> None:
    assert streaming(compiled[target]["adam-fused"])["contractions"] > 0
