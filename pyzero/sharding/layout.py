"""The map from parameters to buckets and shards: only integers, no tensors, no communication.

A bucket is a flat sequence of parameters of one dtype and device, in the order in which backward is expected to finish
their gradients. In it, parameters that share hyper-parameters lie side by side; they are a run. Each parameter starts
at a multiple of `GRANULE` elements, so that matrix kernels see aligned weights. A bucket is padded until every rank's
shard is a multiple of `GRANULE` too. Only this file decides where shards are cut: at equal lengths, or between
parameters if the update rule needs them whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from pyzero.ops.backend import SEGMENT_GRANULE
from pyzero.ops.rounding import ceil_div, round_up

GRANULE = SEGMENT_GRANULE  # elements: where a parameter may start, and a shard end


class Cut(Enum):
    """Where an update rule lets a shard end."""

    ANYWHERE = auto()  # elements are updated one by one
    WHOLE = auto()  # each parameter lies on one rank


_CAP_MB, _MOST_CAP_MB = 25.0, 800.0
_ONE_RANK_CAP_BYTES = 256 << 20


def default_cap_mb(num_ranks: int, on_gpu: bool) -> float:
    """Return the MiB of weights in a bucket: 25; on GPUs 50 for 2 ranks, 100 for 8, 200 for 32, up to 800.

    A message is a bucket's part for one rank. In small messages latency would dominate (docs/scaling.md).
    """
    return min(_CAP_MB * math.sqrt(2 * num_ranks), _MOST_CAP_MB) if on_gpu and num_ranks > 1 else _CAP_MB


def cap_bytes(bucket_cap_mb: float | None, num_ranks: int, on_gpu: bool) -> int:
    """Return the bytes of weights in a bucket. At least 256 MiB on one GPU, where fewer buckets mean fewer launches."""
    asked = max(int((bucket_cap_mb or default_cap_mb(num_ranks, on_gpu)) * 2**20), 1)
    return max(asked, _ONE_RANK_CAP_BYTES) if num_ranks == 1 and on_gpu else asked


class Key(NamedTuple):
    """What parameters of one bucket have in common."""

    dtype: str
    device: str
    rule: str = ""  # name of the update rule
    cut: Cut = Cut.ANYWHERE  # the rule's


class RunKey(NamedTuple):
    """What parameters of one run have in common."""

    group_index: int  # of the optimizer's param_groups
    in_norm: bool  # its gradients count for the global norm on this rank


@dataclass(frozen=True)
class ParamSpec:
    """What the layout must know about a parameter."""

    number: int  # in the order of registration
    numel: int
    element_bytes: int
    key: Key  # only equal keys share a bucket
    run: RunKey = RunKey(0, True)
    padded_numel: int = 0  # elements of memory that it needs, if more than `numel`


@dataclass(frozen=True)
class ParamSlot:
    """Where a parameter lies in its bucket."""

    number: int
    offset: int  # elements, a multiple of GRANULE
    numel: int


@dataclass(frozen=True)
class Run:
    """Neighbours in a bucket that are updated, and counted for the norm, in the same way."""

    key: RunKey
    begin: int  # elements of the bucket, multiples of GRANULE
    end: int


@dataclass(frozen=True)
class ShardRun:
    """The part of a run that a shard holds: [low, high), in elements of the shard."""

    index: int  # among the bucket's runs
    key: RunKey
    low: int
    high: int


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: its parameters, and how it is cut."""

    key: Key
    param_slots: tuple[ParamSlot, ...]
    runs: tuple[Run, ...]  # without gaps
    shard_numel: int  # elements per rank, a multiple of GRANULE
    num_ranks: int

    @property
    def numel(self) -> int:
        """Elements of the whole bucket, padding included."""
        return self.shard_numel * self.num_ranks

    def shard_bounds(self, rank: int) -> tuple[int, int]:
        """Return [begin, end) of a rank's shard, in elements of the bucket."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def shard_runs(self, rank: int) -> list[ShardRun]:
        """Return the runs that a rank's shard holds a part of."""
        begin, end = self.shard_bounds(rank)
        clipped = [
            ShardRun(index, run.key, max(run.begin, begin) - begin, min(run.end, end) - begin)
            for index, run in enumerate(self.runs)
        ]
        return [run for run in clipped if run.low < run.high]

    def in_norm(self, position: int) -> bool:
        """Whether a parameter counts for the global norm on this rank."""
        offset = self.param_slots[position].offset
        return next(run.key.in_norm for run in self.runs if run.begin <= offset < run.end)

    def overlap(self, slot: ParamSlot, rank: int) -> tuple[int, int]:
        """Return [begin, end) of the part of a parameter in a rank's shard, in elements of the parameter."""
        begin, end = self.shard_bounds(rank)
        low = min(max(begin - slot.offset, 0), slot.numel)
        high = min(max(end - slot.offset, 0), slot.numel)
        return low, high

    def slot_end(self, position: int) -> int:
        """Return where a parameter's slot ends, with the gap after it."""
        return self.param_slots[position + 1].offset if position + 1 < len(self.param_slots) else self.numel

    def granule_owners(self, rank: int) -> list[tuple[int, int]]:
        """Return (position of the slot, number of granules) along a rank's shard. A gap counts for the slot before."""
        begin, end = self.shard_bounds(rank)
        runs = []
        for position, slot in enumerate(self.param_slots):
            low, high = max(slot.offset, begin), min(self.slot_end(position), end)
            if low < high:
                runs.append((position, (high - low) // GRANULE))
        return runs


def _size(spec: ParamSpec) -> int:
    """Return the elements of a parameter's slot. An empty parameter has its own slot too."""
    return max(round_up(max(spec.numel, spec.padded_numel), GRANULE), GRANULE)


def lay_out(specs: Sequence[ParamSpec], num_ranks: int) -> BucketLayout:
    """Lay out one bucket of these parameters, which share a key. Those of one run lie side by side."""
    cut = specs[0].key.cut
    ordered = sorted(specs, key=lambda spec: spec.run)  # stable: the given order inside a run
    sizes = [_size(spec) for spec in ordered]
    shard_numel = round_up(ceil_div(sum(sizes), num_ranks), GRANULE)
    if cut is Cut.WHOLE:
        shard_numel = _smallest_shard(sizes, num_ranks, shard_numel)
    slots: list[ParamSlot] = []
    starts: dict[RunKey, int] = {}
    offset = 0
    for spec, size in zip(ordered, sizes, strict=True):
        if cut is Cut.WHOLE and offset // shard_numel != (offset + size - 1) // shard_numel:
            offset = round_up(offset, shard_numel)
        starts.setdefault(spec.run, offset)
        slots.append(ParamSlot(spec.number, offset, spec.numel))
        offset += size
    ends = [*list(starts.values())[1:], shard_numel * num_ranks]
    runs = tuple(Run(key, begin, end) for (key, begin), end in zip(starts.items(), ends, strict=True))
    return BucketLayout(specs[0].key, tuple(slots), runs, shard_numel, num_ranks)


def _smallest_shard(sizes: Sequence[int], num_ranks: int, at_least: int) -> int:
    """Return the shortest shard, a multiple of GRANULE, with which `num_ranks` shards hold these whole, in order."""

    def fits(shard: int) -> bool:
        num_shards, left = 0, 0
        for size in sizes:
            if size > left:
                num_shards, left = num_shards + 1, shard
            left -= size
        return num_shards <= num_ranks

    low, high = max(at_least, max(sizes)) // GRANULE, sum(sizes) // GRANULE
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * GRANULE) else (middle + 1, high)
    return low * GRANULE


def plan(
    specs: Sequence[ParamSpec],
    bucket_cap_bytes: int,
    num_ranks: int,
    arrival: Sequence[int] | None = None,
) -> list[BucketLayout]:
    """Plan buckets of at most `bucket_cap_bytes` each (a larger parameter has its own bucket), in launch order.

    Buckets that are cut between parameters may be larger: they have room for the largest parameter on each rank, and
    spread the parameters evenly.

    Args:
        specs: The parameters.
        bucket_cap_bytes: Bytes of weights in a bucket.
        num_ranks: Number of shards.
        arrival: Numbers of the parameters in the order in which backward is expected to finish their gradients;
            default: the reverse of registration.

    Launch order is the order in which backward is expected to fill the buckets. It depends only on the arguments, so
    it is the same on all ranks.
    """
    if arrival is None:
        arrival = sorted((spec.number for spec in specs), reverse=True)
    by_number = {spec.number: spec for spec in specs}
    filling: dict[Key, list[ParamSpec]] = {}
    num_bytes: dict[Key, int] = {}
    full: list[tuple[int, BucketLayout]] = []  # (when the last of its parameters is expected, layout)
    arrives_as = {index: position for position, index in enumerate(arrival)}
    caps = {key: _cap(key, specs, bucket_cap_bytes, num_ranks) for key in {spec.key for spec in specs}}

    def close(key: Key) -> None:
        members = filling.pop(key)
        arrives = max(arrives_as[spec.number] for spec in members)
        if key.cut is Cut.WHOLE:
            members = _spread(members, num_ranks)
        full.append((arrives, lay_out(members, num_ranks)))

    for index in arrival:
        spec = by_number[index]
        size = spec.numel * spec.element_bytes
        if spec.key in filling and num_bytes[spec.key] + size > caps[spec.key]:
            close(spec.key)
        if spec.key not in filling:
            filling[spec.key], num_bytes[spec.key] = [], 0
        filling[spec.key].append(spec)
        num_bytes[spec.key] += size
    for key in list(filling):
        close(key)
    return [layout for _, layout in sorted(full, key=lambda item: item[0])]


def _cap(key: Key, specs: Sequence[ParamSpec], bucket_cap_bytes: int, num_ranks: int) -> int:
    """Return a bucket's bytes. Shards are as long as the longest, so few whole parameters would be mostly padding."""
    if key.cut is Cut.ANYWHERE or num_ranks == 1:
        return bucket_cap_bytes
    largest = max(spec.numel * spec.element_bytes for spec in specs if spec.key == key)
    return max(bucket_cap_bytes, num_ranks * largest)


def _spread(specs: Sequence[ParamSpec], num_ranks: int) -> list[ParamSpec]:
    """Return the parameters rank by rank. The largest is dealt first, each to the rank with the fewest elements."""
    shares: list[list[ParamSpec]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for spec in sorted(specs, key=lambda spec: -spec.numel):
        rank = loads.index(min(loads))
        shares[rank].append(spec)
        loads[rank] += _size(spec)
    return [spec for share in shares for spec in share]
