"""Running work on a side stream of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_stream(stream: torch.cuda.Stream | None, *used: Tensor) -> Iterator[None]:
    """Run on `stream`, after what the current stream has queued; `used` tensors stay allocated for it. None: no-op."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for tensor in used:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield
