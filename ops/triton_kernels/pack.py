"""pack_: gather a bucket's gradients into its flat buffer, with the cast and the scale on the way."""

from __future__ import annotations

import torch

from ..backend import PackArgs
from ..rows import addresses, dtypes, numels
from .address_table import Span
from .scaled_copy import CopyJob, scaled_copy


def pack_(args: PackArgs) -> None:
    """bucket[offsets[i] : offsets[i] + numel] = scale * tensors[i], rounded to the bucket's dtype."""
    start, *sources = addresses(args.rows)
    _, *counts = numels(args.rows)
    dest, *kinds = dtypes(args.rows)
    spans: dict[torch.dtype, list[Span]] = {}
    for dtype, source, offset, numel in zip(kinds, sources, args.offsets, counts, strict=True):
        spans.setdefault(dtype, []).append((source, start + offset * dest.itemsize, numel))
    jobs = [CopyJob(dtype, dest, part) for dtype, part in spans.items()]
    scaled_copy(jobs, args.bucket, args.scale, None, None, writes=True)
