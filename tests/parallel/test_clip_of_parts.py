"""optimizer.clip_grad_norm_ on one replica of a pipeline: every stage clips and reads norms as one process does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pyzero

ROWS, LR = 4, 0.25
GRADS = [3.0, 5.0, 7.0]  # of the first stage's weight, the second's, and one more of the first stage


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(ROWS)) for _ in GRADS]


def clip(group: Any, has_dtensor: bool, max_grad_norm: float | None) -> tuple[list[float], dict[int, Tensor]]:
    """Clip, drop a gradient of the first stage, clip again, and step. Return all norms, and this stage's weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    own = {number: param for number, param in enumerate(weights()) if (number == 1) == mesh.get_local_rank("pp")}
    if has_dtensor and 1 in own:
        own[1] = nn.Parameter(distribute_tensor(own[1].detach(), mesh["tp"], [Shard(0)]))
    for param in own.values():
        param.model_parallel = True  # type: ignore[attr-defined]
    optimizer = pyzero.FusedZeroSGD(
        own.values(), lr=LR, process_group=alone, model_parallel_group=mesh["pp"], max_grad_norm=max_grad_norm
    )
    for number, param in own.items():
        (param * GRADS[number]).sum().backward()
    norms = [float(optimizer.clip_grad_norm_(8.0))]
    if 2 in own:
        own[2].grad = None
    norms += [float(optimizer.clip_grad_norm_(1e9)), float(optimizer.clip_grad_norm_(4.0))]
    optimizer.step()
    norms += [float(optimizer.clipped_grad_norm)]  # type: ignore[arg-type]
    found = {n: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in own.items()}
    return norms, found


def alone(max_grad_norm: float | None) -> tuple[list[float], dict[int, Tensor]]:
    params = weights()
    for param, grad in zip(params, GRADS, strict=True):
        param.grad = torch.full((ROWS,), grad)
    norms = [float(nn.utils.clip_grad_norm_(params, 8.0))]
    params[2].grad = None
    norms += [float(nn.utils.clip_grad_norm_(params, most)) for most in (1e9, 4.0)]
    nn.utils.clip_grad_norm_(params, max_grad_norm or 1e9)
    norms += [float(nn.utils.get_total_norm([p.grad for p in params[:2]]))]
    torch.optim.SGD(params, lr=LR).step()
    return norms, {number: param.detach() for number, param in enumerate(params)}


@pytest.mark.parametrize("max_grad_norm", [None, 2.0])
@pytest.mark.parametrize("has_dtensor", [True, False])
def test_all_stages_clip_at_once(ranks, has_dtensor, max_grad_norm):
    wanted, params = alone(max_grad_norm)
    for norms, found in ranks.run(4, clip, has_dtensor, max_grad_norm):
        assert norms == pytest.approx(wanted, rel=1e-5)
        for number, param in found.items():
            torch.testing.assert_close(param, params[number], rtol=1e-5, atol=0)
