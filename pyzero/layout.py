"""The map from parameters to buckets and shards: integers only, no tensors, no communication.

A bucket is a flat run of parameters of one group, dtype and device, in reverse order of registration, which is roughly
the order in which backward finishes their gradients. Each parameter starts at a multiple of `GRANULE` elements, so that
matrix kernels see aligned weights. A bucket is padded until every rank's shard is a multiple of it too. Only this file
decides where a shard is cut; Adam takes any cut, so shards are cut at equal lengths whatever lies there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

GRANULE = 64  # elements; SEGMENT_GRANULE of pyzero.ops.adam


class Key(NamedTuple):
    """What parameters of one bucket have in common."""

    group_index: int
    dtype: str
    device: str
    counts: bool  # for the norm


@dataclass(frozen=True)
class ParamSpec:
    """What the layout must know of a parameter."""

    index: int  # its place in the order of registration
    numel: int
    element_bytes: int
    key: Key  # only equal keys share a bucket


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket."""

    index: int
    offset: int  # elements, a multiple of GRANULE
    numel: int


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: its parameters, and how it is cut."""

    key: Key
    slots: tuple[Slot, ...]
    shard_numel: int  # elements per rank, a multiple of GRANULE
    num_ranks: int

    @property
    def numel(self) -> int:
        """Elements of the whole bucket, padding included."""
        return self.shard_numel * self.num_ranks

    def shard_bounds(self, rank: int) -> tuple[int, int]:
        """[begin, end) of a rank's shard, in elements of the bucket."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def overlap(self, slot: Slot, rank: int) -> tuple[int, int]:
        """[begin, end) of the part of a parameter that a rank's shard holds, in elements of the parameter."""
        begin, end = self.shard_bounds(rank)
        low = min(max(begin - slot.offset, 0), slot.numel)
        high = min(max(end - slot.offset, 0), slot.numel)
        return low, high

    def granule_owners(self, rank: int) -> list[tuple[int, int]]:
        """Runs of (position of the slot, number of granules) over a rank's shard; a gap goes to the slot before."""
        begin, end = self.shard_bounds(rank)
        runs = []
        for position, slot in enumerate(self.slots):
            stop = self.slots[position + 1].offset if position + 1 < len(self.slots) else self.numel
            low, high = max(slot.offset, begin), min(stop, end)
            if low < high:
                runs.append((position, (high - low) // GRANULE))
        return runs


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _finish(key: Key, specs: Sequence[ParamSpec], num_ranks: int) -> BucketLayout:
    slots = []
    offset = 0
    for spec in specs:
        slots.append(Slot(spec.index, offset, spec.numel))
        offset += max(_round_up(spec.numel, GRANULE), GRANULE)  # an empty parameter has a slot of its own too
    return BucketLayout(key, tuple(slots), _round_up(-(-offset // num_ranks), GRANULE), num_ranks)


def plan(specs: Sequence[ParamSpec], bucket_cap_bytes: int, num_ranks: int) -> list[BucketLayout]:
    """Buckets of at most `bucket_cap_bytes` each (a larger parameter has one of its own), in launch order.

    Launch order is the order in which backward is expected to fill them: the bucket whose last-filled parameter was
    registered last comes first. It depends on nothing but the arguments, so it is the same on all ranks.
    """
    open_specs: dict[Key, list[ParamSpec]] = {}
    open_bytes: dict[Key, int] = {}
    layouts = []
    for spec in sorted(specs, key=lambda spec: -spec.index):
        size = spec.numel * spec.element_bytes
        if open_specs.get(spec.key) and open_bytes[spec.key] + size > bucket_cap_bytes:
            layouts.append(_finish(spec.key, open_specs.pop(spec.key), num_ranks))
            open_bytes[spec.key] = 0
        open_specs.setdefault(spec.key, []).append(spec)
        open_bytes[spec.key] = open_bytes.get(spec.key, 0) + size
    layouts += [_finish(key, left, num_ranks) for key, left in open_specs.items()]
    return sorted(layouts, key=lambda layout: -min(slot.index for slot in layout.slots))
