"""`python -m pyzero report`: what runs on this machine, what does not, and why. It builds nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pyzero

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pybind11")
_FAILURE_LINES = 6  # of a failed build: the command, and the compiler's first lines


def lines() -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"pyzero {pyzero.__version__} in {pyzero.__path__[0]}"
    if other := _hidden():
        yield f"another pyzero is installed in {other}; the above is used, as it is in a clone: cd elsewhere for it"
    yield f"python {platform.python_version()} ({sys.executable}) on {platform.platform()}"
    for name in PACKAGES:
        yield f"{name} {_version(name)}"
    try:
        import torch
    except ImportError as error:
        yield f"torch cannot be imported ({error}): nothing of pyzero runs without it; pip install torch"
        return
    wrong = list(_wrong_variables())
    if wrong:
        yield from ("", "environment variables", *(f"  {line}" for line in wrong))
    for title, section in (("GPUs", _gpus(torch)), ("compilers", _compilers()), ("native modules", _modules())):
        yield ""
        yield title
        yield from (f"  {line}" for line in section)
    for device_type in ("cpu", "cuda"):
        yield ""
        yield from _backends(device_type)


def _hidden() -> Path | None:
    """Return the folder of another pyzero that comes later on sys.path; None if there is none."""
    found = (PathFinder.find_spec("pyzero", [entry]) for entry in sys.path)
    folders = (Path(spec.origin).resolve().parent for spec in found if spec is not None and spec.origin is not None)
    used = Path(pyzero.__path__[0]).resolve()
    return next((folder for folder in folders if folder != used), None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _wrong_variables() -> Iterator[str]:
    """Yield a line for each environment variable with a wrong value."""
    from pyzero.ops import env

    readers: tuple[Callable[[], object], ...] = (
        env.build,
        env.cuda_archs,
        env.jit_enabled,
        env.default_backend,
        env.num_threads,
        env.max_jobs,
        env.cxx,
    )
    for read in readers:
        try:
            read()
        except ValueError as error:
            yield str(error)


def _gpus(torch: ModuleType) -> Iterator[str]:
    # torch.__version__ names the build (2.11.0+cu130), which the package's metadata may leave out.
    yield f"torch {torch.__version__} is built for CUDA {torch.version.cuda or '-'}, ROCm {torch.version.hip or '-'}"
    if not torch.cuda.is_available():
        yield "none that torch can use"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        yield f"{index}: {found.name}, {found.total_memory / 2**30:.0f} GiB, {capability}"


def _compilers() -> Iterator[str]:
    from pyzero.ops import build_spec, env

    finders: dict[str, Callable[[], tuple[str, ...]]] = {
        "C++": lambda: build_spec.find_cxx(env.cxx()),
        "CUDA": lambda: build_spec.find_nvcc(env.cuda_home()),
    }
    for name, find in finders.items():
        try:
            command = find()
            version = build_spec.compiler_version(command).splitlines()
            yield f"{name}: {' '.join(command)}: {next((line for line in version if 'release' in line), version[0])}"
        except (build_spec.ToolchainError, ValueError) as error:
            yield f"{name}: {error}"


def _modules() -> Iterator[str]:
    from pyzero.ops import build_spec, env, jit, native

    kinds: tuple[jit.Kind, ...] = ("cpu", "cuda")
    for kind in kinds:
        native.import_ahead_of_time(kind)  # a wheel built elsewhere may ask for libraries that are not here
        path, unusable = native.ahead_of_time_path(kind), native.unusable_reason(kind)
        if path is None:
            yield f"{kind}, ahead of time: not built"
        else:
            stamp = build_spec.read_stamp(path)
            yield f"{kind}, ahead of time: " + (unusable or f"{path}, build {stamp.build_hash if stamp else 'unknown'}")
        try:
            if reason := jit.unavailable_reason(kind):
                yield f"{kind}, at first use: cannot be built: {reason}"
                continue
            module = jit.module_path(jit.make_spec(kind), env.cache_dir())
            if failure := jit.import_failure(kind):
                yield f"{kind}, at first use: {failure}"
                continue
            if failure := jit.last_failure(kind):
                yield f"{kind}, at first use: the last build failed, and each start tries again, {module}"
                yield from (f"  {line}" for line in failure.splitlines()[:_FAILURE_LINES])
                continue
            yield f"{kind}, at first use: {'built' if module.exists() else 'would be built'}, {module}"
        except ValueError as error:
            yield f"{kind}, at first use: cannot be built: {error}"
        except (OSError, RuntimeError) as error:
            yield f"{kind}, at first use: would be built in the temporary directory: {error}"


def _failed_build(backend: str) -> str | None:
    """Return why a backend's next build or import will most likely fail, because the last one did; or None."""
    from pyzero.ops import jit, native

    kinds: tuple[jit.Kind, ...] = ("cpu", "cuda")
    for kind in kinds:
        needs_build = native.ahead_of_time_path(kind) is None or native.unusable_reason(kind) is not None
        if kind == backend and needs_build and jit.import_failure(kind):
            return "what was built at first use cannot be imported: see native modules"
        if kind == backend and needs_build and jit.last_failure(kind):
            return "the last build failed: see native modules"
    return None


def _reason(backend: str, device_type: str) -> str | ValueError | None:
    """Return why a backend does not run; None if it runs; a ValueError if using it raises that instead of going on."""
    from pyzero.ops import env, registry

    try:
        reason = registry.BACKENDS[backend].unavailable_reason(device_type) or _failed_build(backend)
        if backend == "cpu" and reason is None:
            env.num_threads()  # loading the backend reads it
    except ValueError as error:
        return error
    return reason


def _backends(device_type: str) -> Iterator[str]:
    from pyzero.ops import env, registry

    reasons = {name: _reason(name, device_type) for name in registry.BACKENDS}
    names, by, problem = [row.name for row in registry.ladder(device_type)], "", None
    try:
        asked = env.default_backend()
        if asked != "auto":
            names, by = [asked], ", as PYZERO_BACKEND says"
    except ValueError as error:
        problem = str(error)
    taken = next((name for name in names if not isinstance(reasons[name], str)), names[-1])
    if problem is None and reasons[taken] is not None:
        problem = f"{taken}: {reasons[taken]}"
    yield f"ops on {device_type} tensors (auto tries {', '.join(names)}{by})"
    auto = f"auto takes {taken}" if problem is None else "auto fails"
    states = [f"{name} {'no' if reason else 'available'}" for name, reason in reasons.items()]
    for op in registry.OPS:
        yield f"  {op + ':':20} {auto}; {', '.join(states)}"
    if problem is not None:
        yield f"  no auto: {problem}"
    for name, reason in reasons.items():
        if reason:
            yield f"  no {name}: {reason}"


def main() -> int:
    """Print the report."""
    for line in lines():
        print(line)
    return 0
