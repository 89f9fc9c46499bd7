"""Loads the C++ and CUDA modules: the one built ahead of time, else the one that jit.py builds."""

from __future__ import annotations

import functools
import logging
import threading
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pyzero

from . import build_spec, jit
from .jit import JitError, Kind

log = logging.getLogger("pyzero")

_SOURCES = {"cpu": build_spec.cpu_sources, "cuda": build_spec.cuda_sources}
_loading = threading.Lock()


def ahead_of_time_path(kind: Kind) -> Path | None:
    """The module that pip built, stale or not; None where there is none."""
    found = PathFinder.find_spec(f"_native_{kind}", pyzero.__path__)  # not util.find_spec: it answers with JIT's, once loaded
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
