"""The C++ and CUDA modules: loaded (built ahead of time, else jit.py's), and called with pointers for tensors."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pyzero

from . import build_spec, env, jit
from .jit import JitError, Kind

if TYPE_CHECKING:
    from .adam import AdamHyper
    from .loss_scale import LossScalePolicy

log = logging.getLogger("pyzero")

_SOURCES = {"cpu": build_spec.cpu_sources, "cuda": build_spec.cuda_sources}
_loading = threading.Lock()


def ahead_of_time_path(kind: Kind) -> Path | None:
    """The module that pip built, stale or not; None where there is none."""
    # Not importlib.util.find_spec: once the JIT's module is loaded, it answers with that.
    found = PathFinder.find_spec(f"_native_{kind}", pyzero.__path__)
    return Path(found.origin) if found is not None and found.origin is not None else None


def stale_reason(kind: Kind) -> str | None:
    """Why the module that pip built does not fit the sources beside the package, or None."""
    path = ahead_of_time_path(kind)
    if path is None or not build_spec.CSRC.is_dir():
        return None
    stamp = build_spec.read_stamp(path)
    wanted = build_spec.source_hash(build_spec.CSRC, _SOURCES[kind]())
    if stamp is not None and stamp[0] == wanted:
        return None
    got = stamp[0] if stamp is not None else "none"
    return f"{path} is stale (sources {got}, wanted {wanted}); pip install again, or remove it"


def unavailable_reason(kind: Kind) -> str | None:
    """Why load() cannot even try, or None. Cheap: builds and imports nothing."""
    stale = stale_reason(kind)
    if stale is None and ahead_of_time_path(kind) is not None:
        return None
    reasons = [stale or "not built ahead of time", jit.unavailable_reason(kind)]
    return None if reasons[1] is None else "; ".join(filter(None, reasons))


def load(kind: Kind) -> ModuleType:
    """The module, built now if need be. Raises JitError; a failed build is not tried twice in one process."""
    with _loading:
        loaded = _load(kind)
    if isinstance(loaded, JitError):
        raise loaded
    return loaded


@functools.cache
def _load(kind: Kind) -> ModuleType | JitError:
    path = ahead_of_time_path(kind)
    stale = stale_reason(kind)
    try:
        if path is not None and stale is None:
            return jit.import_file(f"_native_{kind}", path)
        if stale is not None:
            log.warning("%s", stale)
        return jit.load(kind)
    except JitError as error:
        return error


def forget() -> None:
    """Look anew at the next load(): the environment has changed (tests)."""
    _load.cache_clear()


# ---- tensors to pointers ------------------------------------------------------------------------------------------

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/math/types.h
_NO_BUFFER = (0, 0, 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _buffer(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel()


def _scalar(value: float | Tensor) -> tuple[float, int]:
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value, 0)


def _report(found_inf: Tensor | None, sumsq: Tensor | None) -> tuple[int, int, bool]:
    return _address(found_inf), _address(sumsq), sumsq is not None and sumsq.dtype == torch.float64


class NativeBackend:
    """The internal ops over one native module; a subclass says what memory and launch arguments its launches want."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def _adam_workspace(self, device: torch.device, num_segments: int) -> Tensor | None:
        return None

    def _report_workspace(self, device: torch.device) -> Tensor | None:
        return None

    def _where(self, device: torch.device) -> tuple[int, ...]:
        raise NotImplementedError

    def _tail(self, device: torch.device, workspace: Tensor | None) -> tuple[int, ...]:
        raise NotImplementedError

    def adam_(
        self,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        param_out: Tensor | None,
        hyper: AdamHyper,
        lr: float | Tensor,
        step: float | Tensor,
        grad_scale: float | Tensor,
        found_inf: Tensor | None,
        segment_ids: Tensor | None,
        active: Tensor | None,
    ) -> None:
        """See `pyzero.ops.adam_`."""
        num_segments = step.numel() if isinstance(step, Tensor) else 1
        workspace = None
        if isinstance(lr, Tensor) or isinstance(step, Tensor):
            workspace = self._adam_workspace(master.device, num_segments)
        self.module.adam_(
            master.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            _buffer(grad),
            _NO_BUFFER if param_out is None else _buffer(param_out),
            (
                hyper.beta1,
                hyper.beta2,
                hyper.eps,
                hyper.weight_decay,
                hyper.decoupled_weight_decay,
                hyper.maximize,
            ),
            _scalar(lr),
            _scalar(step),
            _scalar(grad_scale),
            _address(found_inf),
            (_address(segment_ids), _address(active), num_segments),
            *self._tail(master.device, workspace),
        )

    def unscale_(
        self, tensors: Sequence[Tensor], inv_scale: float | Tensor, found_inf: Tensor | None, sumsq: Tensor | None
    ) -> None:
        """See `pyzero.ops.unscale_`."""
        device = tensors[0].device
        workspace = self._report_workspace(device)
        self.module.unscale_(
            [_buffer(tensor) for tensor in tensors],
            _scalar(inv_scale),
            _report(found_inf, sumsq),
            *self._tail(device, workspace),
        )

    def pack_(
        self,
        bucket: Tensor,
        tensors: Sequence[Tensor],
        offsets: Sequence[int],
        scale: float | Tensor,
        found_inf: Tensor | None,
        sumsq: Tensor | None,
    ) -> None:
        """See `pyzero.ops.pack_`."""
        workspace = self._report_workspace(bucket.device)
        self.module.pack_(
            _buffer(bucket),
            [_buffer(tensor) for tensor in tensors],
            offsets,
            _scalar(scale),
            _report(found_inf, sumsq),
            *self._tail(bucket.device, workspace),
        )

    def reduce_scatter_(
        self,
        shard: Tensor,
        slices: Sequence[Tensor],
        scale: float | Tensor,
        accumulate: bool,
        found_inf: Tensor | None,
        sumsq: Tensor | None,
    ) -> None:
        """See `pyzero.ops.reduce_scatter_`."""
        workspace = self._report_workspace(shard.device)
        self.module.reduce_scatter_(
            shard.data_ptr(),
            [piece.data_ptr() for piece in slices],
            _DTYPE_CODES[slices[0].dtype],
            shard.numel(),
            _scalar(scale),
            accumulate,
            _report(found_inf, sumsq),
            *self._tail(shard.device, workspace),
        )

    def loss_scale_update_(self, state: Tensor, found_inf: Tensor, policy: LossScalePolicy) -> None:
        """See `pyzero.ops.loss_scale_update_`."""
        rule = (
            policy.growth_factor,
            policy.backoff_factor,
            float(policy.growth_interval),
            policy.min_scale,
            policy.max_scale,
            float(policy.hysteresis),
            float(policy.growth_delay),
            policy.consecutive_hysteresis,
        )
        self.module.loss_scale_update_(state.data_ptr(), found_inf.data_ptr(), rule, *self._where(state.device))


