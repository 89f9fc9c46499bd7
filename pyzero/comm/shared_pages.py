"""Pages of an in-memory file that several processes have mapped. They are huge pages if the system makes them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1: make huge pages now, whatever /sys/kernel/mm/transparent_hugepage/shmem_enabled is
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value


class SharedPages:
    """The first bytes of an in-memory file, mapped.

    Raises:
        OSError: They cannot be mapped.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._begin = 0  # in `pages`
        if num_bytes < _HUGE_PAGE_BYTES:
            self.pages = mmap.mmap(descriptor, num_bytes)
            return
        # Huge pages lie at multiples of their size. So reserve a larger range, and map the file over an aligned part.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags)
        address = torch.frombuffer(self.pages, dtype=torch.uint8).data_ptr()
        self._begin = -address % _HUGE_PAGE_BYTES
        _map_over(address + self._begin, num_bytes, descriptor)
        for advice in (mmap.MADV_HUGEPAGE, _MADV_COLLAPSE):
            with contextlib.suppress(OSError):  # small pages will do
                self.pages.madvise(advice, self._begin, num_bytes)

    def tensor(self, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a (numel,) tensor over the bytes from `offset` on."""
        return torch.frombuffer(self.pages, dtype=dtype, count=numel, offset=self._begin + offset)


def _map_over(address: int, num_bytes: int, descriptor: int) -> None:
    """Map a file over pages of this process. Unmapping these unmaps the file too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if libc.mmap(address, num_bytes, protection, flags, descriptor, 0) == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
