"""Compiles csrc/cuda with g++ against the shim: as a Python module, or as a driver under a sanitizer."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from pyzero.ops import build_spec

CSRC = build_spec.CSRC
SHIM = Path(__file__).resolve().parent
MODULE = "_native_cuda_shim"
# The product's own flags. Blocks have few threads, because these are real threads. There are few blocks, so that each
# gets a run of chunks, and few gradients per launch, so that a list takes several. Like nvcc, g++ must not assume
# strict aliasing.
FLAGS = (
    *build_spec._HOST_FLAGS,
    "-std=c++17",
    "-DPYZERO_THREADS_PER_BLOCK=16",
    "-DPYZERO_MAX_PARTIALS=8",
    "-DPYZERO_MANY_GRADS=3",
    "-fno-strict-aliasing",
)


def cache_dir() -> Path:
    """The folder of builds, which are named by content hash. It is outside the checkout."""
    folder = Path(tempfile.gettempdir(), f"pyzero-cuda-shim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run_compiler(arguments: list[str], what: list[str], suffix: str) -> Path:
    """The cached output of one compiler run. The key is a hash of `what`, the inputs."""
    command = [*build_spec.find_cxx(), *arguments]
    what = [build_spec.compiler_version(command[:1]), *what]
    output = cache_dir() / (hashlib.sha256("\0".join(what).encode()).hexdigest()[:16] + suffix)
    if output.exists():
        return output
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        done = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:5000]}"
        os.replace(f"{folder}/out", output)
    return output


def _object(source: Path, csrc: Path, flags: tuple[str, ...]) -> Path:
    inputs = [source, *csrc.rglob("*.h"), *csrc.rglob("*.cuh"), *SHIM.glob("*.h")]
    arguments = [*flags, f"-I{SHIM}", f"-I{csrc}", "-Wno-unknown-pragmas", "-x", "c++", "-c", str(source)]
    return _run_compiler(arguments, [repr(flags), *(path.read_text() for path in inputs)], ".o")


def _link(sources: list[tuple[Path, Path]], flags: tuple[str, ...], suffix: str) -> Path:
    """Compile every (source, its csrc) and link them. Earlier builds are reused."""
    with ThreadPoolExecutor(build_spec.num_cpus()) as pool:
        objects = [str(path) for path in pool.map(lambda item: _object(*item, flags), sources)]
    return _run_compiler([*flags, *objects], [repr(flags), *objects], suffix)


@functools.cache
def load() -> ModuleType:
    """The CUDA binding with kernels that run on the CPU, on CPU tensors. The device is 0, and the stream is 0."""
    includes = tuple(f"-I{path}" for path in build_spec.python_includes())
    flags = ("-O2", "-shared", *FLAGS, f"-DPYZERO_MODULE_NAME={MODULE}", *includes)
    path = _link([(CSRC / name, CSRC) for name in build_spec.cuda_sources()], flags, build_spec.EXT_SUFFIX)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(sanitizer: str, planted: Path | None = None) -> Path:
    """driver.cpp with the kernels. `planted`, a .cu in a changed copy of csrc, replaces the file of the same name."""
    names = [name for name in build_spec.cuda_sources() if name.endswith(".cu")]
    roots = {name: planted.parents[1] if planted and planted.name == Path(name).name else CSRC for name in names}
    sources = [(root / name, root) for name, root in roots.items()]
    # There is little optimisation, so that the compiler does not remove the access that a sanitizer should report. With
    # the address sanitizer's checks, -O1 takes three times as long to compile.
    flags = (
        "-O0" if "address" in sanitizer else "-O1",
        "-g1",
        *FLAGS,
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover",
        "-fno-omit-frame-pointer",
    )
    return _link([*sources, (SHIM / "driver.cpp", CSRC)], flags, "-driver")
