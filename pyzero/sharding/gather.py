"""Gather one parameter's values from every rank's part, and a DTensor from every rank's local tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.ops.rounding import ceil_div
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.local_param import LocalParam


def gather_param(group: Group, bucket: Bucket, position: int, shard: Tensor, elements_per_value: int = 1) -> Tensor:
    """Return the whole values of the parameter at `position`: (numel / elements_per_value,), rounded up. Collective.

    Every rank sends as much as the largest part.

    Args:
        group: The ranks that hold the bucket.
        bucket: The bucket.
        position: The parameter's position in the bucket.
        shard: (shard_numel / elements_per_value,) this rank's shard of the values.
        elements_per_value: 1, or GRANULE.
    """
    lengths = part_lengths(group.size, bucket, position, elements_per_value)
    in_shard, _ = bucket.shard_part(position)
    begin = in_shard.start // elements_per_value
    return gather_parts(group, shard[begin : begin + lengths[group.rank]], lengths)


def part_lengths(num_ranks: int, bucket: Bucket, position: int, elements_per_value: int = 1) -> list[int]:
    """Return how many values of the parameter at `position` each rank has."""
    bounds = (bucket.layout.overlap(bucket.layout.param_slots[position], rank) for rank in range(num_ranks))
    return [ceil_div(high - low, elements_per_value) for low, high in bounds]


def gather_parts(group: Group, part: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return every rank's (lengths[rank],) part, in rank order: (sum(lengths),). Collective."""
    padded = torch.nn.functional.pad(part, (0, max(lengths) - part.numel()))
    rows = group.gather_shards(padded, "the all-gather of a whole tensor").view(group.size, -1)
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def widen(bucket: Bucket, name: str, position: int, local: Tensor) -> Tensor:
    """Return a DTensor's whole tensor, from its local one; collective over its mesh. Return others as they are."""
    param = bucket.params[position]
    if not isinstance(param, LocalParam) or bucket.is_flat(name):
        return local
    return param.wrap(local.to(param.device)).full_tensor().to(local.device)
