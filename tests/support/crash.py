"""Strikes a writer of files at its 1st, 2nd, ... file operation: kills it or refuses the operation, until it succeeds.

    def test_old_or_new(tmp_path):
        def check(outcome):
            assert read(tmp_path) in (OLD, NEW)

        operations = strike_each(Fault.KILL, tmp_path, write, (tmp_path / "file",), prepare=..., check=check)
        assert "replace" in operations

The writer runs in processes forked from one that has torch, so `write` must be a function of a module's top level.
Operations are counted in `os`. Writes from Python are seen, because open() is replaced by the one written in Python
(_pyio), which calls `os`. Writes of a library from C or C++ are not seen: give it a file object.
With several ranks, each calls `armed(...)` around its own part.
"""

from __future__ import annotations

import _pyio
import builtins
import enum
import errno
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KILLED = 77  # exit status of a struck process
LIMIT = 2000  # operations: more than any tested writer makes
TIMEOUT_S = 60
_PRELOAD = ["torch.distributed.checkpoint", "pytest"]  # imported once instead of in each run
_BY_FD = ("write", "pwrite", "writev", "sendfile", "ftruncate", "fsync", "fdatasync", "posix_fallocate")
_BY_PATH = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "truncate")
_BY_TWO_PATHS = ("rename", "replace", "link", "symlink")
_FREEING = ("unlink", "remove", "rmdir")  # operations that a full disk still allows
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fault(enum.Enum):
    """What happens in place of an operation."""

    KILL = "kill"  # like SIGKILL: data given to the system stays, buffers of the process are lost
    POWER_CUT = "power cut"  # data that was not fsynced is lost too: such files are empty, under any name
    DISK_FULL = "disk full"  # ENOSPC from here on, except for operations that free space
    READ_ONLY = "read-only"  # EROFS from here on


@dataclass
class Outcome:
    """The outcome of one run."""

    fault: Fault
    number: int  # number of the struck operation, from 1
    operations: list[str]  # names, in order; the last was struck, unless the writer succeeded
    was_struck: bool
    error: BaseException | None  # raised by the writer


