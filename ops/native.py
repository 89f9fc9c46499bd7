"""Load the C++ and CUDA modules (built ahead of time, else by jit.py), and call them with pointers for tensors."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import pyzero

from . import build_spec, env, jit, rows
from .backend import (
    AdamArgs,
    LionArgs,
    LossScaleArgs,
    PackArgs,
    ReduceScatterArgs,
    Scalar,
    SgdArgs,
    StepScalarsArgs,
    UnscaleArgs,
)
from .jit import JitError, Kind
from .streams import current_stream

log = logging.getLogger("pyzero")

_SOURCES = {"cpu": build_spec.cpu_sources, "cuda": build_spec.cuda_sources}
_loading = threading.Lock()
_import_failures: dict[Kind, str] = {}  # of modules that pip built, as with an older C++ library on this machine


def ahead_of_time_path(kind: Kind) -> Path | None:
    """Return the path of the module that pip built, usable or not; None if there is none."""
    # Not importlib.util.find_spec, because that finds the JIT's module once it is loaded.
    found = PathFinder.find_spec(f"_native_{kind}", pyzero.__path__)
    return Path(found.origin) if found is not None and found.origin is not None else None


def unusable_reason(kind: Kind) -> str | None:
    """Return why the module that pip built does not fit the sources in the package, or this machine; or None."""
    path = ahead_of_time_path(kind)
    if kind in _import_failures:
        return _import_failures[kind]
    if path is None or not build_spec.CSRC.is_dir():
        return None
    stamp = build_spec.read_stamp(path)
    wanted = build_spec.source_hash(build_spec.CSRC, _SOURCES[kind]())
    if stamp is not None and stamp.source_hash == wanted:
        return (_foreign_reason(path, stamp.archs) or _driver_reason(path, stamp.toolkit)) if kind == "cuda" else None
    got = stamp.source_hash if stamp is not None else "none"
    return f"{path} is stale (sources {got}, wanted {wanted}); pip install again, or remove it"


def _foreign_reason(path: Path, archs: Sequence[str]) -> str | None:
    if not archs or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    foreign = [f"sm_{gpu}" for gpu in jit.present_cuda_archs() if not build_spec.runs_on(archs, gpu)]
    if not foreign:
        return None
    return (
        f"{path} has no kernels for {', '.join(foreign)}, a GPU of this machine (built for {', '.join(archs)}); set "
        f"PYZERO_CUDA_ARCHS and pip install again, or remove it"
    )


def _driver_reason(path: Path, toolkit: str) -> str | None:
    reason = jit.driver_reason(toolkit)
    return reason and f"{path} does not run here: {reason}"


def unavailable_reason(kind: Kind) -> str | None:
    """Return why load() cannot even try, or None. Cheap: builds and imports nothing."""
    unusable = unusable_reason(kind)
    if unusable is None and ahead_of_time_path(kind) is not None:
        return None
    reasons = [unusable or "not built ahead of time", jit.unavailable_reason(kind)]
    return None if reasons[1] is None else "; ".join(filter(None, reasons))


def load(kind: Kind) -> ModuleType:
    """Return the module. Build it if needed. Raises JitError; a process does not try a failed build twice."""
    with _loading:
        loaded = _load(kind)
    if isinstance(loaded, JitError):
        raise loaded
    return loaded


def import_ahead_of_time(kind: Kind) -> ModuleType | None:
    """Return the module that pip built; None if there is none, or if it is unusable: `unusable_reason` knows why."""
    path = ahead_of_time_path(kind)
    if path is None or unusable_reason(kind) is not None:
        return None
    try:
        return jit.import_file(f"_native_{kind}", path)
    except JitError as error:
        _import_failures[kind] = str(error)
        return None


@functools.cache
def _load(kind: Kind) -> ModuleType | JitError:
    module = import_ahead_of_time(kind)
    if module is not None:
        return module
    unusable = unusable_reason(kind)
    if unusable is not None:
        log.warning("%s", unusable)
    try:
        return jit.load(kind)
    except JitError as error:
        return error if unusable is None else JitError(f"{unusable}; {error}")


def forget() -> None:
    """Forget loaded modules, so that the next load() looks again. For tests that change the environment."""
    _load.cache_clear()
    _import_failures.clear()
    backend.cache_clear()


def share_row_reader() -> None:
    """If pip has built the C++ module, let it read tensors for a backend that is not in C++; see `rows`."""
    if ahead_of_time_path("cpu") is not None and unusable_reason("cpu") is None:
        with contextlib.suppress(JitError):  # it cannot be imported: Python reads them
            backend("cpu")


# ---- tensors to pointers ------------------------------------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scalar(value: Scalar) -> float | int:
    """Return a number as float, or a tensor's address as int; see csrc/bind_common.h."""
    return value if isinstance(value, float) else value.data_ptr()


