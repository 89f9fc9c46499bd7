"""A pipeline stage or a shard whose parameters are all frozen steps beside those that train."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyzero

_meshes: dict[int, tuple[Any, Any]] = {}


def groups(group: Any) -> tuple[Any, Any, int]:
    """Return (replicas of this rank's stage, its pipeline, stage), for one pipeline of 2 ranks, or two on 4."""
    size, rank = dist.get_world_size(group), dist.get_rank()
    if size not in _meshes:
        if size == 2:
            _meshes[size] = dist.new_group([rank], use_local_synchronization=True), group
        else:
            columns, rows = [[dist.new_group(r) for r in ranks] for ranks in ([[0, 2], [1, 3]], [[0, 1], [2, 3]])]
            _meshes[size] = columns[rank % 2], rows[rank // 2]
    return *_meshes[size], rank % 2


def train(group: Any, stage: int, dtype: torch.dtype) -> tuple[list[float], float, int, float]:
    """Train three steps with stage 0 frozen. The second step overflows on stage 1."""
    data, pipeline, place = groups(group)
    model = nn.Linear(2, 1, bias=False).to(dtype).requires_grad_(place == 1)
    model.weight.model_parallel = True
    with torch.device("meta"):  # the optimizer allocates on the parameters' device all the same
        optimizer = pyzero.FusedZeroAdamW(
            model.parameters(),
            lr=0.25,
            stage=stage,
            process_group=data,
            model_parallel_group=pipeline,
            loss_scale=pyzero.LossScale(init_scale=8.0),
        )
    norms = []
    for step in range(3):
        with optimizer.scaled_gradients():
            if place == 1:
                factor = float("inf") if step == 1 else 1.0
                optimizer.scale((model.weight * torch.tensor([3.0, 4.0], dtype=dtype) * factor).sum()).backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
        optimizer.zero_grad()
    clipped = float(optimizer.clip_grad_norm_(1.0))
    return norms, optimizer.loss_scale, optimizer.skipped_steps, clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "stage"), [(2, 2), (4, 1), (4, 2)])
def test_a_frozen_stage_steps_with_the_others(ranks, size, stage, dtype):
    for norms, scale, num_skipped, clipped in ranks.run(size, train, stage, dtype):
        assert norms[0] == norms[2] == 5.0 and not torch.isfinite(torch.tensor(norms[1]))
        assert (scale, num_skipped, clipped) == (4.0, 1, 0.0)
