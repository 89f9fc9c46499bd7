"""unscale_: multiply a list of gradients in place, flag inf and NaN, add up the squares."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backend import UnscaleArgs
from ..rows import addresses, dtypes, numels
from .address_table import Span
from .scaled_copy import CopyJob, scaled_copy


def unscale_(args: UnscaleArgs) -> None:
    """Unscale in place; the number 1.0 only reads."""
    writes = isinstance(args.inv_scale, Tensor) or args.inv_scale != 1.0
    if not writes and args.found_inf is None and args.sumsq is None:
        return
    jobs = partial(_jobs, args.rows)
    scaled_copy(args.rows, jobs, args.tensors[0], args.inv_scale, args.found_inf, args.sumsq, writes=writes)


def _jobs(rows: bytes) -> list[CopyJob]:
    spans: dict[torch.dtype, list[Span]] = {}
    for dtype, address, numel in zip(dtypes(rows), addresses(rows), numels(rows), strict=True):
        spans.setdefault(dtype, []).append((address, address, numel))
    return [CopyJob(dtype, dtype, part) for dtype, part in spans.items()]
