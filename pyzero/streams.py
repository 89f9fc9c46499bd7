"""Work on another stream of a GPU than the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_stream(stream: torch.cuda.Stream | None, *used: Tensor) -> Iterator[None]:
    """Behind what the current stream has done; what is `used` there is not freed under it. None: on a CPU, as it is."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for tensor in used:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield
