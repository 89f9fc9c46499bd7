"""The backends that the tests of the ops run on, as data, and how to call each."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pyzero.ops import build_spec, env, native, registry, rows

SHIM = "cuda-shim"
HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Target:
    """A backend, and the device of its tensors."""

    name: str
    backend: str  # the name that the ops take
    device: str = "cpu"
    isa: str = ""  # of the cpu backend
    is_emulated: bool = False  # so slow that it skips large sizes
    missing: Callable[[], str | None] = lambda: None  # the reason if it cannot run here

    @contextmanager
    def ready(self) -> Iterator[Target]:
        """Skip the test if the backend cannot run here. Otherwise use its instruction set inside the context."""
        if reason := self.missing():
            pytest.skip(reason)
        if self.backend == SHIM:
            registry.BACKENDS[SHIM] = registry.Entry(SHIM, (), lambda device_type: None, _shim)
            try:
                yield self
            finally:
                del registry.BACKENDS[SHIM]
            return
        if not self.isa:
            yield self
            return
        module = native.load("cpu")
        if not module.use_isa(self.isa):
            pytest.skip(f"this processor has no {self.isa}")
        try:
            yield self
        finally:
            module.use_isa(module.isas()[0])


class ShimBackend(native.CudaBackend):
    """The CUDA binding with kernels that g++ compiled. Tensors are on the CPU, the device is 0, and the stream is 0."""

    def _launch_args(self, device: torch.device) -> tuple[int, ...]:
        return 0, 0


@functools.cache
def _shim() -> ShimBackend:
    from cuda_shim import build

    return ShimBackend(build.load())


def _no_shim() -> str | None:
    try:
        build_spec.find_cxx()
    except build_spec.ToolchainError as error:
        return f"cuda-shim: {error}"
    return None


def use_threads(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    """Set the number of threads. PYZERO_NUM_THREADS is read only when the backend is loaded."""
    monkeypatch.setattr(registry.pick("adam_", "cpu", torch.device("cpu")), "num_threads", num_threads)


def read_rows_by(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have "python" or the "native" module read the tensors of a call. Skips if this torch has no exchange API."""
    monkeypatch.setattr(rows, "_native", None)
    if reader == "python":
        return
    if reason := registry.BACKENDS["cpu"].unavailable_reason("cpu"):
        pytest.skip(f"cpu: {reason}")
    rows.use_reader_of(native.load("cpu"))
    if rows._native is None:
        pytest.skip("this torch has no exchange API")


def _reason(backend: str, device: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        if device == "cuda" and not HAS_GPU:
            return f"{backend}: no GPU"
        why = registry.BACKENDS[backend].unavailable_reason(device)
        return None if why is None else f"{backend}: {why}"

    return reason


def _cpu(isa: str) -> Target:
    return Target(f"cpu-{isa}", "cpu", isa=isa, missing=_reason("cpu", "cpu"))


_ISAS = ("baseline", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("baseline",)
# conftest.py has triton interpreted if there is no GPU.
_TRITON_DEVICE = "cpu" if env.triton_interpreted() else "cuda"

REFERENCE = Target("reference", "reference")
TRITON = Target(
    "triton",
    "triton",
    _TRITON_DEVICE,
    is_emulated=_TRITON_DEVICE == "cpu",
    missing=_reason("triton", _TRITON_DEVICE),
)
FUSED = (
    *(_cpu(isa) for isa in _ISAS),
    TRITON,
    Target(SHIM, SHIM, is_emulated=True, missing=_no_shim),
    Target("cuda", "cuda", "cuda", missing=_reason("cuda", "cuda")),
)


def params(targets: tuple[Target, ...]) -> list[Any]:
    """pytest parameters with readable ids. Those on a GPU have its marker."""
    return [pytest.param(target, id=target.name, marks=_marks(target)) for target in targets]


def _marks(target: Target) -> Any:
    return pytest.mark.cuda if target.device == "cuda" else ()


EMULATED_MAX_NUMEL = 10_000  # larger sizes bracket the CPU kernels' chunks; emulated backends skip them


def params_by_size(targets: tuple[Target, ...], sizes: tuple[int, ...]) -> list[Any]:
    """Parameters (target, numel)."""
    return [
        pytest.param(target, numel, id=f"{target.name}-{numel}", marks=_marks(target))
        for target in targets
        for numel in sizes
        if not target.is_emulated or numel <= EMULATED_MAX_NUMEL
    ]
