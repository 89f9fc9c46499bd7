"""initialize() with stage 3: torch's fully_shard on the model's blocks, and all that the engine does on shards."""

import contextlib
from pathlib import Path
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import pyzero
from pyzero.comm import process
from pyzero.deepspeed import comm, partition, utils, zero
from pyzero.deepspeed.parallel.mesh import parallelism_of
from pyzero.deepspeed.stage_3.shard import shard
from pyzero.sharding import fsdp
from pyzero.sharding.blocks import blocks_of

SECTIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
}
WORLD = 4  # of the pool's default group


def start(stage: int, dtype: str, seed: int = 0, **options: Any) -> Any:
    model = case.Model()
    with torch.no_grad():
        for param in model.parameters() if seed or dist.get_rank() else ():
            param.mul_(2)  # rank 0's count
    size = options.pop("size", WORLD)
    config = {
        "train_batch_size": 2 * case.BATCH,
        "train_micro_batch_size_per_gpu": case.BATCH // size,
        "optimizer": {"type": "AdamW", "params": {"lr": case.LR, "weight_decay": 1e-2}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.2,
        **SECTIONS[dtype],
    }
    return pyzero.initialize(model=model, config=config, **options)[0]


def train(engine: Any, steps: range) -> case.Run:
    """Take steps of two micro-batches, each divided over the ranks."""
    losses, norms = [], []
    for step in steps:
        total = torch.zeros(())
        for micro in range(2):
            x = case.batch(2 * step + micro).chunk(engine.dp_world_size)[engine.dp_rank]
            loss = engine(x).float().sub(1).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 2 / WORLD
        dist.all_reduce(total)
        losses.append(total)
        norms.append(torch.tensor(engine.get_global_grad_norm()))
    return case.Run(torch.stack(losses), torch.stack(norms), list(engine.get_fp32_state_dict().values()))


def whole_run(group: Any, stage: int, dtype: str) -> dict[str, Any]:
    engine = start(stage, dtype)
    run = train(engine, range(case.NUM_STEPS))
    local = sum(p.to_local().numel() if stage == 3 else p.numel() for p in engine.module.parameters())
    return {"run": run, "local": local, "bytes": engine.optimizer.state_bytes(), "scale": engine.cur_scale}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stage_3_has_the_numbers_of_stage_2(ranks, dtype):
    stages = {stage: ranks.run(WORLD, whole_run, stage, dtype) for stage in (2, 3)}
    for result in stages[3]:
        assert all(torch.equal(a, b) for a, b in zip(result["run"].weights, stages[3][0]["run"].weights, strict=True))
    ours, theirs = stages[3][0]["run"], stages[2][0]["run"]
    # bf16: a rank's gradients are the same, except where a sum of two is rounded. fp32: sums are in another order.
    unit = {"fp32": 2.0**-23, "bf16": 2.0**-8}[dtype]
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=16 * unit, atol=0)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert (a - b).abs().max() < 16 * unit * case.NUM_STEPS * case.LR + 2 * unit
    total = sum(p.numel() for p in case.Model().parameters())
    assert sum(result["local"] for result in stages[3]) == total


class Residual(nn.Module):
    """A residual stream in fp32 between blocks in the weights' dtype, and a loss in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ToStream() for _ in range(2))

    def forward(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = stream.float() + 2.0**-20
        for block in self.blocks:
            stream = block(stream)
        return stream, stream.square().mean()


class ToStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.constant_(self.linear.weight, 2.0**-10)
        nn.init.zeros_(self.linear.bias)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.linear(stream.to(self.linear.weight.dtype)).float()


def streams(group: Any) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Return results of stages 2 and 3. fp16 cannot represent the loss scale, 2^16."""
    results = []
    for stage in (2, 3):
        config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}, "fp16": {"enabled": True}}
        engine, *_ = pyzero.initialize(model=Residual(), config={**config, "zero_optimization": {"stage": stage}})
        stream, loss = engine(torch.full((2, 4), 0.5))
        engine.backward(loss)
        engine.step()
        results.append((stream.detach(), loss.detach(), engine.was_step_applied()))
    return results


def test_what_a_model_computes_in_fp32_stays_so(ranks):
    for (stream, loss, _), (stream_3, loss_3, is_applied) in ranks.run(WORLD, streams):
        assert stream_3.dtype == loss_3.dtype == torch.float32 and is_applied
        assert torch.equal(stream, stream_3) and torch.equal(loss, loss_3)