class CpuBackend(NativeBackend):
    """The C++ module: a launch takes the number of threads."""

    def _where(self, device: torch.device) -> tuple[int, ...]:
        return ()

    def _tail(self, device: torch.device, workspace: Tensor | None) -> tuple[int, ...]:
        return (env.num_threads() or torch.get_num_threads(),)


class CudaBackend(NativeBackend):
    """The CUDA module: a launch takes a workspace, the device and the caller's current stream.

    A workspace may be dropped once the launch is queued: the caching allocator hands its memory on in stream order.
    """

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module)
        self._report_bytes: dict[torch.device, int] = {}

    def _adam_workspace(self, device: torch.device, num_segments: int) -> Tensor | None:
        return torch.empty(self.module.adam_workspace_bytes(num_segments), dtype=torch.uint8, device=device)

    def _report_workspace(self, device: torch.device) -> Tensor | None:
        if device not in self._report_bytes:
            self._report_bytes[device] = self.module.report_workspace_bytes(device.index)
        return torch.empty(self._report_bytes[device], dtype=torch.uint8, device=device)

    def _where(self, device: torch.device) -> tuple[int, ...]:
        return device.index, torch.cuda.current_stream(device).cuda_stream

    def _tail(self, device: torch.device, workspace: Tensor | None) -> tuple[int, ...]:
        return _address(workspace), *self._where(device)


def backend(kind: Kind) -> NativeBackend:
    """The internal ops of the C++ or the CUDA module. Raises JitError where it cannot be built."""
    return CpuBackend(load(kind)) if kind == "cpu" else CudaBackend(load(kind))
