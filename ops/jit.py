"""Build a native module at first use: once for all processes with the same cache folder, and never half a file."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, TextIO

from . import build_spec, env
from .build_spec import CompileError, Spec, ToolchainError

try:
    import fcntl
except ImportError:  # not POSIX: without a lock several processes may compile, and the last rename wins
    fcntl = None  # type: ignore[assignment]

Kind = Literal["cpu", "cuda"]
_SECONDS = {"cpu": 15, "cuda": 30}  # told to the user; measured with 2 cores and one CUDA architecture
_PATIENCE_S = 120  # of a process that waits for another one's build

log = logging.getLogger("pyzero")


class JitError(RuntimeError):
    """Kernels could not be built at first use. The message has the reason or the compiler's output, and the remedy."""


def make_spec(kind: Kind) -> Spec:
    """Return the spec for this machine. Raises ToolchainError if something is missing."""
    if kind == "cpu":
        return build_spec.cpu_spec(build_spec.find_cxx(env.cxx()))
    nvcc = build_spec.find_nvcc(env.cuda_home())
    return build_spec.cuda_spec(nvcc, env.cuda_archs() or present_cuda_archs())


def present_cuda_archs() -> tuple[str, ...]:
    """Return the architectures of the visible GPUs, as in ("90",). Raises ToolchainError if there is none."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ToolchainError("no NVIDIA GPU that this torch can use; set PYZERO_CUDA_ARCHS to build without one")
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))


def unavailable_reason(kind: Kind) -> str | None:
    """Return why load() cannot even try, or None. Builds nothing."""
    if not env.jit_enabled():
        return "building at first use is switched off by PYZERO_JIT=0"
    try:
        return driver_reason(make_spec(kind).toolkit)
    except (ToolchainError, OSError) as error:
        return str(error)


def driver_reason(toolkit: str) -> str | None:
    """Return why this machine's driver cannot run the kernels that a CUDA toolkit builds, or None."""
    wanted = build_spec.needed_driver(toolkit)
    if not wanted:
        return None
    import torch

    get_version = getattr(torch._C, "_cuda_getDriverVersion", None)  # only in a torch with CUDA
    got = get_version() if get_version is not None else 0  # 0: there is no driver
    if not 0 < got < wanted:
        return None
    return (
        f"kernels built by CUDA {toolkit} need a driver for CUDA {_spell_version(wanted)} (530), got one for CUDA "
        f"{_spell_version(got)}; update the driver, or build with a toolkit before {_spell_version(wanted)} (CUDA_HOME)"
    )


def _spell_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def last_failure(kind: Kind) -> str | None:
    """Return the command and output of a failed build, unless a later one succeeded; or None. Not cheap."""
    with contextlib.suppress(OSError, RuntimeError):  # nothing noted, or nothing to build with
        module = module_path(make_spec(kind), env.cache_dir())
        return None if module.exists() else _note_of_failure(module).read_text(encoding="utf-8", errors="replace")
    return None


def import_failure(kind: Kind) -> str | None:
    """Return why the module that was built at first use cannot be imported; None if it can, or if there is none."""
    with contextlib.suppress(OSError, RuntimeError):  # nothing to build with, or no home folder
        spec = make_spec(kind)
        module = module_path(spec, env.cache_dir())
        if module.exists():
            try:
                import_file(spec.name, module)
            except JitError as error:
                return str(error)
    return None


def load(kind: Kind) -> ModuleType:
    """Return the module for this machine. Build it if the cache folder lacks it. Raises JitError."""
    if reason := unavailable_reason(kind):
        raise JitError(f"cannot build the {kind} kernels: {reason}")
    spec = make_spec(kind)
    try:
        return import_file(spec.name, build(spec, _SECONDS[kind]))
    except OSError as error:
        raise JitError(
            f"cannot build the {kind} kernels: {error}; set PYZERO_CACHE_DIR to a folder with room, or pip "
            f"install pyzero where there is a compiler"
        ) from error


