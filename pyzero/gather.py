"""One parameter's values from every rank's shard."""

from __future__ import annotations

import torch
from torch import Tensor

from pyzero.buckets import Bucket
from pyzero.comm import Group


def gather_param(group: Group, bucket: Bucket, position: int, shard: Tensor, elements_per_value: int = 1) -> Tensor:
    """(numel / elements_per_value,), rounded up, of the parameter at `position`. Collective.

    Every rank sends as much as the largest part.

    Args:
        group: The ranks that hold the bucket.
        bucket: It.
        position: Of the parameter.
        shard: (shard_numel / elements_per_value,) this rank's.
        elements_per_value: 1, or GRANULE.
    """
    slot = bucket.layout.slots[position]
    lengths = []
    for rank in range(group.size):
        low, high = bucket.layout.overlap(slot, rank)
        lengths.append(-(-(high - low) // elements_per_value))
    in_shard, _ = bucket.shard_part(position)
    begin = in_shard.start // elements_per_value
    part = shard[begin : begin + lengths[group.rank]]
    padded = torch.nn.functional.pad(part, (0, max(lengths) - part.numel()))
    rows = group.gather_shards(padded, "the all-gather of a whole tensor").view(group.size, -1)
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])