class NativeBackend:
    """The ops over one native module. A subclass gives the workspace and the last arguments of a launch."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        rows.use_reader_of(module)

    def _launch_args(self, device: torch.device) -> tuple[int, ...]:
        """Return the last arguments of every launch."""
        raise NotImplementedError

    def _adam_workspace(self, device: torch.device, num_segments: int) -> Tensor | None:
        return None

    def _grad_stats_workspace(self, device: torch.device) -> Tensor | None:
        return None

    def _with_workspace(self, workspace: Tensor | None, device: torch.device) -> tuple[int, ...]:
        """Return the last arguments of a launch that may need a workspace."""
        return self._launch_args(device)

    def adam_(self, args: AdamArgs) -> None:
        """See `pyzero.ops.adam_`."""
        device = args.master.device
        step, workspace, num_segments = args.step, None, 1
        if not isinstance(step, float):
            num_segments = step.numel()
        if not (isinstance(step, float) and isinstance(args.lr, float)):
            workspace = self._adam_workspace(device, num_segments)
        self.module.adam_(
            args.rows,
            args.offsets,
            args.hyper,
            _scalar(args.lr),
            _scalar(step),
            _scalar(args.grad_scale),
            _address(args.found_inf),
            _address(args.segment_ids),
            _address(args.active),
            num_segments,
            *self._with_workspace(workspace, device),
        )

    def lion_(self, args: LionArgs) -> None:
        """See `pyzero.ops.lion_`."""
        self.module.lion_(
            args.rows,
            args.offsets,
            args.hyper,
            _scalar(args.lr),
            _scalar(args.grad_scale),
            _address(args.found_inf),
            _address(args.segment_ids),
            _address(args.active),
            *self._launch_args(args.master.device),
        )

    def sgd_(self, args: SgdArgs) -> None:
        """See `pyzero.ops.sgd_`."""
        self.module.sgd_(
            args.rows,
            args.offsets,
            args.hyper,
            args.momentum_buffer is not None,
            _scalar(args.lr),
            0.0 if args.step is None else _scalar(args.step),
            _scalar(args.grad_scale),
            _address(args.found_inf),
            _address(args.segment_ids),
            _address(args.active),
            *self._launch_args(args.master.device),
        )

    def unscale_(self, args: UnscaleArgs) -> None:
        """See `pyzero.ops.unscale_`."""
        device, sumsq = args.tensors[0].device, args.sumsq
        workspace = None if sumsq is None else self._grad_stats_workspace(device)
        self.module.unscale_(
            args.rows,
            _scalar(args.inv_scale),
            _address(args.found_inf),
            _address(sumsq),
            sumsq is not None and sumsq.dtype is torch.float64,
            *self._with_workspace(workspace, device),
        )

    def pack_(self, args: PackArgs) -> None:
        """See `pyzero.ops.pack_`."""
        self.module.pack_(args.rows, args.offsets, _scalar(args.scale), *self._launch_args(args.bucket.device))

    def reduce_scatter_(self, args: ReduceScatterArgs) -> None:
        """See `pyzero.ops.reduce_scatter_`."""
        device, sumsq = args.shard.device, args.sumsq
        workspace = None if sumsq is None else self._grad_stats_workspace(device)
        self.module.reduce_scatter_(
            args.rows,
            _scalar(args.scale),
            args.accumulate,
            _address(args.found_inf),
            _address(sumsq),
            sumsq is not None and sumsq.dtype is torch.float64,
            *self._with_workspace(workspace, device),
        )

    def loss_scale_update_(self, args: LossScaleArgs) -> None:
        """See `pyzero.ops.loss_scale_update_`."""
        state, found_inf, policy = args
        self.module.loss_scale_update_(state.data_ptr(), found_inf.data_ptr(), policy, *self._launch_args(state.device))

    def step_scalars_(self, args: StepScalarsArgs) -> None:
        """See `pyzero.ops.step_scalars_`."""
        self.module.step_scalars_(
            args.out.data_ptr(),
            args.stats.data_ptr(),
            args.stats.shape[0],
            -1.0 if args.max_norm is None else args.max_norm,
            _scalar(args.unscale),
            _scalar(args.factor),
            args.steps.data_ptr(),
            args.used.data_ptr(),
            args.steps.numel(),
            *self._launch_args(args.stats.device),
        )


class CpuBackend(NativeBackend):
    """The ops over the C++ module. A launch takes the number of threads, and no workspace."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module)
        self.num_threads = env.num_threads()  # None: torch's number at the launch

    def _launch_args(self, device: torch.device) -> tuple[int, ...]:
        of_torch = torch.get_num_threads()  # always called: in a new thread this sets OpenMP's number
        return (self.num_threads or of_torch,)


class CudaBackend(NativeBackend):
    """The ops over the CUDA module. A launch takes a workspace, the device and the caller's current stream.

    A workspace may be freed once the launch is queued, because the caching allocator reuses memory in stream order.
    """

    def _launch_args(self, device: torch.device) -> tuple[int, ...]:
        return device.index, current_stream(device)

    def _adam_workspace(self, device: torch.device, num_segments: int) -> Tensor | None:
        return torch.empty(self.module.adam_workspace_bytes(num_segments), dtype=torch.uint8, device=device)

    def _grad_stats_workspace(self, device: torch.device) -> Tensor | None:
        return torch.empty(self.module.grad_stats_workspace_bytes, dtype=torch.uint8, device=device)

    def _with_workspace(self, workspace: Tensor | None, device: torch.device) -> tuple[int, ...]:
        return _address(workspace), *self._launch_args(device)


@functools.cache
def backend(kind: Kind) -> NativeBackend:
    """Return the ops of the C++ or the CUDA module. Raises JitError if it cannot be built."""
    return CpuBackend(load(kind)) if kind == "cpu" else CudaBackend(load(kind))