def overflow(group: Any) -> list[Any]:
    engine = start(3, "fp16")
    applied = []
    for step in range(3):
        for micro in range(2):
            x = case.batch(2 * step + micro).chunk(WORLD)[engine.dp_rank]
            if step == 1 and micro == 0 and dist.get_rank() == 2:
                x = x * 1e4
            engine.backward((engine(x).float() * (1e4 if x.abs().max() > 1e3 else 1)).square().mean())
            engine.step()
        applied.append(engine.was_step_applied())
    return [applied, engine.cur_scale, engine.skipped_steps, list(engine.get_fp32_state_dict().values())]


def test_an_overflow_on_one_rank_skips_on_all(ranks):
    results = ranks.run(WORLD, overflow)
    for applied, scale, skipped, weights in results:
        assert applied == [True, False, True] and skipped == 1 and scale == results[0][1]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][3], strict=True))
        assert all(torch.isfinite(weight).all() for weight in weights)


def save(group: Any, folder: Path, stage: int) -> list[torch.Tensor]:
    engine = start(stage, "bf16")
    train(engine, range(2))
    with torch.no_grad():
        engine(case.batch(0))
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    engine.save_16bit_model(folder)
    return list(engine.get_fp32_state_dict().values())


def load(group: Any, folder: Path, stage: int) -> tuple[list[torch.Tensor], Any]:
    engine = start(stage, "bf16", seed=1)
    _, client = engine.load_checkpoint(folder, load_optimizer_states=False)
    weights = list(engine.get_fp32_state_dict().values())
    engine.load_checkpoint(folder)
    assert engine.global_steps == 2 and client == {"epoch": 3}
    saved = torch.load(folder / "pytorch_model.bin")
    masters = engine.get_fp32_state_dict()
    assert saved.keys() == masters.keys()
    assert all(saved[name].dtype == torch.bfloat16 for name in saved)
    assert all(torch.equal(saved[name], masters[name].bfloat16()) for name in saved)
    return list(masters.values()), weights


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (3, 3)])
def test_checkpoints_go_between_stages(ranks, tmp_path, before, after):
    saved = ranks.run(WORLD, save, tmp_path, before)
    for masters, weights in ranks.run(WORLD, load, tmp_path, after):
        assert all(torch.equal(a, b) for a, b in zip(masters, saved[0], strict=True))
        close = [torch.allclose(a, b, rtol=2**-8) for a, b in zip(weights, saved[0], strict=True)]
        assert all(close)


def local_access(engine: Any) -> None:
    """Read and write this rank's rows of the tensors that the other functions return whole."""
    model, param = engine.module, engine.module.blocks[0].mid.weight  # 9 rows on 4 ranks
    rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    assert utils.safe_get_local_grad(param) is None
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(case.batch(3)).sum())
    whole = utils.safe_get_full_grad(param)
    local = utils.safe_get_local_grad(param)
    assert torch.equal(local, whole[rows]) and local.shape == param.to_local().shape
    utils.safe_set_local_grad(param, local + dist.get_rank())
    changed = utils.safe_get_full_grad(param)
    assert torch.equal(changed, whole + torch.arange(9)[:, None] // 3)
    for name in ("fp32_param", "exp_avg", "exp_avg_sq"):
        whole = utils.safe_get_full_optimizer_state(param, name)
        assert torch.equal(utils.safe_get_local_optimizer_state(param, name), whole[rows])
        utils.safe_set_local_optimizer_state(param, whole[rows] + 1, name)
        assert torch.equal(utils.safe_get_full_optimizer_state(param, name), whole + 1)
    assert torch.equal(utils.safe_get_local_fp32_param(param), param.to_local()) and torch.equal(
        case.whole(param)[:1], utils.safe_get_full_fp32_param(param)[:1]
    )
    utils.safe_set_local_fp32_param(param, param.to_local() * 0)
    assert not case.whole(param).any() and utils.safe_get_local_optimizer_state(param, "other") is None
    with pytest.raises(ValueError, match="expected master of shape"):
        utils.safe_set_local_fp32_param(param, torch.zeros(1))
    engine.zero_grad()
    with zero.GatheredParameters(list(model.parameters())):
        saved = model.state_dict() if dist.get_rank() == 1 else {}  # one rank, as scripts save
    assert set(saved) in (set(), set(dict(model.named_parameters())))
    shards = model.state_dict()
    for name, value in saved.items():
        assert type(value) is torch.Tensor and "DTensor" in type(shards[name]).__name__
    everyones: list[Any] = [saved]
    dist.broadcast_object_list(everyones, src=1)
    assert all(torch.equal(value, case.whole(shards[name])) for name, value in everyones[0].items())


def initialize_again(engine: Any) -> None:
    """A sharded model stays sharded."""
    before = [case.whole(param).clone() for param in engine.module.parameters()]
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}
    with pytest.raises(ValueError, match="got one over .*; pass the config that it was sharded by"):
        pyzero.initialize(model=engine.module, config={**config, "bf16": {"enabled": True}})
    again = pyzero.initialize(model=engine.module, config=config)[0]
    assert all(torch.equal(case.whole(p), b) for p, b in zip(again.module.parameters(), before, strict=True))
    again.backward(again(case.batch(0)).square().mean())
    again.step()
    assert again.was_step_applied()


