"""One process or many, CPU or GPU: where this process runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """This process among its ranks."""

    rank: int
    size: int
    device: torch.device

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, in place; fp32."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def alone(self) -> Place:
        """This process as if there were no others."""
        return Place(0, 1, self.device)


def own_rows(rows: Tensor, place: Place) -> tuple[Tensor, float]:
    """This rank's part of a batch that all ranks drew alike, and what its mean counts for in the mean over ranks."""
    mine = rows.tensor_split(place.size)[place.rank]
    return mine.to(place.device), len(mine) * place.size / len(rows)


@contextmanager
def joined() -> Iterator[Place]:
    """Join what torchrun started; alone, there is nobody to join."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        # torchrun says 1 thread each unless told otherwise: share the cores instead.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.index is not None else None
        )
    try:
        yield Place(rank, size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
