"""pack_: gather a bucket's gradients into its flat buffer, with the cast and the scale on the way."""

from __future__ import annotations

from functools import partial

import torch

from ..backend import PackArgs
from ..rows import addresses, dtypes, numels
from .address_table import Span
from .scaled_copy import CopyJob, scaled_copy


def pack_(args: PackArgs) -> None:
    """bucket[offsets[i] : offsets[i] + numel] = scale * tensors[i], rounded to the bucket's dtype."""
    content = (args.rows, tuple(args.offsets))
    scaled_copy(content, partial(_jobs, *content), args.bucket, args.scale, None, None, writes=True)


def _jobs(rows: bytes, offsets: tuple[int, ...]) -> list[CopyJob]:
    start, *sources = addresses(rows)
    _, *counts = numels(rows)
    dest, *kinds = dtypes(rows)
    spans: dict[torch.dtype, list[Span]] = {}
    for dtype, source, offset, numel in zip(kinds, sources, offsets, counts, strict=True):
        spans.setdefault(dtype, []).append((source, start + offset * dest.itemsize, numel))
    return [CopyJob(dtype, dest, part) for dtype, part in spans.items()]