def gathered(group: Any) -> dict[str, Any]:
    engine = start(3, "fp32")
    layer = engine.module.first
    param = layer.weight
    with zero.GatheredParameters(param):
        read = layer.weight.detach().clone()
    with zero.GatheredParameters([param, layer.bias], modifier_rank=1):
        with torch.no_grad():
            layer.weight.fill_(float(dist.get_rank()))
    train(engine, range(1))
    after = utils.safe_get_full_fp32_param(param)
    utils.safe_set_full_fp32_param(param, torch.full(param.shape, 7.0))
    set_to = case.whole(param).clone()
    engine.empty_partition_cache()
    local_access(engine)
    initialize_again(engine)
    return {"read": read, "after": after, "set": set_to, "blocks": type(engine.module.blocks[0]).__name__}


def test_gathered_parameters_read_and_write_shards(ranks):
    for found in ranks.run(WORLD, gathered):
        assert torch.equal(found["read"], case.Model().first.weight)
        assert (found["after"] - 1).abs().max() < 2 * case.LR  # rank 1's, and a step away
        assert (found["set"] == 7).all() and "FSDP" in found["blocks"]


def kept_of(engine: Any) -> tuple[torch.Tensor, ...]:
    """Keep views, a parameter and a graph after the context ends and while steps go on."""
    block, x = engine.module.blocks[0], case.batch(0)
    engine.backward(engine(x).float().square().mean())
    wanted = utils.safe_get_full_grad(block.up.weight)
    engine.zero_grad()
    for _ in range(2):
        with zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            views = [block.up.weight.data, block.up.weight.data[3:], block.up.weight.detach().t()]
            shown, before = block.up.weight, block.up.weight.data.clone()
            loss = engine(x).float().square().mean()
            assert torch.equal(views[0], before)  # forward has freed it
        engine.backward(loss)
        assert torch.equal(utils.safe_get_full_grad(block.up.weight), wanted)
        engine.zero_grad()
    train(engine, range(1))
    for use in (lambda: shown + 1, lambda: shown.data, shown.numpy, shown.detach, lambda: shown.T):
        with pytest.raises(RuntimeError, match="got .* of a weight of stage 3 that was kept after zero.GatheredParam"):
            use()
    assert repr(shown) == "Parameter(shape=(12, 6), freed)"
    assert (shown.shape, shown.grad, shown.requires_grad_()) == ((12, 6), None, shown)
    return before, *views


