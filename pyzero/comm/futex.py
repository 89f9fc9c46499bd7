"""A counter in shared memory that other processes can wait for, by Linux's futex. It needs no compiled code."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import sys
from typing import Any

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_LOADS_IN_ORDER = platform.machine() == "x86_64"
_WAIT, _WAKE_OP = 0, 5
_ALL = 2**31 - 1
_NUM_VALUES = 2**32
_OP_ADD = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def unsupported_reason() -> str | None:
    """Return why futexes cannot be used here; None if they can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no futex of Linux"
    if platform.machine() not in _SYS_FUTEX or sys.maxsize < 2**32:
        return f"the number of the futex system call on {platform.machine()} is not known"
    return None


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _futex(address: int, operation: int, value: int, fourth: Any, other: int, sixth: int) -> int:
    """Make the system call without the interpreter's lock. Return its error number, or 0."""
    failed = _libc().syscall(
        ctypes.c_long(_SYS_FUTEX[platform.machine()]),
        ctypes.c_void_p(address),
        ctypes.c_int(operation),
        ctypes.c_uint32(value),
        fourth,
        ctypes.c_void_p(other),
        ctypes.c_uint32(sixth),
    )
    return ctypes.get_errno() if failed < 0 else 0


class Counter:
    """A 32-bit counter in shared memory. One process advances it, and all may wait for it. It wraps around."""

    def __init__(self, pages: mmap.mmap, offset: int) -> None:
        self._word = ctypes.c_uint32.from_buffer(pages, offset)
        self._address = ctypes.addressof(self._word)

    def advance(self, by: int = 1) -> None:
        """Add up to 2047, and wake waiting processes. If they see the sum, they see this process's earlier writes."""
        # The kernel adds, atomically, because Python cannot order its store after those to the data on every CPU.
        code = _OP_ADD << 28 | by << 12
        failed = _futex(self._address, _WAKE_OP, _ALL, ctypes.c_long(0), self._address, code)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def has_reached(self, number: int) -> bool:
        """Whether the count has reached a number that is less than 2^31 away."""
        if (self._word.value - number) % _NUM_VALUES >= _NUM_VALUES // 2:
            return False
        if not _LOADS_IN_ORDER:  # pragma: no cover
            self.advance(0)  # a barrier: later reads see writes before the count
        return True

    def wait(self, number: int, timeout_s: float) -> bool:
        """Sleep until the count has reached a number or the time is up, or wake early. Return whether it has."""
        seen = self._word.value
        if self.has_reached(number):
            return True
        limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        failed = _futex(self._address, _WAIT, seen, ctypes.byref(limit), 0, 0)
        if failed not in (0, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(failed, os.strerror(failed))
        return self.has_reached(number)
