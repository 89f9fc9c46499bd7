"""The table of backends: each one's devices, why one is unavailable, and which one runs an op."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from . import env, native
from .backend import Backend
from .jit import JitError

if TYPE_CHECKING:
    import torch

    from . import reference, triton_kernels

    _modules: tuple[Backend, ...] = (reference, triton_kernels)  # for mypy: both keep the contract

log = logging.getLogger("pyzero")

OPS = ("adam_", "lion_", "sgd_", "unscale_", "reduce_scatter_", "pack_", "loss_scale_update_", "step_scalars_")
_LOGGED_LINES = 8  # of a compiler's output, when "auto" goes on without it


class BackendUnavailableError(RuntimeError):
    """The chosen backend cannot run. The message says why."""


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    auto_for: tuple[str, ...]  # device types; "*" is any
    unavailable_reason: Callable[[str], str | None]  # of a device type; builds nothing
    load: Callable[[], Backend]  # may build; raises JitError or ImportError


def _no_gpu_reason() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no GPU that this torch can use"


def _cuda_reason(device_type: str) -> str | None:
    import torch

    if device_type != "cuda":
        return f"runs on cuda tensors, not on {device_type}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _no_gpu_reason() or native.unavailable_reason("cuda")


def _cpu_reason(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"runs on cpu tensors, not on {device_type}"
    return native.unavailable_reason("cpu")


def _triton_reason(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type not in ("cuda", "xpu") and not env.triton_interpreted():
        return f"runs on GPU tensors, not on {device_type} (TRITON_INTERPRET=1 would interpret it, slowly)"
    return _no_gpu_reason() if device_type == "cuda" else None


def _load_triton() -> Backend:
    native.share_row_reader()
    return _import("triton_kernels")


def _import(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__package__}.{name}"))


BACKENDS = {
    row.name: row
    for row in (
        Entry("cuda", ("cuda",), _cuda_reason, lambda: native.backend("cuda")),
        Entry("cpu", ("cpu",), _cpu_reason, lambda: native.backend("cpu")),
        Entry("triton", ("cuda",), _triton_reason, _load_triton),
        Entry("reference", ("*",), lambda device_type: None, lambda: _import("reference")),
    )
}


def ladder(device_type: str) -> list[Entry]:
    """Return the backends that "auto" tries for a device type, best first."""
    rows = [row for row in BACKENDS.values() if device_type in row.auto_for or "*" in row.auto_for]
    return [row for row in rows if row.name != "triton" or not env.triton_interpreted()]


_picked: dict[tuple[str, str, torch.device], Backend] = {}


def pick(op: str, backend: str, device: torch.device) -> Backend:
    """Return the backend that runs `op` (as in "adam_") on `device`. It is chosen once.

    Raises:
        ValueError: There is no backend of that name.
        BackendUnavailableError: The caller named the backend, and it cannot run.
    """
    key = (op, backend, device)
    found = _picked.get(key)
    if found is None:
        found = _picked[key] = _choose(op, backend, device.type)
    return found


def check_name(backend: str) -> None:
    """Raise ValueError if there is no backend of that name."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ValueError(f"expected backend as one of auto, {names}, got {backend!r}; pass 'auto' for the best here")


def forget() -> None:
    """Forget the choices, so that the next pick() chooses again. For tests that change the environment."""
    _picked.clear()
    native.forget()
    _warn_once.cache_clear()


def _choose(op: str, name: str, device_type: str) -> Backend:
    assert op in OPS, op
    if name == "auto":
        name = env.default_backend()
    if name == "auto":
        return _first_available(op, device_type)
    check_name(name)
    loaded = _try(BACKENDS[name], op, device_type)
    if isinstance(loaded, str):
        raise BackendUnavailableError(f'backend "{name}" cannot run {op} on {device_type} tensors: {loaded}')
    return loaded


def _first_available(op: str, device_type: str) -> Backend:
    reasons: list[str] = []
    for row in ladder(device_type):
        loaded = _try(row, op, device_type)
        if not isinstance(loaded, str):
            break
        reasons.append(f"{row.name}: {loaded}")
    assert not isinstance(loaded, str), "the reference runs everywhere"
    why = f" ({'; '.join(reasons)})" if reasons else ""
    if reasons and row.name == "reference" and _logs():
        _warn_once(device_type, why)
    if _logs():
        log.info("%s on %s tensors: backend %s%s", op, device_type, row.name, why)
    return loaded


def _logs() -> bool:
    """Whether this process logs for the ranks of its host, which all have what it has. Not in each call of an op."""
    is_first = env.is_first("LOCAL_RANK")
    if is_first is not None:
        return is_first
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return env.is_first("RANK") is not False


@functools.cache
def _warn_once(device_type: str, why: str) -> None:
    log.warning("no fused kernels for %s tensors, taking the slow reference%s", device_type, why)


def _try(row: Entry, op: str, device_type: str) -> Backend | str:
    """Return the loaded backend, or the reason why it cannot run the op."""
    if reason := row.unavailable_reason(device_type):
        return reason
    try:
        loaded = row.load()
    except JitError as error:
        lines = str(error).splitlines()
        return "\n".join(lines[:_LOGGED_LINES])
    except ImportError as error:
        return f"cannot be imported: {error}"
    return loaded if hasattr(loaded, op) else f"has no {op}"
