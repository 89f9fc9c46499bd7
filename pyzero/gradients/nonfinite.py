"""The first parameter with an inf or a NaN in its gradient, and the rank that had it: found and sent as one number.

The number is parameter * (num_ranks + 1) + rank, so that the smallest of all ranks' is the first; the rank is num_ranks
where it is not known, and the number is inf where nothing was found. Ranks are those of the group that shares state, or
of all processes, where DTensors say that others hold other parts of the same parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import GRANULE

NOT_FOUND = math.inf


class RankNames(NamedTuple):
    """The numbers by which codes name the ranks of a group."""

    of_group: tuple[int, ...]
    num_ranks: int  # above all of them


def decode(code: float, num_ranks: int) -> tuple[int | None, int | None]:
    """The parameter's number and the rank; None for what is not known."""
    if math.isinf(code):
        return None, None
    number, rank = divmod(int(code), num_ranks + 1)
    return number, rank if rank < num_ranks else None


def locate_in_slices(bucket: Bucket, slices: list[Tensor], names: RankNames, by_rank: bool) -> Tensor:
    """(1,) fp64: the code of the first bad parameter in what was received for this rank's shard of a bucket.

    Args:
        bucket: The bucket.
        slices: (shard_numel,) each.
        names: Of the ranks.
        by_rank: slices[r] is rank r's; else the one slice is a sum over ranks.
    """
    numbers = bucket.numbers_on_device[bucket.segment_ids.long()]
    codes = []
    for place, piece in enumerate(slices):
        rank = names.of_group[place] if by_rank else names.num_ranks
        is_bad = ~torch.isfinite(piece).view(-1, GRANULE).all(1)
        code = numbers * (names.num_ranks + 1) + rank
        codes.append(code.masked_fill_(~is_bad, NOT_FOUND).min())
    return torch.stack(codes).min().reshape(1)


def locate_in_grads(numbers: Tensor, grads: Sequence[Tensor | None], rank: int, num_ranks: int) -> Tensor:
    """0-D fp64: the code of the first bad parameter among this rank's own gradients of a bucket.

    Args:
        numbers: (num_params,) fp64, of the parameters.
        grads: By position; None or empty where there is none.
        rank: This one.
        num_ranks: Of the group.
    """
    present = [grad for grad in grads if grad is not None and grad.numel()]
    if not present:
        return torch.full((), NOT_FOUND, dtype=torch.float64, device=numbers.device)
    nothing = torch.zeros(1, dtype=present[0].dtype, device=numbers.device)
    filled = [nothing if grad is None or not grad.numel() else grad for grad in grads]
    largest = torch.stack(torch._foreach_norm(filled, math.inf))
    codes = numbers * (num_ranks + 1) + rank
    return codes.masked_fill_(torch.isfinite(largest), NOT_FOUND).min()
