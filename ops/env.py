"""The only reader of PYZERO_* variables. Stdlib only: setup.py loads this file by its path, without the package."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

# README's table holds the same rows; tests/build/test_packaging.py compares the two.
VARIABLES = {
    "PYZERO_BUILD": "what `pip install` builds ahead of time: `auto` (default), `none`, `cpu`, `cuda` or `all`",
    "PYZERO_CUDA_ARCHS": "CUDA architectures to build: `80;90`; default: 80, 90, 100 (pip), the present GPU (JIT)",
    "PYZERO_CACHE_DIR": "where kernels built at first use are kept; default `~/.cache/pyzero`",
    "PYZERO_JIT": "`0` never builds kernels at first use",
    "PYZERO_BACKEND": 'what `backend="auto"` means: `auto` (default), `cuda`, `cpu`, `triton` or `reference`',
    "PYZERO_REQUIRE": "for tests: a list as in `cuda,triton` of backends whose tests must not skip",
    "PYZERO_NUM_THREADS": "threads of the CPU kernels; default: torch's number of threads",
}

BUILD_CHOICES = ("auto", "none", "cpu", "cuda", "all")
BACKEND_CHOICES = ("auto", "cuda", "cpu", "triton", "reference")


def _choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise ValueError(f"expected {name} as one of {', '.join(choices)}, got {value}; correct it or unset it")
    return value


def _count(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"expected {name} as a number from 1, got {value}; correct it or unset it")
    return int(value)


def _words(name: str) -> tuple[str, ...]:
    return tuple(os.environ.get(name, "").replace(";", " ").replace(",", " ").split())


def build() -> str:
    """Return what setup.py builds: one of BUILD_CHOICES."""
    return _choice("PYZERO_BUILD", BUILD_CHOICES)


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures asked for, as in ("80", "90"); empty if unset."""
    archs = tuple(arch.removeprefix("sm_").replace(".", "") for arch in _words("PYZERO_CUDA_ARCHS"))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise ValueError(f"expected PYZERO_CUDA_ARCHS as in 80;90, got {arch!r} in it; correct it or unset it")
    return archs


def cache_dir() -> Path:
    """Return the folder of modules built at first use. Raises RuntimeError if this user has no home folder."""
    if asked := os.environ.get("PYZERO_CACHE_DIR"):
        return Path(asked).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "pyzero"


def jit_enabled() -> bool:
    """Whether kernels may be built at first use: PYZERO_JIT is not 0."""
    return _choice("PYZERO_JIT", ("1", "0")) == "1"


def default_backend() -> str:
    """Return the meaning of backend="auto": one of BACKEND_CHOICES."""
    return _choice("PYZERO_BACKEND", BACKEND_CHOICES)


def required() -> tuple[str, ...]:
    """Backends whose tests must not skip."""
    return _words("PYZERO_REQUIRE")


def num_threads() -> int | None:
    """Threads for the CPU kernels, or None to follow torch."""
    return _count("PYZERO_NUM_THREADS")


def max_jobs() -> int | None:
    """Return how many compilers may run at a time, from $MAX_JOBS; None if unset."""
    return _count("MAX_JOBS")


def cxx() -> tuple[str, ...]:
    """Return the C++ compiler of $CXX, split into words; empty if unset."""
    value = os.environ.get("CXX", "")
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise ValueError(f"expected CXX as a command, got {value} ({error}); correct it or unset it") from None


def cuda_home() -> str | None:
    """Return the CUDA toolkit of $CUDA_HOME or $CUDA_PATH, or None."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None


def is_first(variable: str) -> bool | None:
    """Whether a launcher's variable, LOCAL_RANK or RANK, is that of the first process; None if it is not set."""
    return os.environ[variable] == "0" if variable in os.environ else None


def triton_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter. Reads Triton's own variable."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
