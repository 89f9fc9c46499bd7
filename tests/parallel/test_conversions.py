"""`.to()`, `.float()` and the like after initialize(), on a model of DTensors: stage 3, and tensor_parallel."""

import gc
from typing import Any

import parallel_case as case
import pytest
import torch
from torch import nn

import pyzero
from pyzero.sharding.fsdp import reshard
from pyzero.sharding.local_param import local_of

WORLD = 4
OTHERS = {  # what changes weights
    "half": lambda module: module.half(),
    "double": lambda module: module.to(torch.float64),
    "meta": lambda module: module.to("meta"),
}


SPLIT = {"blocks.*.up": "colwise", "blocks.*.mid": "rowwise"}


def start(dtype: str, how: str = "stage 3", trains: bool = True) -> Any:
    model = case.Model()
    model.blocks[0].register_buffer("offset", torch.ones(2))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": dtype == "bf16"},
        **({"optimizer": {"type": "AdamW", "params": {"lr": case.LR}}} if trains else {}),
        **({"zero_optimization": {"stage": 3}} if how == "stage 3" else {"tensor_parallel": {"autotp_size": 2}}),
    }
    return pyzero.initialize(model=model, config=config, tp_plan=None if how == "stage 3" else SPLIT)[0]


def convert(engine: Any, dtype: torch.dtype) -> None:
    """Convert to what the weights have, as scripts do."""
    module = engine.module
    for part in (engine, module, module.blocks, module.blocks[0], module.blocks[1].up, module.first):
        assert part.to(engine.device) is part
        assert part.to(engine.device, dtype) is part and part.cpu() is part


def known(engine: Any) -> list[tuple[Any, ...]]:
    params = engine.module.parameters()
    return [(id(p), local_of(p).data_ptr(), p._version, p.dtype, p.device, dict(vars(p))) for p in params]


def train(group: Any, dtype: str, how: str, converts: bool) -> list[torch.Tensor]:
    engine = start(dtype, how)
    own = torch.bfloat16 if dtype == "bf16" else torch.float32
    for step in range(3):
        before = known(engine)
        if converts:
            with torch.no_grad():
                engine.module(case.batch(0, own))  # in stage 3 it leaves weights outside the blocks gathered
            convert(engine, own)
            reshard(engine.module)
            assert known(engine) == before
        x = case.batch(step, own).chunk(engine.dp_world_size)[engine.dp_rank]
        engine.backward(engine(x).float().sub(1).square().mean())
        if converts:
            convert(engine, own)
            assert known(engine) == before
        engine.step()
    return [case.whole(param) for param in engine.module.parameters()]


@pytest.mark.parametrize(("dtype", "how"), [("fp32", "stage 3"), ("bf16", "stage 3"), ("bf16", "tensor parallel")])
def test_conversions_to_what_weights_have_change_nothing(ranks, dtype, how):
    plain = ranks.run(WORLD, train, dtype, how, False)
    for found, wanted in zip(ranks.run(WORLD, train, dtype, how, True), plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def refuse(group: Any) -> None:
    engine = start("bf16")
    before = known(engine)
    for name, change in OTHERS.items():
        for part in (engine, engine.module, engine.module.blocks[0], engine.module.blocks[0].up):
            with pytest.raises(TypeError, match=r"stay in torch.float32 on cpu, got .*; convert the model before init"):
                change(part)
            assert known(engine) == before and engine.module.blocks[0].offset.dtype == torch.float32, name
    engine.module.float().bfloat16()  # the shards are fp32, and are gathered in bf16
    assert known(engine) == before and engine.module.blocks[0].offset.dtype == torch.bfloat16


def test_other_conversions_are_refused_before_anything_changes(ranks):
    ranks.run(WORLD, refuse)


def untrained(group: Any, is_deleted: bool) -> None:
    """Without an optimizer they are torch's, as of a reference model that is moved; ds_id is kept."""
    engine = start("fp32", trains=is_deleted)
    module: nn.Module = engine.module
    before = [(id(p), p.ds_id, p.ds_status, p.ds_shape, case.whole(p)) for p in module.parameters()]
    if is_deleted:
        del engine
        gc.collect()
    module.double().to("cpu")
    for param, (number, *marks, whole) in zip(module.parameters(), before, strict=True):
        assert id(param) == number and [param.ds_id, param.ds_status, param.ds_shape] == marks
        assert param.dtype == torch.float64 and torch.equal(case.whole(param), whole.double())
    with torch.no_grad():
        found = module(case.batch(0).double())
    assert torch.allclose(found, case.Model().double()(case.batch(0).double()))


@pytest.mark.parametrize("is_deleted", [False, True])
def test_untrained_weights_convert_as_torch_does(ranks, is_deleted):
    ranks.run(WORLD, untrained, is_deleted)
