"""Unscale, check and square, a tensor at a time."""

from collections.abc import Sequence

from torch import Tensor

from pyzero.ops.reference.scalars import report, scalar


def unscale_(
    tensors: Sequence[Tensor], inv_scale: float | Tensor, found_inf: Tensor | None, sumsq: Tensor | None
) -> None:
    """See `pyzero.ops.unscale_`."""
    for tensor in tensors:
        tensor.copy_(tensor.float() * scalar(inv_scale, tensor.float().dtype))
    report(list(tensors), found_inf, sumsq)
