"""Lists of tensors as one launch: a device table of (source, destination, numel) chunks, built once and kept."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from ..streams import current_stream
from .common import ALIGN_BYTES, chunk_numel, is_interpreted

COLUMNS: tl.constexpr = tl.constexpr(3)  # source address, destination address, numel
_CAPACITY = 256  # tables; a training step uses a few, the same ones every step

Span = tuple[int, int, int]  # source address, destination address, numel: one tensor
T = TypeVar("T")


@dataclass(frozen=True)
class AddressTable:
    """One row per program."""

    rows: Tensor  # (num_rows, COLUMNS) int64, on the device
    aligned: bool  # every source and destination address is a multiple of 16 bytes

    @property
    def num_rows(self) -> int:
        """Programs to launch."""
        return self.rows.shape[0]


class Upload:
    """Copies to a device that a launch on the present stream may read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.staging: list[Tensor] = []  # pinned originals: a captured graph copies from them again at each replay

    def __call__(self, staging: Tensor) -> Tensor:
        """The host's int64 numbers, on the device."""
        if self._device.type == "cuda":
            pinned = _for_captures.take(staging.numel()) if torch.cuda.is_current_stream_capturing() else None
            staging = staging.pin_memory() if pinned is None else pinned.view(staging.shape).copy_(staging)
            _for_captures.reserve()
        self.staging.append(staging)
        return staging.to(self._device, non_blocking=True)


class _PinnedReserve:
    """Pinned memory that is there before a capture, in which none is to be had. What is taken is never given back."""

    NUM_BYTES = 8 << 20

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.int64, device="cpu")
        self._is_made = False

    def reserve(self) -> None:
        if not self._is_made and not torch.cuda.is_current_stream_capturing():
            self._left = torch.empty(self.NUM_BYTES // 8, dtype=torch.int64, device="cpu", pin_memory=True)
            self._is_made = True

    def take(self, numel: int) -> Tensor:
        if numel > self._left.numel():
            remedy = "capture fewer graphs" if self._is_made else "call the op once before the capture"
            raise RuntimeError(
                f"expected pinned memory for {numel} addresses in the capture of a CUDA graph, got it for "
                f"{self._left.numel()}; {remedy}"
            )
        taken, self._left = self._left[:numel], self._left[numel:]
        return taken


_for_captures = _PinnedReserve()


@dataclass(frozen=True)
class _CacheEntry(Generic[T]):
    value: T
    staging: list[Tensor]


_cache: OrderedDict[Hashable, _CacheEntry[Any]] = OrderedDict()
# A graph replays with these addresses long after the cache has moved on, so what it saw is never dropped.
_captured: list[_CacheEntry[Any]] = []


def cached(content: Hashable, build: Callable[[Upload], T], device: torch.device) -> T:
    """What `build` made of this content on this device and stream, now or earlier."""
    if device.type != "cpu" and is_interpreted():
        raise RuntimeError(
            f"expected CPU tensors, got tensors on {device}: the interpreter runs on the host and cannot follow their "
            "addresses; unset TRITON_INTERPRET"
        )
    # The stream is part of the key: another stream would not wait for this one's copy of the table.
    on_gpu = device.type == "cuda"
    stream = current_stream(device) if on_gpu else 0
    key = (device, stream, content)
    found: _CacheEntry[T] | None = _cache.get(key)
    if found is None:
        upload = Upload(device)
        found = _CacheEntry(build(upload), upload.staging)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured.append(found)  # and not in the cache: it is empty until its own graph replays
        return found.value
    # Other threads may do the same in between: move_to_end() would fail for a key that one of them has dropped.
    _cache.pop(key, None)
    _cache[key] = found
    if len(_cache) > _CAPACITY:
        _cache.popitem(last=False)
    return found.value


def pointer_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:  # (len(addresses),) int64
    """The addresses, on the device."""
    return cached(addresses, lambda upload: upload(_on_host(addresses)), device)


def address_tables(spans: Sequence[Span], source_bytes: int, dest_bytes: int, upload: Upload) -> list[AddressTable]:
    """Tables for the aligned spans and for the others (none where there are no such spans)."""
    if not spans:
        return []
    table = _on_host(chain.from_iterable(spans)).view(-1, COLUMNS.value)
    source, dest, numel = table.unbind(1)
    is_filled, is_aligned = numel > 0, (source | dest) % ALIGN_BYTES == 0
    tables = []
    for aligned in (True, False):
        part = table[is_filled & (is_aligned == aligned)]
        if len(part):
            tables.append(AddressTable(upload(_rows(part, source_bytes, dest_bytes)), aligned))
    return tables


def _on_host(numbers: Iterable[int]) -> Tensor:
    """Not torch.tensor(), which takes 70 ns for each."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _rows(spans: Tensor, source_bytes: int, dest_bytes: int) -> Tensor:  # (num_chunks, COLUMNS) int64
    """A row per chunk. Gradients may lie elsewhere in every step, so that this is done in each."""
    source, dest, numel = spans.unbind(1)
    step = chunk_numel(int(numel.sum()))
    counts = (numel + step - 1).div(step, rounding_mode="floor")
    span = torch.arange(len(spans), device="cpu").repeat_interleave(counts)
    start = (torch.arange(len(span), device="cpu") - (counts.cumsum(0) - counts)[span]) * step
    rest = (numel[span] - start).clamp(max=step)
    return torch.stack((source[span] + start * source_bytes, dest[span] + start * dest_bytes, rest), 1)
