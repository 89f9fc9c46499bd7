"""A shard cut by its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

from pyzero.ops.backend import SEGMENT_GRANULE, AdamArgs, LionArgs, SgdArgs
from pyzero.ops.rounding import ceil_div

Args = TypeVar("Args", AdamArgs, LionArgs, SgdArgs)

_PER_ELEMENT = ("master", "exp_avg", "exp_avg_sq", "momentum_buffer")


def each_grad(args: Args) -> Iterator[tuple[Tensor, Args]]:
    """Each gradient, flat, and views of what it updates."""
    for grad, begin in zip(args.grads, args.offsets, strict=True):
        end = begin + grad.numel()
        cut = {name: getattr(args, name, None) for name in _PER_ELEMENT}
        part: dict[str, Any] = {name: tensor[begin:end] for name, tensor in cut.items() if tensor is not None}
        part["param_outs"] = [out[begin:end] for out in args.param_outs]
        if args.segment_ids is not None:
            part["segment_ids"] = args.segment_ids[begin // SEGMENT_GRANULE : ceil_div(end, SEGMENT_GRANULE)]
        yield grad.reshape(-1), args._replace(**part)