def read_as_scripts_do(group: Any) -> dict[str, Any]:
    """Read by named_parameters()' objects, which differ from those that the module shows in the context."""
    engine = start(3, "bf16")
    param = engine.module.blocks[1].up.weight
    found = {"shape": (param.ds_shape, param.ds_numel), "before": param.ds_status}
    with zero.GatheredParameters([param, engine.module.first.bias]):
        found["within"] = param.ds_status
        found["read"] = param.data.cpu().clone()
        found["used"] = torch.cat([param, param]).shape, (param.detach() + 1).sum()
        with zero.GatheredParameters(param):
            found["nested"] = param.detach().clone()
        with zero.GatheredParameters([engine.module.blocks[1].up.bias, engine.module.last.weight]):
            found["beside"] = engine.module.last.weight.shape, engine.module.blocks[1].up.bias.shape
        found["after nested"] = param.detach().clone()
        param.requires_grad_(False)
    found["after"] = param.ds_status
    found["is"] = engine.module.blocks[1].up.weight is param, type(param).__name__, param.requires_grad
    with zero.GatheredParameters(list(engine.module.parameters())):
        with torch.no_grad():
            found["forward"] = engine(case.batch(0))
        found["resharded"] = case.whole(engine.module.last.weight)
    found["kept"] = kept_of(engine)
    ids = [p.ds_id for p in engine.module.parameters()]
    assert len(set(ids)) == len(ids)
    return found


def test_gathered_parameters_are_whole_by_themselves(ranks):
    wanted = case.Model().blocks[1].up.weight.detach().bfloat16()
    for found in ranks.run(WORLD, read_as_scripts_do):
        assert found["shape"] == (wanted.shape, wanted.numel())
        stages = [found[when].name for when in ("before", "within", "after")]
        assert stages == ["NOT_AVAILABLE", "AVAILABLE", "NOT_AVAILABLE"]
        for when in ("read", "nested", "after nested"):
            assert type(found[when]) is torch.Tensor and torch.equal(found[when], wanted)
        assert found["beside"] == ((1, 6), (12,))
        assert found["used"] == (torch.Size([24, 6]), (wanted + 1).sum())
        assert found["is"] == (True, "DTensor", False)
        assert found["forward"].shape == (case.BATCH, 1)
        before, data, rows, turned = found["kept"]
        assert torch.equal(data, before) and torch.equal(rows, before[3:]) and torch.equal(turned, before.t())


def edit(group: Any, how: str, stage: int) -> list[torch.Tensor]:
    model, options = case.Model(), {}
    if how == "tensor parallel":
        options["mesh"] = case.square()
        model = case.split(model, options["mesh"]["tp"])
    config = {
        "train_micro_batch_size_per_gpu": case.BATCH // 4,
        "optimizer": {"type": "AdamW", "params": {"lr": case.LR}},
        "zero_optimization": {"stage": stage},
        **SECTIONS["fp32" if options else "bf16"],
    }
    engine = pyzero.initialize(model=model, config=config, **options)[0]
    engine.backward(engine(case.batch(0).chunk(4)[engine.dp_rank]).float().square().mean())
    engine.step()
    before = engine.get_fp32_state_dict()
    params = list(engine.module.parameters())
    with zero.GatheredParameters(params, modifier_rank=1), torch.no_grad():
        if dist.get_rank() == 1:
            params[0].add_(1)
    after = engine.get_fp32_state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["first.weight"], changed
    if how == "tensor parallel":
        edit_split(engine)
    return list(after.values())


def edit_after_a_forward(group: Any, is_engines: bool) -> list[str]:
    """Return the names of parameters that did not take an edit of all weights."""
    engine = start(3, "bf16")
    call: Any = engine if is_engines else engine.module
    with torch.no_grad():
        call(case.batch(0).bfloat16())
    params = list(engine.module.parameters())
    assert is_engines == all(isinstance(param, DTensor) for param in params)
    with zero.GatheredParameters(params, modifier_rank=0), torch.no_grad():
        for param in params:
            param.fill_(0.5)
    masters = engine.get_fp32_state_dict()
    return [name for name, _ in engine.module.named_parameters() if not (masters[name] == 0.5).all()]


@pytest.mark.parametrize("is_engines", [True, False], ids=["engine", "module"])
def test_weights_that_a_forward_has_left_whole_are_edited(ranks, is_engines):
    assert ranks.run(WORLD, edit_after_a_forward, is_engines) == [[]] * WORLD


def swap(group: Any, swaps: bool) -> list[torch.Tensor]:
    """Evaluate with other weights, through parameters obtained before, and continue with the original ones."""
    engine = start(3, "bf16")
    train(engine, range(1))
    params = list(engine.module.parameters())
    with torch.no_grad():
        own = [param.detach().clone() for param in params]
        if swaps:
            torch._foreach_mul_(params, 0.5)
            engine(case.batch(0))
            for param, before in zip(params, own, strict=True):
                param.copy_(before)
    return train(engine, range(1, 2)).weights


