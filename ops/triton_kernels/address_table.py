"""Lists of tensors as one launch: a device table of (source, destination, numel) chunks, built once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import chunk_numel, is_aligned, is_interpreted

COLUMNS = 3  # source address, destination address, numel
_CAPACITY = 256  # tables; a training step uses a few, the same ones every step

Span = tuple[int, int, int]  # source address, destination address, numel: one tensor


@dataclass(frozen=True)
class AddressTable:
    """One row per program."""

    rows: Tensor  # (num_rows, COLUMNS) int64, on the device
    aligned: bool  # every source and destination address is a multiple of 16 bytes

    @property
    def num_rows(self) -> int:
        """Programs to launch."""
        return self.rows.shape[0]


@dataclass(frozen=True)
class _Resident:
    rows: Tensor  # int64, on the device
    staging: Tensor  # its pinned original: a captured graph copies from it again at each replay


_cache: OrderedDict[Hashable, _Resident] = OrderedDict()
_captured: dict[Hashable, _Resident] = {}


def pointer_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:  # (len(addresses),) int64
    """The addresses, on the device."""
    return _resident((addresses,), lambda: list(addresses), device)


def address_tables(
    spans: Sequence[Span], source_bytes: int, dest_bytes: int, device: torch.device
) -> list[AddressTable]:
    """Tables for the aligned spans and for the others (none where there are no such spans)."""
    filled = [span for span in spans if span[2] > 0]
    tables = []
    for aligned in (True, False):
        part = tuple(span for span in filled if is_aligned(span[0], span[1]) is aligned)
        if part:
            key = (part, source_bytes, dest_bytes)
            rows = _resident(key, partial(_rows, part, source_bytes, dest_bytes), device)
            tables.append(AddressTable(rows, aligned))
    return tables


def _rows(spans: tuple[Span, ...], source_bytes: int, dest_bytes: int) -> list[Span]:
    step = chunk_numel(sum(numel for _, _, numel in spans))
    return [
        (source + start * source_bytes, dest + start * dest_bytes, min(step, numel - start))
        for source, dest, numel in spans
        for start in range(0, numel, step)
    ]


def _resident(content: Hashable, build: Callable[[], list[Any]], device: torch.device) -> Tensor:
    if device.type != "cpu" and is_interpreted():
        raise RuntimeError(
            f"got tensors on {device}, wanted CPU tensors: the interpreter runs on the host and cannot follow their "
            "addresses; unset TRITON_INTERPRET"
        )
    # The stream is part of the key: another stream would not wait for this one's copy of the table.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, content)
    table = _captured.get(key) or _cache.get(key)
    if table is None:
        staging = torch.tensor(build(), dtype=torch.int64, pin_memory=device.type == "cuda")
        table = _Resident(staging.to(device, non_blocking=True), staging)
    # A graph replays with these addresses long after the cache has moved on, so what it saw is never dropped.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = table
        return table.rows
    _cache[key] = table
    _cache.move_to_end(key)
    if len(_cache) > _CAPACITY:
        _cache.popitem(last=False)
    return table.rows
