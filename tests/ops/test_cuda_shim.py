"""The CUDA kernels, run without a GPU on tests/support/cuda_shim, and the sanitizers that watch them there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_shim import build

from pyzero.ops import build_spec
from pyzero.ops.rows import rows_of

ADDRESS = "address,alignment"
OVERFLOW = "AddressSanitizer: heap-"  # buffer-overflow; far past a small one, use-after-free
SCALE = 0.25


def run_driver(sanitizer: str, planted: Path | None = None, op: str = "") -> subprocess.CompletedProcess[str]:
    driver = build.build_driver(sanitizer, planted)
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([driver, *filter(None, [op])], capture_output=True, text=True, timeout=150, env=env)


def plant(tmp_path: Path, source: str, file: str, good: str, bad: str) -> Path:
    """cuda/`source` in a copy of csrc where, in `file`, `good` became `bad`."""
    cuda = shutil.copytree(build_spec.CSRC, tmp_path / "csrc") / "cuda"
    text = (cuda / file).read_text()
    assert text.count(good) == 1, f"{good!r} is no longer in {file} exactly once: plant the bug elsewhere"
    (cuda / file).write_text(text.replace(good, bad))
    return cuda / source


@pytest.mark.parametrize("sanitizer", [ADDRESS, "thread"])
def test_kernels_are_clean(sanitizer: str) -> None:
    done = run_driver(sanitizer)
    assert done.returncode == 0 and done.stderr == "", done.stderr[:5000]
    assert "the kernels agree" in done.stdout


@pytest.mark.parametrize(
    ("source", "file", "good", "bad", "report"),
    [
        ("unscale.cu", "vector_io.cuh", "head + end - vectors_end;", "head + end - vectors_end + 1;", OVERFLOW),
        (
            "unscale.cu",
            "vector_io.cuh",
            "i < vectors_end; i += kStride",
            "begin < vectors_end && i <= vectors_end; i += kStride",
            OVERFLOW,
        ),
        ("grad_stats.cu", "grad_stats.cu", "i < params.num_partials", "i <= params.num_partials", OVERFLOW),
        ("unscale.cu", "vector_io.cuh", "begin = span.head +", "begin = span.head + 1 +", "misaligned address"),
        ("pack.cu", "pack.cu", "tensor.numel - width", "tensor.numel - 0", OVERFLOW),
    ],
    ids=["tail", "vectors", "partials", "alignment", "past a shifted end"],
)
def test_address_sanitizer_sees(tmp_path: Path, source: str, file: str, good: str, bad: str, report: str) -> None:
    op = "pack" if source == "pack.cu" else "unscale"
    done = run_driver(ADDRESS, plant(tmp_path, source, file, good, bad), op)
    assert done.returncode != 0 and report in done.stderr, done.stderr[:3000]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("sums[threadIdx.x] = value;\n  __syncthreads();", "sums[threadIdx.x] = value;"),
        ("column_sums[threadIdx.x] = sum;\n  }\n  __syncthreads();", "column_sums[threadIdx.x] = sum;\n  }"),
    ],
    ids=["before the columns", "before their sum"],
)
def test_thread_sanitizer_sees_a_missing_barrier(tmp_path: Path, good: str, bad: str) -> None:
    """Over all ops: on a busy machine threads run one after another, and the sanitizer forgets those that ended."""
    done = run_driver("thread", plant(tmp_path, "grad_stats.cu", "grad_stats.cuh", good, bad))
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr, done.stderr[:3000]
    assert "finish_sumsq_kernel" in done.stderr


def test_driver_sees_a_wrong_value(tmp_path: Path) -> None:
    twice = plant(tmp_path, "unscale.cu", "unscale.cu", "read(params.scale)", "2 * read(params.scale)")
    done = run_driver(ADDRESS, twice, "unscale")
    assert done.returncode == 1 and "unscale: wrong values" in done.stderr


def test_module_unscales_a_torch_tensor() -> None:
    module = build.load()
    tensor = torch.randn(1001).bfloat16()
    found_inf, sumsq = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    workspace = torch.empty(module.grad_stats_workspace_bytes, dtype=torch.uint8)
    want = tensor * 0.25

    grad_stats = (found_inf.data_ptr(), sumsq.data_ptr(), True)
    module.unscale_(rows_of([tensor]), SCALE, *grad_stats, workspace.data_ptr(), 0, 0)

    assert torch.equal(tensor, want) and found_inf.item() == 0
    torch.testing.assert_close(sumsq[0], want.double().square().sum(), rtol=1e-12, atol=0)


def test_sumsq_is_the_same_from_run_to_run() -> None:
    module = build.load()
    shard, slices = torch.empty(20_011), [torch.randn(20_011) for _ in range(3)]
    workspace = torch.empty(module.grad_stats_workspace_bytes, dtype=torch.uint8)
    sums = []
    for _ in range(3):
        sumsq = torch.zeros(1)
        grad_stats = (0, sumsq.data_ptr(), False)
        module.reduce_scatter_(rows_of([shard, *slices]), 1.0, False, *grad_stats, workspace.data_ptr(), 0, 0)
        sums.append(sumsq.item())
    assert len(set(sums)) == 1 and sums[0] > 0


def test_a_cuda_error_becomes_a_python_error() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA error while selecting the tensors' device: invalid device ordinal"):
        build.load().unscale_(b"", SCALE, 0, 0, False, 0, 1, 0)  # the shim has device 0 alone


def test_too_many_ranks_are_refused() -> None:
    module = build.load()
    shard, one = torch.full((8,), 7.0), torch.zeros(8)
    rows = rows_of([shard] + [one] * 1025)
    with pytest.raises(ValueError, match="expected 1 to 1024 slices, one per rank, got 1025; reduce"):
        module.reduce_scatter_(rows, 1.0, False, 0, 0, False, 0, 0, 0)
    assert torch.equal(shard, torch.full((8,), 7.0))
