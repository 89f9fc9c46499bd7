"""Optimizers over weights that parallelize_module split: ZeRO over the data dimension, norms over both."""

from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from parallel_case import split, square
from torch import nn

import pyzero


def run_on(group: Any, kind: str, max_norm: float | None, options: dict[str, Any]) -> dict[str, Any]:
    mesh = square()
    model = split(case.Model(), mesh["tp"], sequence=kind == "sequence")
    if kind == "fully_shard":
        case.fsdp(model, mesh["dp"])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, max_grad_norm=max_norm, **options)
    run = case.train(model, optimizer, group, share=(mesh["dp"].get_local_rank(), 2))
    masters = [optimizer.full_master(param) for param in model.parameters()]
    return {
        "run": run,
        "masters": masters,
        "num_shards": {bucket.layout.num_ranks for bucket in optimizer._buckets},
    }


@pytest.mark.parametrize("kind", ["tensor", "sequence", "fully_shard"])
def test_four_ranks_follow_one_process(ranks, kind):
    for max_norm, options in ((None, {"stage": 1}), (0.2, {"stage": 2, "bucket_cap_mb": 1e-4})):
        for result in ranks.run(4, run_on, kind, max_norm, options):
            case.assert_follows(result["run"], max_norm)
            for weight, master in zip(result["run"].weights, result["masters"], strict=True):
                assert torch.equal(weight, master)
            assert result["num_shards"] == {1 if kind == "fully_shard" else 2}


def clip_by_torch(group: Any) -> list[tuple[float, float]]:
    mesh = square()
    model, other = split(case.Model(), mesh["tp"]), case.Model()
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR, process_group=mesh["dp"])
    index = mesh["dp"].get_local_rank()
    norms = []
    for kind in (2.0, 1.0, float("inf")):
        optimizer.zero_grad(set_to_none=kind != 1.0)
        other.zero_grad()
        for micro in range(2):  # the second adds to a gradient that has been shown
            case.loss_of(model, case.batch(micro).chunk(2)[index]).backward()
            case.loss_of(other, case.batch(micro)).backward()
        wanted = nn.utils.clip_grad_norm_(other.parameters(), 0.1, kind)
        ours = optimizer.clip_grad_norm_(1e9, kind)
        norms.append((float(ours), float(wanted)))
        norms.append((float(nn.utils.clip_grad_norm_(model.parameters(), 0.1, kind)), float(wanted)))
        for param, whole in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(optimizer.full_grad(param), whole.grad, rtol=1e-4, atol=1e-6)
    return norms


def test_norms_and_clipping_are_those_of_whole_gradients(ranks):
    for norms in ranks.run(4, clip_by_torch):
        for ours, wanted in norms:
            assert ours == pytest.approx(wanted, rel=1e-5)


def clip_after_a_write(group: Any) -> tuple[float, float]:
    """Clip by torch on one replica, where .grad is torch's own, of DTensors and plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    model = split(case.Model(), mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR)
    case.loss_of(model, case.batch(0)).backward()
    param = model.blocks[0].up.weight
    optimizer.set_full_grad(param, 2.0 * optimizer.full_grad(param))
    wanted = optimizer.clip_grad_norm_(1e9)
    return float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)), float(wanted)


def test_torch_clips_a_gradient_that_was_set(ranks):
    for got, wanted in ranks.run(4, clip_after_a_write):
        assert got == pytest.approx(wanted, rel=1e-5)


def overflow(group: Any, stage: int) -> dict[str, Any]:
    mesh = square()
    model = split(case.Model(torch.float16), mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=case.LR, stage=stage, loss_scale=pyzero.LossScale(init_scale=1024.0)
    )
    applied, weights = [], []
    for step in range(3):
        optimizer.zero_grad(set_to_none=step != 2)
        for micro in range(2):
            x = case.batch(2 * step + micro, torch.float16).chunk(2)[mesh["dp"].get_local_rank()]
            if step == 1 and micro == 1 and dist.get_rank() == 3:  # one part of one weight on one rank
                model.blocks[0].up.weight.register_hook(lambda grad: grad * float("inf"))
            optimizer.backward(case.loss_of(model, x) / 2)
        if step == 1 and dist.get_rank() == 3:
            model.blocks[0].up.weight._backward_hooks.clear()
        optimizer.step()
        applied.append(optimizer.was_step_applied)
        weights.append([case.whole(param) for param in model.parameters()])
    return {"applied": applied, "scale": optimizer.loss_scale, "norm": float(optimizer.grad_norm), "weights": weights}


@pytest.mark.parametrize("stage", [1, 2])
def test_an_overflow_in_one_part_skips_on_all(ranks, stage):
    results = ranks.run(4, overflow, stage)
    for result in results:
        assert result["applied"] == [True, False, True] and result["scale"] == 512.0
        assert result["norm"] == results[0]["norm"] < 100
        for step in range(3):
            for a, b in zip(result["weights"][step], results[0]["weights"][step], strict=True):
                assert torch.equal(a, b)


def groups_told(group: Any) -> dict[str, Any]:
    """Pass the groups, because a mesh of one dimension does not say which other ranks hold its weights."""
    from torch.distributed.device_mesh import DeviceMesh

    rank = dist.get_rank()
    tensor = DeviceMesh.from_group([dist.new_group(members) for members in ([0, 1], [2, 3])][rank // 2], "cpu")
    data = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
    model = split(case.Model(), tensor)
    try:
        pyzero.FusedZeroAdamW(model.parameters(), lr=case.LR)
        message = ""
    except ValueError as error:
        message = str(error)
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=case.LR, process_group=data, model_parallel_group=tensor.get_group()
    )
    return {"message": message, "run": case.train(model, optimizer, group, share=(rank // 2, 2))}


def test_process_group_says_who_holds_the_same_weights(ranks):
    for found in ranks.run(4, groups_told):
        assert "pass those ranks as process_group" in found["message"]
        case.assert_follows(found["run"], None)