def test_weights_swapped_for_an_evaluation_come_back(ranks):
    wanted = ranks.run(WORLD, swap, False)[0]
    for found in ranks.run(WORLD, swap, True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def edit_split(engine: Any) -> None:
    """Edit a weight that tensor parallelism splits, on one rank.

    In stage 3 that rank has only a part, so all ranks raise. An edit by all ranks is taken.
    """
    param = engine.module.blocks[0].up.weight
    before = case.whole(param)
    said = ""
    try:
        with zero.GatheredParameters(param, modifier_rank=1):
            if dist.get_rank() == 1:
                param.data.mul_(2)
    except ValueError as error:
        said = str(error)
    if engine.zero_optimization_stage() == 3:
        assert "got one by rank 1 alone" in said
        assert torch.equal(case.whole(param), before)
        with zero.GatheredParameters(param, modifier_rank=1):
            param.data.mul_(2)
    else:
        read_split(engine)
    assert torch.equal(case.whole(param), 2 * before)
    assert torch.equal(utils.safe_get_full_fp32_param(param), 2 * before)


def read_split(engine: Any) -> None:
    """Read and edit split weights below stage 3, where they are shown whole."""
    params, whole = list(engine.module.parameters()), [case.whole(p).clone() for p in engine.module.parameters()]
    x = case.batch(0).chunk(4)[engine.dp_rank]
    engine.backward(engine(x).square().mean())
    wanted = utils.safe_get_full_grad(params[4])
    engine.zero_grad()
    with zero.GatheredParameters(params), zero.GatheredParameters(params[4]):
        assert all(type(p.data) is torch.Tensor and torch.equal(p, w) for p, w in zip(params, whole, strict=True))
        assert torch.equal(engine.module.state_dict()["blocks.0.up.weight"], whole[4]) and params[4].ndim == 2
        loss = engine(x).square().mean()
        assert torch.equal(params[4] + 0, whole[4])
        kept, _ = params[4].data, params[5].data.add_(1)  # by all ranks
    engine.backward(loss)
    assert torch.equal(utils.safe_get_full_grad(params[4]), wanted) and torch.equal(kept, whole[4])
    engine.zero_grad()
    with zero.GatheredParameters(params), zero.GatheredParameters(params[6], modifier_rank=2):
        if dist.get_rank() == 2:
            params[6].data.mul_(3)
    assert [type(p).__name__ for p in params[4:8]] == ["DTensor"] * 4 and params[4].requires_grad
    after = [case.whole(p) for p in engine.module.parameters()]
    assert [torch.equal(*pair) for pair in zip(after, whole, strict=True)] == [
        i not in (5, 6) for i in range(len(whole))
    ]
    assert torch.equal(after[6], 3 * whole[6])


@pytest.mark.parametrize(("how", "stage"), [("plain", 2), ("plain", 3), ("tensor parallel", 2), ("tensor parallel", 3)])
def test_gathered_parameters_keep_what_nobody_edits(ranks, how, stage):
    results = ranks.run(WORLD, edit, how, stage)
    for masters in results:
        assert all(torch.equal(a, b) for a, b in zip(masters, results[0], strict=True))


def given(group: Any, how: str) -> tuple[str, bool]:
    model = case.Model()
    groups = [{"params": list(model.blocks.parameters())}, {"params": list(model.first.parameters()), "lr": 0.5}]
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    if how == "config":
        config["optimizer"] = {"type": "Adam", "params": {"lr": 0.1}}
        engine = pyzero.initialize(model=model, config=config, model_parameters=groups)[0]
    else:
        maker = lambda params: torch.optim.AdamW(params, lr=0.1)  # noqa: E731
        optimizer = {
            "torch": lambda: maker(groups),
            "function": lambda: maker,
            "ours": lambda: pyzero.FusedZeroAdam(groups),
        }
        try:
            engine = pyzero.initialize(model=model, config=config, optimizer=optimizer[how](), model_parameters=groups)[
                0
            ]
        except ValueError as error:
            return str(error), True
    rates = engine.get_lr()
    held = {id(p) for g in engine.optimizer.param_groups for p in g["params"]}
    return str(rates), held <= {id(p) for p in model.parameters()}


def test_optimizers_that_are_given_get_the_shards(ranks):
    for how in ("config", "torch", "function"):
        assert ranks.run(WORLD, given, how) == [("[0.1, 0.5]", True)] * WORLD
    assert all("pass a function" in message for message, _ in ranks.run(WORLD, given, "ours"))


def told_groups(group: Any, how: str, stage: int, folder: Path) -> tuple[Any, Any]:
    mesh = case.square()
    options = {"mesh": mesh} if how == "mesh" else {"mpu": case.Mpu()}
    model = case.split(case.Model(), mesh["tp"])
    config = {
        "train_batch_size": 2 * case.BATCH,
        "train_micro_batch_size_per_gpu": case.BATCH // 2,
        "optimizer": {"type": "AdamW", "params": {"lr": case.LR, "weight_decay": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    engine = pyzero.initialize(model=model, config=config, **options)[0]
    run = train(engine, range(3))
    engine.save_checkpoint(folder)
    weights = engine.get_fp32_state_dict()
    train(engine, range(3, 4))
    engine.load_checkpoint(folder)
    again = engine.get_fp32_state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    return run, (engine.dp_world_size, engine.dp_rank, engine.batches.accumulation, engine.global_samples)


@pytest.mark.parametrize(("how", "stage"), [("mesh", 2), ("mesh", 3), ("mpu", 2)])
def test_mesh_and_mpu_say_who_sees_other_data(ranks, tmp_path, how, stage):
    results = ranks.run(4, told_groups, how, stage, tmp_path)
    plain = case.alone(torch.float32, None, 1)
    for rank, (run, told) in enumerate(results):
        assert told == (2, rank // 2, 2, 3 * 2 * case.BATCH)
        assert all(torch.equal(a, b) for a, b in zip(run.weights, results[0][0].weights, strict=True))
        assert run.norms[0] > 0 and plain.norms[0] > 0


def test_blocks_are_the_repeated_modules_of_the_largest_list():
    model = case.Model()
    assert blocks_of(model) == list(model.blocks)
    tied = case.Model()
    tied.last.weight = nn.Parameter(torch.zeros(1, 6))
    tied.blocks[0].norm.weight = tied.blocks[1].norm.weight
    assert blocks_of(tied) == []  # a weight of two blocks is the root's
    flat = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert blocks_of(flat) == [flat[0], flat[2]]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    assert blocks_of(nested) == [nested[0], nested[1]]
    assert blocks_of(nn.Linear(2, 2)) == []


class Rows(nn.Module):
    """Blocks that are dicts and lists of modules. The model calls these modules one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(5), "two": self.pair()}) for _ in range(2))

    @staticmethod
    def pair() -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(5, 9), nn.Linear(9, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for row in self.rows:
            up, down = row["two"]
            x = x + down(torch.tanh(up(row["norm"](x))))
        return x


def test_blocks_in_containers_are_what_is_called():
    model = Rows()
    first, second = ([row["norm"], *row["two"]] for row in model.rows)
    assert blocks_of(model) == first + second


def containers(group: Any, stage: int) -> tuple[torch.Tensor, list[str]]:
    config = {
        "train_batch_size": case.BATCH,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage},
    }
    engine = pyzero.initialize(model=Rows(), config=config)[0]
    for step in range(3):
        engine.backward(engine(case.batch(step).chunk(WORLD)[engine.dp_rank]).square().mean())
        engine.step()
    kinds = [type(module).__name__ for module in engine.module.rows[0]["two"]]
    return torch.cat([weight.reshape(-1) for weight in engine.get_fp32_state_dict().values()]), kinds


def test_blocks_in_containers_train_as_in_stage_2(ranks):
    (wanted, _), (found, kinds) = (ranks.run(WORLD, containers, stage)[0] for stage in (2, 3))
    torch.testing.assert_close(found, wanted, rtol=2**-20, atol=1e-6)
    assert kinds == ["FSDPLinear", "FSDPLinear"]


class Borrows(case.Model):
    """Uses a block's weight outside the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.blocks[0].norm.weight.sum()


def borrow(group: Any, is_told: bool) -> str:
    model = Borrows()
    if is_told:
        zero.register_external_parameter(model, model.blocks[0].norm.weight)
        assert blocks_of(model) == [model.blocks[1]]
    config = {"train_batch_size": case.BATCH, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}
    engine = pyzero.initialize(model=model, config=config)[0]
    try:
        engine.backward(engine(case.batch(0).chunk(WORLD)[engine.dp_rank]).mean())
    except RuntimeError as error:
        return str(error)
    engine.step()
    return ""


def test_a_weight_used_outside_its_block_is_registered_or_an_error(ranks):
    assert ranks.run(WORLD, borrow, True) == [""] * WORLD
    assert all("register_external_parameter(" in message for message in ranks.run(WORLD, borrow, False))


def test_alone_nothing_is_sharded():
    engine = pyzero.initialize(
        model=case.Model(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "Adam"},
            "zero_optimization": {"stage": 3},
        },
    )[0]
    assert comm.get_world_size() == 1 and not hasattr(engine.module.first.weight, "device_mesh")


def accumulate(group: Any, dtype: str, quiet: bool) -> tuple[list[torch.Tensor], list[float], int]:
    """Take two steps of three micro-batches. If quiet, the first two of each are in no_sync().

    Return weights, norms, and the number of reductions.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    engine, norms, calls = start(3, dtype), [], []
    reduce = fsdp.foreach_reduce
    fsdp.foreach_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))[1]
    try:
        for step in range(2):
            for micro in range(3):
                engine.set_gradient_accumulation_boundary(micro == 2)
                x = case.batch(3 * step + micro).chunk(WORLD)[engine.dp_rank]
                with engine.no_sync() if quiet and micro < 2 else contextlib.nullcontext():
                    with engine.no_sync() if quiet and micro == 1 else contextlib.nullcontext():  # nested
                        pass
                    engine.backward(engine(x).float().sub(1).square().mean())
                    engine.step()
            norms.append(engine.get_global_grad_norm())
    finally:
        fsdp.foreach_reduce = reduce
    return list(engine.get_fp32_state_dict().values()), norms, len(calls)


@pytest.mark.parametrize("dtype", list(SECTIONS))
def test_no_sync_reduces_once_a_step(ranks, dtype):
    plain, plain_norms, often = ranks.run(WORLD, accumulate, dtype, False)[0]
    assert often == 2 * 3 * 3  # two blocks and the rest
    for weights, norms, num_calls in ranks.run(WORLD, accumulate, dtype, True):
        assert num_calls == often // 3
        # fp32 sums in another order; measured 3e-6 of a learning rate.
        assert norms == pytest.approx(plain_norms, rel=1e-5)
        for ours, wanted in zip(weights, plain, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=2**-20, atol=1e-4 * case.LR)


def offloaded(group: Any) -> None:
    """Run on CPUs what offload_param does on GPUs: fully_shard's policy keeps shards and gradients on the host."""
    for dtype in ("fp32", "fp16"):
        plain = train(start(3, dtype), range(3))
        partition.shard = lambda *args: shard(*args[:4], offload=True)
        try:
            engine = start(3, dtype)
        finally:
            partition.shard = shard
        assert all(record.offload_to_cpu for g in fsdp.fsdp_groups(engine.module) for record in g.fsdp_params)
        run = train(engine, range(3))
        assert torch.equal(run.losses, plain.losses) and torch.equal(run.norms, plain.norms)
        assert all(torch.equal(a, b) for a, b in zip(run.weights, plain.weights, strict=True))
    engine.module.zero_grad()
    process.backends_of, backends_of = lambda group: {"cuda": "nccl"}, process.backends_of
    try:
        with pytest.raises(ValueError, match="backends {'cuda': 'nccl'}; call init_process_group"):
            shard(case.Model(), parallelism_of(None, None), None, None, offload=True)
    finally:
        process.backends_of = backends_of


def test_offloaded_shards_train_to_the_same_bits(ranks):
    ranks.run(WORLD, offloaded)


def test_offload_param_says_what_it_does(caplog):
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}
    for stage, line in ((3, "nothing to do, for weights lie in memory of the host"), (2, "below stage 3")):
        with caplog.at_level("INFO", logger="pyzero"):
            zero_section = {"stage": stage, "offload_param": {"device": "cpu"}}
            pyzero.initialize(model=nn.Linear(2, 2), config={**config, "zero_optimization": zero_section})
        assert line in caplog.text
        caplog.clear()


def left_unsent(group: Any) -> tuple[str, list[float]]:
    """A step on gradients that no_sync() has kept is refused. After they are cleared, a step succeeds."""
    message, found = "", []
    for spoils in (True, False):
        engine = start(3, "fp32")
        engine.set_gradient_accumulation_boundary(True)
        if spoils:
            with engine.no_sync():
                engine.backward(engine(case.batch(0)).sum())
            with pytest.raises(RuntimeError) as caught:
                engine.step()
            message = str(caught.value)
            engine.zero_grad()
        engine.backward(engine(case.batch(1)).sum())
        engine.step()
        found.append(engine.get_global_grad_norm())
    return message, found


def test_a_step_on_what_no_sync_has_kept_is_refused(ranks):
    for message, (after, alone) in ranks.run(WORLD, left_unsent):
        assert "expected a backward outside no_sync() before step() in stage 3" in message
        assert after == alone


class Chosen(nn.Module):
    """Runs the layers that its caller names: blocks by numbers, others by names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, name: int | str) -> torch.Tensor:
        layer: Any = getattr(self, name) if isinstance(name, str) else self.blocks[name]
        return layer(x)


def chosen_layers(group: Any, dtype: str, names: list[int | str], quiet: bool) -> list[torch.Tensor]:
    """Train one layer in each micro-batch of a step. If quiet, only the last one is outside no_sync()."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": 3},
        **SECTIONS[dtype],
    }
    engine = pyzero.initialize(model=Chosen(), config=config)[0]
    for name in names:
        with engine.no_sync() if quiet and name != names[-1] else contextlib.nullcontext():
            engine.backward(engine(torch.ones(1, 4), name).float().sum())
    engine.step()
    return list(engine.get_fp32_state_dict().values())


@pytest.mark.parametrize("dtype", list(SECTIONS))
@pytest.mark.parametrize("names", [[0, 1], ["left", "right"], [0, "left", 1, "right", 0]], ids=str)
def test_no_sync_where_micro_batches_use_other_layers(ranks, dtype, names):
    plain = ranks.run(WORLD, chosen_layers, dtype, names, False)[0]
    for weights in ranks.run(WORLD, chosen_layers, dtype, names, True):
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(weights, plain, strict=True))


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise MemoryError("as planned")


