"""Lists of tensors as one launch: a device table of (source, destination, numel) chunks, built once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..streams import current_stream
from .common import chunk_numel, is_aligned, is_interpreted

COLUMNS = 3  # source address, destination address, numel
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
        self.staging: list[Tensor] = []  # pinned originals, kept until they have been copied

    def __call__(self, numbers: Sequence[Any]) -> Tensor:
        """The int64 numbers, on the device."""
        self.staging.append(torch.tensor(numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda"))
        return self.staging[-1].to(self._device, non_blocking=True)


@dataclass(frozen=True)
class _Kept(Generic[T]):
    value: T
    staging: list[Tensor]


_cache: OrderedDict[tuple[torch.device, int, Hashable], _Kept[Any]] = OrderedDict()
_captured: dict[tuple[torch.device, Hashable], _Kept[Any]] = {}


def kept(content: Hashable, build: Callable[[Upload], T], device: torch.device) -> T:
    """What `build` made of this content on this device and stream, now or earlier."""
    if device.type != "cpu" and is_interpreted():
        raise RuntimeError(
            f"got tensors on {device}, wanted CPU tensors: the interpreter runs on the host and cannot follow their "
            "addresses; unset TRITON_INTERPRET"
        )
    # The stream is part of the key: another stream would not wait for this one's copy of the table.
    on_gpu = device.type == "cuda"
    stream = current_stream(device) if on_gpu else 0
    key = (device, stream, content)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        value: T = _kept_for_capture(content, device)
        return value
    found: _Kept[T] | None = _cache.get(key)
    if found is None:
        upload = Upload(device)
        found = _Kept(build(upload), upload.staging)
    _cache[key] = found
    _cache.move_to_end(key)
    if len(_cache) > _CAPACITY:
        _cache.popitem(last=False)
    return found.value


def _kept_for_capture(content: Hashable, device: torch.device) -> Any:
    """What an eager call made on any stream: pinned memory is not to be had while a graph is captured.

    The graph replays with these addresses long after the cache has moved on, so it is never dropped.
    """
    found = _captured.get((device, content))
    if found is None:
        found = next((k for (on, _, what), k in _cache.items() if on == device and what == content), None)
    if found is None:
        raise RuntimeError(
            "expected a list of tensors that was seen before the capture of a CUDA graph, got another; call the op "
            "once with the same tensors, then capture"
        )
    _captured[device, content] = found
    return found.value


def pointer_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:  # (len(addresses),) int64
    """The addresses, on the device."""
    return kept(addresses, lambda upload: upload(addresses), device)


def address_tables(spans: Sequence[Span], source_bytes: int, dest_bytes: int, upload: Upload) -> list[AddressTable]:
    """Tables for the aligned spans and for the others (none where there are no such spans)."""
    tables = []
    for aligned in (True, False):
        part = [span for span in spans if span[2] > 0 and is_aligned(span[0], span[1]) is aligned]
        if part:
            tables.append(AddressTable(upload(_rows(part, source_bytes, dest_bytes)), aligned))
    return tables


def _rows(spans: Sequence[Span], source_bytes: int, dest_bytes: int) -> list[Span]:
    step = chunk_numel(sum(numel for _, _, numel in spans))
    return [
        (source + start * source_bytes, dest + start * dest_bytes, min(step, numel - start))
        for source, dest, numel in spans
        for start in range(0, numel, step)
    ]
