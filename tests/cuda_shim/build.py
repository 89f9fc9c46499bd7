"""Compiles csrc/cuda with g++ against the shim beside this file: as a Python module, or as a driver under a sanitizer."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from pyzero.ops import build_spec

SHIM = Path(__file__).resolve().parent
MODULE = "_native_cuda_shim"
# The product's own flags; few threads per block, for they are real ones.
FLAGS = (*build_spec._HOST_FLAGS, "-std=c++17", "-DPYZERO_THREADS_PER_BLOCK=32", "-Wno-unknown-pragmas")


def cache_dir() -> Path:
    """Where builds stay, by content hash; outside the checkout."""
    folder = Path(tempfile.gettempdir(), f"pyzero-cuda-shim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _build(csrc: Path, sources: list[Path], flags: tuple[str, ...], link_flags: tuple[str, ...], suffix: str) -> Path:
    """Compile every source and link them, unless the same inputs were built before."""
    cxx = build_spec.find_cxx()
    inputs = [*sources, *csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *SHIM.glob("*.h")]
    what = [build_spec.compiler_version(cxx), repr((flags, link_flags)), *(path.read_text() for path in inputs)]
    output = cache_dir() / (hashlib.sha256("\0".join(what).encode()).hexdigest()[:16] + suffix)
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        common = [*cxx, *flags, f"-I{SHIM}", f"-I{csrc}"]
        objects = [f"{folder}/{path.stem}-{path.suffix[1:]}.o" for path in sources]
        compiles = [[*common, "-x", "c++", "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(build_spec.num_cpus()) as pool:
            list(pool.map(_run, compiles))
        _run([*cxx, *flags, *link_flags, *objects, "-o", f"{folder}/out"])
        os.replace(f"{folder}/out", output)
    return output


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:5000]}"


@functools.cache
def load() -> ModuleType:
    """The CUDA binding whose kernels run on the CPU, on CPU tensors' addresses: device 0, stream 0."""
    csrc = build_spec.CSRC
    flags = ("-O2", *FLAGS, f"-DPYZERO_MODULE_NAME={MODULE}", *(f"-I{path}" for path in build_spec.python_includes()))
    sources = [csrc / name for name in build_spec.cuda_sources()]
    path = _build(csrc, sources, flags, ("-shared", "-pthread"), build_spec.EXT_SUFFIX)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


def build_driver(sanitizer: str, csrc: Path = build_spec.CSRC) -> Path:
    """driver.cpp with the kernels of `csrc` (a temporary copy, in the tests that plant a bug)."""
    sources = [*sorted((csrc / "cuda").glob("*.cu")), SHIM / "driver.cpp"]
    # Optimised little: the compiler must not remove the very access that a sanitizer is to report.
    flags = ("-O1", "-g1", *FLAGS, f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer")
    return _build(csrc, sources, flags, ("-pthread",), f"-{sanitizer}")
