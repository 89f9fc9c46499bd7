"""Unscale, check and square, a tensor at a time."""

from pyzero.ops.backend import UnscaleArgs
from pyzero.ops.reference.scalars import add_grad_stats, scalar


def unscale_(args: UnscaleArgs) -> None:
    """See `pyzero.ops.unscale_`."""
    for tensor in args.tensors:
        tensor.copy_(tensor.float() * scalar(args.inv_scale, tensor.float().dtype))
    add_grad_stats(args.tensors, args.found_inf, args.sumsq)