@dataclass
class _Disk:
    """Counts operations under `root`, and strikes one."""

    fault: Fault
    number: int
    root: str
    tell: Callable[[str], None]
    operations: list[str] = field(default_factory=list)
    was_struck: bool = False
    fds: set[int] = field(default_factory=set)  # descriptors of files under root
    unsynced: dict[tuple[int, int], int] = field(default_factory=dict)  # (device, inode) -> a descriptor of ours
    real: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def is_ours(self, path: Any, dir_fd: int | None = None) -> bool:
        if isinstance(path, int) or dir_fd is not None:
            return (path if dir_fd is None else dir_fd) in self.fds
        return (os.path.abspath(os.fsdecode(path)) + "/").startswith(self.root)

    def before(self, name: str) -> None:
        """Count the operation, and strike if it is its turn."""
        self.operations.append(name)
        self.tell(name)
        self.was_struck |= len(self.operations) == self.number
        if not self.was_struck or (self.fault is Fault.DISK_FULL and name in _FREEING):
            return
        if self.fault is Fault.POWER_CUT:
            for descriptor in self.unsynced.values():
                self.real["ftruncate"](descriptor, 0)
        if self.fault in (Fault.KILL, Fault.POWER_CUT):
            os._exit(KILLED)
        code = errno.ENOSPC if self.fault is Fault.DISK_FULL else errno.EROFS
        raise OSError(code, os.strerror(code), self.root)

    def by_fd(self, name: str) -> Callable[..., Any]:
        def operation(fd: int, *args: Any, **kwargs: Any) -> Any:
            if fd not in self.fds:
                return self.real[name](fd, *args, **kwargs)
            if name == "write" and len(self.operations) + 1 == self.number:  # half of it is written
                data = memoryview(args[0]).cast("B")
                self.real[name](fd, data[: len(data) // 2])
            self.before(name)
            result = self.real[name](fd, *args, **kwargs)
            stat = os.fstat(fd)
            if name in ("fsync", "fdatasync"):
                if (stat.st_dev, stat.st_ino) in self.unsynced:
                    self.real["close"](self.unsynced.pop((stat.st_dev, stat.st_ino)))
            elif (stat.st_dev, stat.st_ino) not in self.unsynced:
                self.unsynced[stat.st_dev, stat.st_ino] = os.dup(fd)
            return result

        return operation

    def by_path(self, name: str) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
            target = args[0] if args and name in _BY_TWO_PATHS else path
            if self.is_ours(path, kwargs.get("dir_fd")) or self.is_ours(target, kwargs.get("dir_fd")):
                self.before(name)
            return self.real[name](path, *args, **kwargs)

        return operation

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        is_ours = self.is_ours(path, kwargs.get("dir_fd"))
        if is_ours and flags & _WRITING:
            self.before("open")
        fd: int = self.real["open"](path, flags, *args, **kwargs)
        if is_ours:
            self.fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.fds.discard(fd)
        self.real["close"](fd)


@contextmanager
def armed(fault: Fault, number: int, root: Path, tell: Callable[[str], None] = lambda name: None) -> Iterator[_Disk]:
    """Inside, strike the `number`th operation under `root`, and each after it if the disk fails.

    tell: Called with the name of each operation, before it.
    """
    disk = _Disk(fault, number, os.path.abspath(root) + "/", tell)
    patched = {name: disk.by_fd(name) for name in _BY_FD if hasattr(os, name)}
    patched |= {name: disk.by_path(name) for name in _BY_PATH} | {"open": disk.open, "close": disk.close}
    disk.real = {name: getattr(os, name) for name in patched}
    opens = builtins.open, io.open
    try:
        for name, function in patched.items():
            setattr(os, name, function)
        builtins.open = io.open = _pyio.open
        yield disk
    finally:
        builtins.open, io.open = opens
        for name, function in disk.real.items():
            setattr(os, name, function)


def _run(pipe: Any, fault: Fault, number: int, root: Path, write: Callable[..., Any], args: tuple[Any, ...]) -> None:
    error = None
    with armed(fault, number, root, pipe.send) as disk:
        try:
            write(*args)
        except BaseException as raised:  # sent to the parent
            error = raised
    pipe.send((disk.was_struck, error))


def strike(fault: Fault, number: int, root: Path, write: Callable[..., Any], args: tuple[Any, ...]) -> Outcome:
    """Run write(*args) once in another process, and strike the `number`th operation under `root`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, fault, number, root, write, args))
    process.start()
    theirs.close()
    operations, end = [], (True, None)
    try:
        while ours.poll(TIMEOUT_S):
            message = ours.recv()
            if not isinstance(message, str):
                end = message
                break
            operations.append(message)
        else:
            process.kill()
            raise AssertionError(f"no file operation for {TIMEOUT_S} s after {operations}")
    except EOFError:
        process.join()
        assert process.exitcode == KILLED, f"the writer ended with status {process.exitcode} after {operations}"
    process.join()
    return Outcome(fault, number, operations, *end)


def strike_each(
    fault: Fault,
    root: Path,
    write: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    prepare: Callable[[], None],
    check: Callable[[Outcome], None],
    stride: int = 1,
) -> list[str]:
    """Strike each operation of write(*args), one per run; check after each. Skips the middle of many writes in a row.

    Args:
        fault: What happens at the operation.
        root: Operations under this folder count.
        write: A function of a module's top level.
        args: Its arguments, which are pickled.
        prepare: Restores the folder before each run.
        check: Asserts what must hold after each run.
        stride: 3 strikes every third operation.

    Returns:
        The names of all operations.
    """
    prepare()
    untouched = strike(fault, LIMIT, root, write, args)
    assert untouched.error is None and not untouched.was_struck, f"it fails by itself: {untouched.error!r}"
    names = untouched.operations
    for number in (*range(1, len(names) + 1, stride), len(names) + 1):  # the last run succeeds
        if names[number - 2 : number + 1] == ["write"] * 3:
            continue  # in the middle of many writes
        prepare()
        outcome = strike(fault, number, root, write, args)
        try:
            check(outcome)
        except Exception as error:
            where = f"{fault.value} at operation {number} of {outcome.operations}"
            raise AssertionError(f"{where}: {error}") from error
    return names
