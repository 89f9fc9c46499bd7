"""Running work on a side stream of a GPU, and on a GPU that is not the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, which the caller's may not be: NCCL sends python objects from there, for one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
