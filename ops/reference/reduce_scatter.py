"""Sum over ranks in rank order, in fp32."""

import torch

from pyzero.ops.backend import ReduceScatterArgs
from pyzero.ops.reference.scalars import add_grad_stats, scalar


@torch.no_grad()
def reduce_scatter_(args: ReduceScatterArgs) -> None:
    """See `pyzero.ops.reduce_scatter_`."""
    total = args.slices[0].float()
    for piece in args.slices[1:]:
        total = total + piece.float()
    total = total * scalar(args.scale, torch.float32)
    args.shard.copy_(args.shard + total if args.accumulate else total)
    add_grad_stats([args.shard], args.found_inf, args.sumsq)
