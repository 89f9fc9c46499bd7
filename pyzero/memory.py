"""Flat buffers. Large ones on a CPU lie in huge pages where the system has them.

A buffer that is made anew in every step costs a page fault for every 4 KiB that is first written, some 10 ms for 48 MB;
with pages of 2 MiB it is a fifth of that (docs/experiments.md), and nothing need be kept between steps to save it.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_SMALLEST_BYTES = 2 * _PAGE_BYTES  # below, rounding up to whole pages would cost too much


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(numel,) of any contents, as torch.empty."""
    return torch.empty(numel, dtype=dtype, device=device) if _is_small(numel, dtype, device) else _map(numel, dtype)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(numel,) zeros, as torch.zeros."""
    return torch.zeros(numel, dtype=dtype, device=device) if _is_small(numel, dtype, device) else _map(numel, dtype)


def _is_small(numel: int, dtype: torch.dtype, device: torch.device) -> bool:
    on_linux = hasattr(mmap, "MADV_HUGEPAGE")
    return device.type != "cpu" or numel * dtype.itemsize < _SMALLEST_BYTES or not on_linux


def _map(numel: int, dtype: torch.dtype) -> Tensor:
    """Fresh pages, which the system has zeroed; unmapped with the last tensor on them."""
    num_bytes = -(-numel * dtype.itemsize // _PAGE_BYTES) * _PAGE_BYTES
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a wish: EINVAL from a kernel without huge pages, and small ones will do
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=numel)
