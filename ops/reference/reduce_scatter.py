"""Sum over ranks in rank order, in fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyzero.ops.reference.scalars import report, scalar


def reduce_scatter_(
    shard: Tensor,
    slices: Sequence[Tensor],
    scale: float | Tensor,
    accumulate: bool,
    found_inf: Tensor | None,
    sumsq: Tensor | None,
) -> None:
    """See `pyzero.ops.reduce_scatter_`."""
    total = slices[0].float()
    for piece in slices[1:]:
        total = total + piece.float()
    total = total * scalar(scale, torch.float32)
    shard.copy_(shard + total if accumulate else total)
    report([shard], found_inf, sumsq)
