"""torch.amp.GradScaler where ranks hold parts of one model, and nobody reduces gradients: one replica."""

from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from parallel_case import split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import pyzero

NUM_STEPS, OVERFLOWS_AT = 5, 2


def all_dtensors(model: Any, mesh: Any) -> Any:
    """Make the first layer's parameters DTensors too, replicated ones: torch takes the first gradient's placement."""
    first = model.first
    for name, param in list(first.named_parameters()):
        first.register_parameter(name, nn.Parameter(DTensor.from_local(param.detach(), mesh, [Replicate()])))
    first.register_forward_pre_hook(lambda _, args: (DTensor.from_local(args[0], mesh, [Replicate()]),))
    first.register_forward_hook(lambda _, args, output: output.to_local())
    return model


def train(group: Any, kind: str, unscales: bool, bad_rank: int) -> tuple[list[float], list[bool], case.Run]:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    model = split(case.Model(), mesh)
    trained = list(model.parameters())
    if kind == "one mesh":
        all_dtensors(model, mesh)
        names = ("first.weight", "first.bias", "blocks.0.up.weight", "blocks.1.mid.weight")
        trained = [dict(model.named_parameters())[name] for name in names]
    optimizer = pyzero.FusedZeroAdamW(trained, lr=case.LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    losses, norms, scales, applied = [], [], [], []
    for step in range(NUM_STEPS):
        weight = model.blocks[0].up.weight
        is_bad = step == OVERFLOWS_AT and dist.get_rank() == bad_rank
        hook = weight.register_hook(lambda grad: grad * float("inf")) if is_bad else None
        loss = case.loss_of(model, case.batch(step))
        scaler.scale(loss).backward()
        if hook is not None:
            hook.remove()
        if unscales:
            scaler.unscale_(optimizer)
            if step != OVERFLOWS_AT:
                norms.append(case.whole(nn.utils.clip_grad_norm_(trained, 0.2)))
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        losses.append(loss.detach())
        scales.append(scaler.get_scale())
        applied.append(optimizer.was_step_applied)
    return scales, applied, case.Run(torch.stack(losses), torch.stack(norms or losses), [*map(case.whole, trained)])


def alone(kind: str, unscales: bool, dtype: torch.dtype) -> case.Run:
    model = case.Model(dtype)
    names = ("first.weight", "first.bias", "blocks.0.up.weight", "blocks.1.mid.weight")
    params = dict(model.named_parameters())
    trained = [params[name] for name in names] if kind == "one mesh" else [*params.values()]
    optimizer = torch.optim.AdamW(trained, lr=case.LR)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss = case.loss_of(model, case.batch(step, dtype))
        losses.append(loss.detach())
        if step != OVERFLOWS_AT:
            model.zero_grad()
            loss.backward()
            if unscales:
                norms.append(nn.utils.clip_grad_norm_(trained, 0.2))
            optimizer.step()
    return case.Run(torch.stack(losses), torch.stack(norms or losses), [p.detach() for p in trained])


@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("kind", ["mixed", "one mesh"])
def test_one_ranks_overflow_is_every_scalers(ranks, kind, unscales, bad_rank):
    exact, torchs = alone(kind, unscales, torch.float64), alone(kind, unscales, torch.float32)
    for scales, applied, run in ranks.run(4, train, kind, unscales, bad_rank):
        assert scales == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
        assert applied == [True, True, False, True, True]
        case.assert_near(run, exact, torchs)


def of_stages(group: Any) -> list[float]:
    """Two parts of a model that only the optimizer's argument tells of. The last rank's overflows."""
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    param = nn.Parameter(torch.ones(3))
    param.model_parallel = True
    optimizer = pyzero.FusedZeroAdamW([param], process_group=own, model_parallel_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    param.grad = torch.full((3,), 1024.0 if group.rank() == 0 else float("inf"))
    scaler.scale(torch.ones(()))  # a scale is there from the first loss on
    scaler.step(optimizer)
    scaler.update()
    found = [scaler.get_scale()]
    optimizer.zero_grad()
    if group.rank() == 0:  # the other stage is frozen in this step
        param.grad = torch.full((3,), scaler.get_scale())
    scaler.unscale_(optimizer)
    found.append(float(param.grad[0]) if group.rank() == 0 else 1.0)
    scaler.step(optimizer)
    scaler.update()
    return [*found, scaler.get_scale(), float(optimizer.grad_norm)]


def test_one_stages_overflow_is_every_scalers(ranks):
    for found in ranks.run(2, of_stages):
        assert found == [512.0, 1.0, 512.0, pytest.approx(3**0.5)]
