"""Run work on a side stream of a GPU, or on a GPU that is not the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def on_stream(stream: torch.cuda.Stream | None, *used: Tensor) -> Iterator[None]:
    """Run on `stream` after the current stream's work, and keep `used` tensors allocated for it. None: do nothing."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for tensor in used:
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, because the caller may have another. NCCL sends objects from the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