def import_file(name: str, path: Path) -> ModuleType:
    """Import the extension module pyzero.<name> from a file of any name. Raises JitError."""
    found = importlib.util.spec_from_file_location(f"pyzero.{name}", path)
    assert found is not None and found.loader is not None
    try:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except ImportError as error:
        raise JitError(
            f"cannot import {path}: {error}; remove the file to have it built again, or, where its file system is "
            f"mounted noexec, set PYZERO_CACHE_DIR to a folder on another"
        ) from error
    sys.modules[f"pyzero.{name}"] = module
    return module


def module_path(spec: Spec, folder: Path) -> Path:
    """Return the module's path in a cache folder."""
    return folder / f"{spec.name}-{spec.build_hash()}{build_spec.EXT_SUFFIX}"


def build(spec: Spec, seconds: int = 0) -> Path:
    """Return the path of the built module. Compiles at most once per cache folder. Raises JitError."""
    with contextlib.suppress(OSError, RuntimeError):  # the folder cannot be read, or the user has no home folder
        module = module_path(spec, env.cache_dir())
        if module.exists():  # a read-only cache will do if another user has filled it
            return module
    module = module_path(spec, _writable_folder())
    with _locked(module.with_suffix(".lock")) as is_alone:
        if module.exists():  # another process was faster
            return module
        leftovers = module.parent.glob(f"{module.stem}.*.build") if is_alone else ()  # from builds that were killed
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        log.warning("building %s with %s, once; about %d s", spec.name, spec.compiler[0], seconds)
        _build_into(spec, module)
    return module


def _note_of_failure(module: Path) -> Path:
    """Return the file that `last_failure` reads. Later builds ignore it: the cause may be gone under the same name."""
    return module.with_suffix(".failed")


def _build_into(spec: Spec, module: Path) -> None:
    folder = tempfile.mkdtemp(prefix=f"{module.stem}.", suffix=".build", dir=module.parent)
    try:
        unfinished = Path(folder, module.name)
        spec.build(Path(folder), unfinished, env.max_jobs())
        _fsync(unfinished)  # otherwise a power cut could leave an empty file under the final name
        unfinished.replace(module)
        with contextlib.suppress(OSError):
            _note_of_failure(module).unlink()
    except CompileError as error:
        with contextlib.suppress(OSError):  # the compiler's error is the one to show
            _note_of_failure(module).write_text(f"{error}\n", encoding="utf-8", errors="replace")
        raise JitError(
            f"building {spec.name} failed:\n{error}\n"
            "Remedy: if a disk is full, make room or set PYZERO_CACHE_DIR and TMPDIR; else try another compiler (CXX, "
            'CUDA_HOME), or do without (backend="reference" or PYZERO_JIT=0).'
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock that the kernel releases when its holder dies. Yield whether it holds one."""
    try:
        file = path.open("a")
    except PermissionError:  # another user who shares the folder has made it
        file = path.open("r")
    with file:
        yield fcntl is not None and _flock(file, path.stem)


def _flock(file: TextIO, name: str) -> bool:
    """Lock a file. Return False if the file system has no locks; then several processes may compile at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process to build %s", name)
        text = "still waiting for another process to build %s: end it, or set PYZERO_CACHE_DIR to another folder"
        impatience = threading.Timer(_PATIENCE_S, log.warning, (text, name))
        impatience.daemon = True
        impatience.start()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        finally:
            impatience.cancel()
    except OSError:
        return False
    return True


def _writable_folder() -> Path:
    """Return the cache folder, or one in the temporary directory if the cache cannot be written."""
    try:
        wanted = env.cache_dir()
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except (OSError, RuntimeError) as error:
        folder = _temporary_folder()
        log.warning("cannot write to the cache (%s): building in %s; set PYZERO_CACHE_DIR", error, folder)
        return folder


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"pyzero-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="pyzero-"))  # another user has that folder: never load code from there
