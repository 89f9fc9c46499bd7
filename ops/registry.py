"""The table of backends: whom each serves, why one is unavailable, and which one an op takes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import env, native
from .jit import JitError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pyzero")

OPS = ("adam_", "unscale_", "reduce_scatter_", "pack_", "loss_scale_update_")
_LOGGED_LINES = 8  # of a compiler's output, when "auto" goes on without it


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One row of the table."""

    name: str
    auto_for: tuple[str, ...]  # device types; "*" is any
    unavailable_reason: Callable[[str], str | None]  # of a device type; builds nothing
    load: Callable[[], Any]  # the object with the internal functions; may build, raises JitError or ImportError


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


BACKENDS = {
    row.name: row
    for row in (
        Backend("cuda", ("cuda",), _cuda_reason, lambda: native.backend("cuda")),
        Backend("cpu", ("cpu",), _cpu_reason, lambda: native.backend("cpu")),
        Backend("triton", ("cuda",), _triton_reason, lambda: _import("triton_kernels")),
        Backend("reference", ("*",), lambda device_type: None, lambda: _import("reference")),
    )
}


def _import(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


def ladder(device_type: str) -> list[Backend]:
    """The backends that "auto" tries for a device type, best first."""
    rows = [row for row in BACKENDS.values() if device_type in row.auto_for or "*" in row.auto_for]
    return [row for row in rows if row.name != "triton" or not env.triton_interpreted()]


_picked: dict[tuple[str, str, str], Any] = {}


def pick(op: str, backend: str, device: torch.device) -> Any:
    """The backend that runs `op` (as in "adam_") on `device`; decided once per op, backend and device type.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: the backend was asked for by name and cannot run.
    """
    key = (op, backend, device.type)
    found = _picked.get(key)
    if found is None:
        found = _picked[key] = _choose(*key)
    return found


def forget() -> None:
    """Decide anew at the next pick(): the environment has changed (tests)."""
    _picked.clear()
    native.forget()
    _warn_once.cache_clear()


def _choose(op: str, name: str, device_type: str) -> Any:
    assert op in OPS, op
    if name == "auto":
        name = env.default_backend()
    if name == "auto":
        return _climb_down(op, device_type)
    if name not in BACKENDS:
        raise ValueError(f"got backend={name!r}, wanted one of auto, {', '.join(BACKENDS)}")
    loaded, reason = _try(BACKENDS[name], op, device_type)
    if reason is not None:
        raise BackendUnavailableError(f'backend "{name}" cannot run {op} on {device_type} tensors: {reason}')
    return loaded


def _climb_down(op: str, device_type: str) -> Any:
    reasons: list[str] = []
    for row in ladder(device_type):
        loaded, reason = _try(row, op, device_type)
        if reason is None:
            break
        reasons.append(f"{row.name}: {reason}")
    assert reason is None, "the reference runs everywhere"
    why = f" ({'; '.join(reasons)})" if reasons else ""
    if reasons and row.name == "reference":
        _warn_once(device_type, why)
    log.info("%s on %s tensors: backend %s%s", op, device_type, row.name, why)
    return loaded


@functools.cache
def _warn_once(device_type: str, why: str) -> None:
    log.warning("no fused kernels for %s tensors, taking the slow reference%s", device_type, why)


def _try(row: Backend, op: str, device_type: str) -> tuple[Any, str | None]:
    """(the loaded backend, None), or (None, why not)."""
    if reason := row.unavailable_reason(device_type):
        return None, reason
    try:
        loaded = row.load()
    except JitError as error:
        lines = str(error).splitlines()
        return None, "\n".join(lines[:_LOGGED_LINES])
    except ImportError as error:
        return None, f"cannot be imported: {error}"
    return (loaded, None) if hasattr(loaded, op) else (None, f"has no {op}")
