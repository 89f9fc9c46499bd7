"""Unscale, check and square, a tensor at a time."""

import torch
from torch import Tensor

from pyzero.ops.backend import UnscaleArgs
from pyzero.ops.reference.scalars import add_grad_stats, scalar


@torch.no_grad()
def unscale_(args: UnscaleArgs) -> None:
    """See `pyzero.ops.unscale_`."""
    is_read_only = not isinstance(args.inv_scale, Tensor) and args.inv_scale == 1.0  # a write would count as an edit
    for tensor in () if is_read_only else args.tensors:
        tensor.copy_(tensor.float() * scalar(args.inv_scale, tensor.float().dtype))
    add_grad_stats(args.tensors, args.found_inf, args.sumsq)
