"""Sparse gradients over ranks: what FusedZeroAdamW does for dense ones, for those that torch.optim.SparseAdam takes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def average_sparse_grads(params: list[nn.Parameter]) -> None:
    """Make sparse gradients their mean over the ranks; a parameter has one on all ranks, as with DDP."""
    size = dist.get_world_size()
    for param in params:
        assert param.grad is not None
        mine = param.grad.coalesce()
        count = torch.tensor([mine.values().shape[0]], device=param.device)
        counts = [torch.empty_like(count) for _ in range(size)]
        dist.all_gather(counts, count)
        room = int(max(counts)) - int(count)  # what is gathered has one shape on all ranks
        parts = []
        for part in (mine.indices()[0], mine.values()):
            padded = F.pad(part, (0, 0) * (part.dim() - 1) + (0, room))
            gathered = [torch.empty_like(padded) for _ in range(size)]
            dist.all_gather(gathered, padded)
            parts.append(torch.cat([one[: int(n)] for one, n in zip(gathered, counts, strict=True)]))
        total = torch.sparse_coo_tensor(parts[0][None], parts[1], param.shape, check_invariants=False).coalesce()
        param.grad = total / size
