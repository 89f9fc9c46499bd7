"""Flat buffers, on their device or in pinned host memory. Large ones on a CPU lie in huge pages.

The first write to each 4 KiB of a new buffer is a page fault. A buffer of 48 MB made in every step costs some 10 ms.
With pages of 2 MiB it costs a fifth, and nothing if the pages of a freed buffer are reused (docs/experiments.md).
The pages of buffers without an owner are kept up to 64 MiB, about as much as malloc keeps.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pyzero.ops.rounding import round_up
from pyzero.streams import on_device

_PAGE_BYTES = 2 << 20
_KEPT_BYTES = 64 << 20
_SMALLEST_BYTES = 2 * _PAGE_BYTES  # for smaller buffers, rounding up to whole pages would cost too much


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (numel,) of any contents, as torch.empty does."""
    return _shared.empty(numel, dtype, device)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (numel,) zeros, as torch.zeros does. For buffers that stay: their end lies in small pages."""
    if _is_small(numel, dtype, device):
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.frombuffer(_map(numel * dtype.itemsize), dtype=dtype, count=numel)


def alias(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory, with another storage. torch exports only from the current GPU."""
    with on_device(tensor.device):
        return from_dlpack(tensor)


def pinned(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (numel,) zeros in pinned host memory, as a CUDA tensor. Kernels read and write it over the bus.

    Raises:
        RuntimeError: The host cannot pin that much memory.
    """
    if not numel:
        return torch.zeros(0, dtype=dtype, device=device)
    pages = _PinnedPages(_whole_pages(numel * dtype.itemsize), device)
    return torch.as_tensor(pages, device=device)[: numel * dtype.itemsize].view(dtype)


class _PinnedPages:
    """Whole pages, pinned while a tensor lies on them. torch's pinned memory is rounded up to a power of two."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._pages = _map(num_bytes)
        # A fork copies pinned memory at once, so each worker of a data loader would copy all masters and state.
        self._pages.madvise(mmap.MADV_DONTFORK)
        self._address = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(self._address, num_bytes, 0)
            if int(error) != 0:
                raise RuntimeError(
                    f"expected {num_bytes:,} bytes of the host's memory to pin, got error {error} of the driver; "
                    f"free memory, raise the container's limit, or pass cpu_offload=False"
                )
        weakref.finalize(self, _unpin, self._pages, self._address, device).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Describe the memory to torch.as_tensor, whose tensor keeps this object alive."""
        shape, place = (len(self._pages),), (self._address, False)
        return {"shape": shape, "typestr": "|u1", "data": place, "strides": None, "version": 2}


def _unpin(pages: mmap.mmap, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a kernel may still use them
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def _is_small(numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    on_linux = hasattr(mmap, "MADV_HUGEPAGE")
    return device.type != "cpu" or numel * dtype.itemsize < _SMALLEST_BYTES or not on_linux


def _whole_pages(num_bytes: int) -> int:
    return round_up(num_bytes, _PAGE_BYTES)


def _map(num_bytes: int) -> mmap.mmap:
    """Map fresh pages, zeroed by the system."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # EINVAL from a kernel without huge pages: small ones will do
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def pooled_bytes(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that `PagePool.of_one` keeps of a freed buffer."""
    return 0 if _is_small(numel, dtype, device) else _whole_pages(numel * dtype.itemsize)


class PagePool:
    """The pages of an owner's freed buffers, for its next ones. They are freed with the pool.

    Args:
        kept_bytes: Of freed pages that are kept, at most. Those freed last stay.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._pages: list[mmap.mmap] = []  # those freed last at the end

    @staticmethod
    def of_one(numel: int, dtype: torch.dtype) -> PagePool:
        """Return a pool that keeps the pages of one buffer of this size."""
        return PagePool(_whole_pages(numel * dtype.itemsize))

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return (numel,) of any contents. When its last tensor is freed, the next one of that size gets the pages."""
        if _is_small(numel, dtype, device):
            return torch.empty(numel, dtype=dtype, device=device)
        num_bytes = _whole_pages(numel * dtype.itemsize)
        pages = self._take(num_bytes) or _map(num_bytes)
        view = memoryview(pages)
        weakref.finalize(view, self._put, pages).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=numel)

    def _take(self, num_bytes: int) -> mmap.mmap | None:
        for pages in reversed(self._pages.copy()):
            if len(pages) == num_bytes:
                with contextlib.suppress(ValueError):  # a finalizer may run at any moment and drop them
                    self._pages.remove(pages)
                    return pages
        return None

    def _put(self, pages: mmap.mmap) -> None:
        if len(pages) > self._kept_bytes:
            return
        self._pages.append(pages)
        while sum(map(len, self._pages)) > self._kept_bytes:
            del self._pages[:1]


_shared = PagePool(_KEPT_BYTES)
