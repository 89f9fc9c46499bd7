"""Finds the first parameter with an inf or a NaN in its gradient, and its rank, as one number to send: a code.

The code is parameter * (num_ranks + 1) + rank, so the smallest code of all ranks is the first. The rank is num_ranks if
it is not known, and the code is inf if nothing was found. Ranks are numbered in the group that shares state, or among
all processes if DTensors say that other ranks hold other parts of the same parameters.
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
    """The numbers that codes use for the ranks of a group."""

    of_group: tuple[int, ...]
    num_ranks: int  # above all of them


def decode(code: float, num_ranks: int) -> tuple[int | None, int | None]:
    """Return the parameter's number and the rank. None if not known."""
    if math.isinf(code):
        return None, None
    number, rank = divmod(int(code), num_ranks + 1)
    return number, rank if rank < num_ranks else None


def locate_in_slices(bucket: Bucket, slices: list[Tensor], names: RankNames, by_rank: bool) -> Tensor:
    """Return the code of the first bad parameter in the slices received for this rank's shard: (1,) fp64.

    Args:
        bucket: The bucket.
        slices: (shard_numel,) each.
        names: Names of the ranks.
        by_rank: slices[r] is rank r's; otherwise the only slice is a sum over ranks.
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
    """Return the code of the first bad parameter among this rank's own gradients of a bucket: 0-D fp64.

    Args:
        numbers: (num_params,) fp64, the parameters' numbers.
        grads: Gradients by position; None or empty if there is none.
        rank: This rank's number in codes.
        num_ranks: As in RankNames.
    """
    present = [grad for grad in grads if grad is not None and grad.numel()]
    if not present:
        return torch.full((), NOT_FOUND, dtype=torch.float64, device=numbers.device)
    nothing = torch.zeros(1, dtype=present[0].dtype, device=numbers.device)
    filled = [nothing if grad is None or not grad.numel() else grad for grad in grads]
    largest = torch.stack(torch._foreach_norm(filled, math.inf))
    codes = numbers * (num_ranks + 1) + rank
    return codes.masked_fill_(torch.isfinite(largest), NOT_FOUND).min()