def after_a_broken_backward(group: Any, quiet: bool) -> tuple[str, list[list[torch.Tensor]]]:
    """Leave out a batch whose backward raises on all ranks. Return step()'s error before that, and weights."""
    found, message = [], ""
    for breaks in (True, False):
        engine = start(3, "bf16")
        engine.set_gradient_accumulation_boundary(True)
        train(engine, range(1))
        if breaks:
            hook = engine.module.blocks[0].register_forward_hook(lambda module, args, output: Failing.apply(output))
            with pytest.raises(MemoryError), engine.no_sync() if quiet else contextlib.nullcontext():
                engine.backward(engine(case.batch(9)).sum())
            hook.remove()
            with pytest.raises(RuntimeError) as caught:
                engine.step()
            message = str(caught.value)
            engine.zero_grad()
        train(engine, range(1, 3))
        found.append(list(engine.get_fp32_state_dict().values()))
    return message, found


@pytest.mark.parametrize("quiet", [False, True])
def test_a_batch_whose_backward_raises_is_left_out(ranks, quiet):
    for message, (after, alone) in ranks.run(WORLD, after_a_broken_backward, quiet):
        assert "expected backwards that end" in message
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(after, alone, strict=True))


def save_after_a_broken_forward(group: Any, path: str) -> list[list[torch.Tensor]]:
    """Catch the error of a forward on all ranks, save, and train on. Return weights, and those without the error."""
    found = []
    for breaks in (True, False):
        engine = start(3, "bf16")
        train(engine, range(1))
        if breaks:
            with pytest.raises(RuntimeError):
                engine(torch.ones(8, 3))  # of another width
            assert all(isinstance(param, DTensor) for param in engine.module.parameters())
            engine.save_checkpoint(path)
        train(engine, range(1, 3))
        found.append(list(engine.get_fp32_state_dict().values()))
    return found


def test_a_save_after_a_forward_that_raised(ranks, tmp_path):
    for after, alone in ranks.run(WORLD, save_after_a_broken_forward, str(tmp_path)):
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(after, alone, strict=True))
