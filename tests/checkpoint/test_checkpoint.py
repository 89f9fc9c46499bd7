"""save_checkpoint and load_checkpoint: any number of ranks to any other, bit for bit, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logs import logged
from resume import (
    OPTIMIZERS,
    SAVED_AT,
    STEPS,
    assert_equal,
    build,
    counters,
    make,
    outcome,
    saved,
    step,
    train,
    uninterrupted,
)
from torch import nn

import pyzero
from pyzero.checkpoint import files


def resumed(group: Any, kind: str, dtype: torch.dtype, stage: int, path: Path) -> list[Any]:
    """Over a model that has other weights."""
    model = build(dtype, 1)
    optimizer = make(kind, model, group, stage=stage, bucket_cap_mb=1e-3)
    extra = pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    train(optimizer, model, range(extra["step"], STEPS), group)
    return [*outcome(optimizer, model), int(extra["seed"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_goes_on_bit_for_bit(ranks, tmp_path, size, kind, dtype):
    ranks.run(size, saved, kind, dtype, 1 + size % 2, tmp_path)
    wanted = ranks.run(size, uninterrupted, kind, dtype)[0]
    assert wanted[0][1] == 1  # a step was skipped before the save
    for other in (1, 2, 3, 4):
        for rank, got in enumerate(ranks.run(other, resumed, kind, dtype, 2 - size % 2, tmp_path)):
            assert_equal(got, [*wanted, rank if other == size else 0])


def test_training_goes_on_while_it_is_saved(ranks, tmp_path):
    ranks.run(3, saved, "adamw", torch.bfloat16, 2, tmp_path, False)
    wanted = ranks.run(3, uninterrupted, "adamw", torch.bfloat16)[0]
    for got in ranks.run(2, resumed, "adamw", torch.bfloat16, 1, tmp_path):
        assert_equal(got[:-1], wanted)


def masters_after(group: Any, dtype: torch.dtype, path: Path) -> list[Any]:
    model = build(dtype, 1)
    optimizer = make("adamw", model, group)
    pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    return [optimizer.full_state(param) for param in model.parameters()]


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_keep_the_masters(ranks, tmp_path, before, after):
    ranks.run(2, saved, "adamw", before, 2, tmp_path)
    wanted = ranks.run(2, masters_after, before, tmp_path)[0]
    for got in ranks.run(3, masters_after, after, tmp_path):
        assert_equal(got, wanted)


def make_other(group: Any, path: Path, change: str) -> Any:
    """What load_checkpoint says of a model that is not the saved one; nothing changes."""
    model = build(torch.bfloat16, 1)
    if change == "shape":
        model.weights[1] = nn.Parameter(torch.zeros(71, dtype=torch.bfloat16))
    elif change == "more":
        model.weights.append(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    elif change == "fewer":
        model.weights = nn.ParameterList(list(model.weights)[:4])
    optimizer = make("lion" if change == "rule" else "adamw", model, group)
    if change == "groups":
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    before = outcome(optimizer, model)
    try:
        pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    except pyzero.CheckpointError as error:
        assert_equal(outcome(optimizer, model), before)
        pyzero.load_checkpoint(path, model=model, optimizer=optimizer, strict=False)
        return str(error), before, outcome(optimizer, model)
    return "no error"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", "of another shape: optim.state.weights.1.exp_avg [70], wanted [71]"),
        ("more", "missing: model.weights.6"),
        ("fewer", "unexpected: model.weights.4"),
        ("rule", "of the update rule adam, wanted lion; unexpected: optim.state.weights.0.exp_avg_sq"),
        ("groups", "group 0 holds parameters of the saved groups [0, 1], which differ"),
    ],
)
def test_another_model_is_reported_before_anything_changes(ranks, tmp_path, change, said):
    ranks.run(2, saved, "adamw", torch.bfloat16, 2, tmp_path)
    for text, before, after in ranks.run(3, make_other, tmp_path, change):
        assert said in text and "strict=False" in text
        assert str(before) != str(after)
        if change == "more":
            for key in ("exp_avg", "master"):
                assert torch.equal(after[1]["state"][3][key], before[1]["state"][3][key])


class Counted(nn.Module):
    """A weight, a buffer, a frozen parameter and extra state, all of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((70,), value))
        self.frozen = nn.Parameter(torch.full((3,), value), requires_grad=False)
        self.register_buffer("mean", torch.full((5,), value))
        self.extra = value

    def get_extra_state(self) -> dict[str, float]:
        return {"extra": self.extra}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.extra = state["extra"]

    def values(self) -> list[float]:
        return [self.extra, *(float(v) for t in (self.weight, self.frozen, self.mean) for v in t.detach().unique())]


def refused_by_the_optimizer(group: Any, path: Path) -> tuple[str, list[float]]:
    """Saved with an option that no load takes."""
    model = Counted(1.0)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    optimizer.param_groups[0]["amsgrad"] = True
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    other = Counted(2.0)
    optimizer = pyzero.FusedZeroAdamW(other.parameters(), process_group=group)
    with pytest.raises(ValueError, match="not supported") as caught:
        pyzero.load_checkpoint(path, model=other, optimizer=optimizer)
    return str(caught.value), other.values()


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_changes_where_the_optimizer_refuses(ranks, tmp_path, size):
    for said, values in ranks.run(size, refused_by_the_optimizer, tmp_path):
        assert "amsgrad=True" in said and values == [2.0] * 4


def between_steps(group: Any, path: Path) -> str:
    model = build(torch.bfloat16, 0)
    optimizer = make("adamw", model, group)
    step(optimizer, model, 0, group.rank(), group.size())
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    optimizer.backward(sum(param.sum() for param in model.parameters()))
    try:
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=2)
    except pyzero.CheckpointError as error:
        optimizer.zero_grad()
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=3)
        return str(error)
    return "no error"


def test_a_save_between_backward_and_step_is_refused(ranks, tmp_path):
    for text in ranks.run(2, between_steps, tmp_path):
        assert "got one after a backward, whose gradients would be lost" in text


def in_an_accumulation(group: Any, path: Path) -> tuple[bool, bool]:
    models = [build(torch.bfloat16, 0) for _ in range(3)]
    optimizers = [make("adamw", model, group) for model in models]
    for saves, model, optimizer in zip((False, True), models, optimizers, strict=False):
        step(optimizer, model, 0, group.rank(), group.size())
        optimizer.zero_grad()
        optimizer.backward(sum(param.square().sum() for param in model.parameters()))
        if saves:
            pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1, exclude_gradients=True)
        optimizer.backward(sum(param.sum() for param in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    same_step = all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    pyzero.load_checkpoint(path, model=models[1], optimizer=optimizers[1])
    step(optimizers[2], models[2], 0, group.rank(), group.size())
    return same_step, all(map(torch.equal, models[1].parameters(), models[2].parameters()))


@pytest.mark.parametrize("size", [1, 2])
def test_a_save_in_an_accumulation_leaves_gradients_where_they_are(ranks, tmp_path, size):
    assert ranks.run(size, in_an_accumulation, tmp_path) == [(True, True)] * size


def lone(path: Path, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(3, 2)
    return model, pyzero.FusedZeroAdamW(model.parameters(), **options)


def test_the_newest_are_kept(tmp_path):
    model, optimizer = lone(tmp_path)
    assert pyzero.latest_checkpoint(tmp_path) is None
    for number in (1, 2, 3, 10, 4):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=number, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_3", "step_10", "step_4"}
    assert pyzero.latest_checkpoint(tmp_path) == tmp_path / "step_4"
    assert pyzero.load_checkpoint(tmp_path / "step_10", model=model, optimizer=optimizer)["step"] == 10


def test_the_newest_are_kept_where_the_clock_was_set_back(tmp_path):
    model, optimizer = lone(tmp_path)
    for number in (9, 10, 11, 12):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=number, keep=2)
        if number < 11:
            os.utime(tmp_path / f"step_{number}" / "index.json", (4e9 + number, 4e9 + number))
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_11", "step_12"}
    for number in (11, 12):  # a file system whose times are seconds, or a copy of the folder
        os.utime(tmp_path / f"step_{number}" / "index.json", (4e9, 4e9))
    for number in (100, 3):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=number, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_12", "step_100", "step_3"}


def test_the_newest_are_kept_where_all_have_one_time(tmp_path, monkeypatch):
    """As of saves within a second, on a file system whose times are seconds."""
    model, optimizer = lone(tmp_path)
    write = files.write_file

    def write_in_one_second(path: Path, content: bytes) -> None:
        write(path, content)
        os.utime(path, (4e9, 4e9))

    monkeypatch.setattr(files, "write_file", write_in_one_second)
    for number in (9, 100, 3, 2):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=number, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_3", "step_2"}


def test_a_link_to_a_checkpoint_elsewhere_is_pruned_alone(tmp_path):
    model, optimizer = lone(tmp_path)
    path, moved = tmp_path / "saved", tmp_path / "moved"
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=1)
    (path / "step_1").rename(moved)
    (path / "step_1").symlink_to(moved)
    for number in (2, 3):
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=number, keep=1)
    assert {path.name for path in path.iterdir()} == {"latest", "step_3"}
    assert pyzero.load_checkpoint(moved, model=model, optimizer=optimizer)["step"] == 1


def test_a_step_is_saved_again_in_its_place(tmp_path):
    model, optimizer = lone(tmp_path)
    for word, number in (("before", 70), ("first", 7), ("second", 7)):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=number, word=word)
    assert pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)["word"] == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step_70", "step_7.1"}


def test_what_is_refused(tmp_path):
    model, optimizer = lone(tmp_path)
    with pytest.raises(pyzero.CheckpointError, match="expected a checkpoint in .*, got none"):
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    with pytest.raises(TypeError, match="expected tensors, numbers.* in extra, got more: .*Linear"):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, layer=model)
    with pytest.raises(TypeError, match="expected tensors, numbers.* in extra, got more: .*lambda"):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, act=lambda: 1)
    for keep in (0, "3"):
        with pytest.raises(ValueError, match="expected keep as a whole number from 1 on"):
            pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, keep=keep)
    with pytest.raises(TypeError, match="expected optimizer as one of pyzero's, got AdamW"):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()), step=1)
    with pytest.raises(TypeError, match="expected model as a module, got OrderedDict"):
        pyzero.save_checkpoint(tmp_path, model=model.state_dict(), optimizer=optimizer, step=1)
    with pytest.raises(ValueError, match="got one without 2 of 2"):
        pyzero.save_checkpoint(tmp_path, model=nn.Linear(3, 2), optimizer=optimizer, step=1)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_plain_data(tmp_path):
    """A schedule that calls numpy gives them as rates, and in its own state dict."""
    model, optimizer = lone(tmp_path, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(0.1 * step))
    optimizer.step()
    scheduler.step()
    extra = {"schedule": scheduler.state_dict(), "best": (np.float32(0.5), [np.int64(3), np.bool_(True)])}
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, **extra)
    optimizer.param_groups[0]["lr"] = 0.0
    loaded = pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert loaded["best"] == (0.5, [3, True]) and loaded["schedule"]["_last_lr"] == [np.cos(0.1)]
    assert optimizer.param_groups[0]["lr"] == np.cos(0.1)


def test_rates_that_differ_in_the_last_digits_are_told_apart(tmp_path):
    """Tensors print four digits."""
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    rates = [torch.tensor(1.23451e-4), torch.tensor(1.23452e-4)]
    groups = [{"params": [*one.parameters()], "lr": lr} for one, lr in zip(model, rates, strict=True)]
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=pyzero.FusedZeroAdamW(groups), step=1)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    with pytest.raises(pyzero.CheckpointError, match=r"group 0 holds parameters of the saved groups \[0, 1\]"):
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "said"),
    [
        (pyzero.FusedZeroAdamW, pyzero.FusedZeroLion, "to leave these out, which drops the saved exp_avg_sq"),
        (
            pyzero.FusedZeroSGD,
            pyzero.FusedZeroAdamW,
            "which drops the saved momentum_buffer and goes on with exp_avg, exp_avg_sq as in this optimizer",
        ),
    ],
)
def test_what_is_lost_of_another_rules_state_is_said(tmp_path, saved_by, loaded_by, said):
    model = nn.Linear(3, 2)
    options = {"momentum": 0.9} if saved_by is pyzero.FusedZeroSGD else {}
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=saved_by(model.parameters(), **options), step=1)
    with pytest.raises(pyzero.CheckpointError, match=said):
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=loaded_by(model.parameters()))


def test_rules_with_the_same_state_are_told_apart(tmp_path):
    model, optimizer = lone(tmp_path, lr=0.5)
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    lamb = pyzero.ZeroLamb(model.parameters(), lr=0.25)
    with pytest.raises(pyzero.CheckpointError, match="got others: of the update rule adam, wanted lamb. Build"):
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=lamb)
    options = dict(lamb.param_groups[0])
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=lamb, strict=False)
    assert lamb.param_groups[0] == options
    with logged() as lines:
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=pyzero.FusedZeroAdamW(model.parameters()))
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=pyzero.FusedZeroAdam(model.parameters()))
    (line,) = (line for line in lines if "goes on" in line)
    assert "group 0 goes on with decoupled_weight_decay=True, as it was saved" in line


def test_schedulers_and_generators_come_back(tmp_path):
    model, optimizer = lone(tmp_path, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    state = torch.get_rng_state()
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, sched=scheduler.state_dict(), rng=state)
    other, resumed_optimizer = lone(tmp_path, lr=1.0)
    resumed_scheduler = torch.optim.lr_scheduler.StepLR(resumed_optimizer, 1, 0.5)
    extra = pyzero.load_checkpoint(tmp_path, model=other, optimizer=resumed_optimizer)
    resumed_scheduler.load_state_dict(extra["sched"])
    assert torch.equal(extra["rng"], state)
    assert resumed_optimizer.param_groups[0]["lr"] == 0.5 == resumed_scheduler.get_last_lr()[0]


def test_torch_loads_it_without_us(tmp_path):
    """dcp.load, into a plain model and torch's AdamW."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = lone(tmp_path)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other = nn.Linear(3, 2)
    theirs = torch.optim.AdamW(other.parameters(), lr=1.0)
    state = dict(zip(("model", "optim"), get_state_dict(other, theirs), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(other, theirs, model_state_dict=state["model"], optim_state_dict=state["optim"])
    for param, mine in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(param, mine)
        for key, value in theirs.state[param].items():
            assert torch.equal(value, optimizer.full_state(mine)[key])
    assert theirs.param_groups[0]["lr"] == 1e-3


def test_tied_and_frozen_parameters_and_wrappers(tmp_path):
    def make_tied() -> tuple[nn.Module, Any]:
        model = nn.ModuleDict(
            {"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "norm": nn.LayerNorm(4)}
        )
        model["head"].weight = model["embed"].weight
        model["norm"].requires_grad_(False)
        return model, pyzero.FusedZeroAdamW(model.parameters())

    model, optimizer = make_tied()
    with torch.no_grad():
        model["norm"].weight.fill_(3.0)
        model["head"].weight.fill_(2.0)
    pyzero.save_checkpoint(tmp_path, model=torch.compile(model), optimizer=optimizer, step=1)
    other, resumed_optimizer = make_tied()
    pyzero.load_checkpoint(tmp_path, model=other, optimizer=resumed_optimizer)
    assert (other["norm"].weight == 3).all() and (other["embed"].weight == 2).all()
    assert other["embed"].weight is other["head"].weight


class CopiedState(nn.Module):
    """Its state dict has copies, as one that moves everything to the CPU, or makes the file smaller, or leaves out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.trained, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.tied = nn.ParameterDict({"weight": self.trained.weight})
        self.register_buffer("mean", torch.zeros(3))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        if self.how == "without":
            return {name: value for name, value in state.items() if "trained" not in name}
        return {
            name: value.clone().to(torch.bfloat16 if self.how == "smaller" else None) for name, value in state.items()
        }


@pytest.mark.parametrize("how", ["copies", "smaller", "without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_copies_is_loaded_into_the_model(tmp_path, dtype, how):
    model = CopiedState(how).to(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    model.trained(torch.ones(1, 3, dtype=dtype)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.mean.fill_(7.0)
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other = CopiedState(how).to(dtype)
    resumed_optimizer = pyzero.FusedZeroAdamW(other.parameters())
    pyzero.load_checkpoint(tmp_path, model=other, optimizer=resumed_optimizer)
    assert torch.equal(other.mean, model.mean)
    assert torch.equal(other.frozen.weight.bfloat16(), model.frozen.weight.bfloat16())
    for mine, wanted in zip(other.trained.parameters(), model.trained.parameters(), strict=True):
        assert torch.equal(mine, wanted)
        assert torch.equal(resumed_optimizer.full_master(mine), optimizer.full_master(wanted))


@pytest.mark.parametrize("how", ["parameter", "buffer", "unsaved"])
def test_a_sparse_tensor_is_told_of_by_name(tmp_path, how):
    model = nn.Linear(3, 3)
    sparse = torch.eye(3).to_sparse()
    if how == "parameter":
        model.graph = nn.Parameter(sparse, requires_grad=False)
    else:
        model.register_buffer("graph", sparse, persistent=how == "buffer")
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    model(torch.sparse.mm(model.graph, torch.ones(3, 3))).sum().backward()
    optimizer.step()
    if how == "unsaved":
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
        return
    with pytest.raises(pyzero.CheckpointError, match=r"got graph as torch.sparse_coo; .*persistent=False"):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)


def test_a_quantized_buffer_is_told_of_by_name(tmp_path):
    model = nn.Linear(3, 3)
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8))
    with pytest.raises(pyzero.CheckpointError, match=r"got table as torch.qint8; .*persistent=False"):
        pyzero.save_checkpoint(tmp_path, model=model, optimizer=pyzero.FusedZeroAdamW(model.parameters()), step=0)


def test_a_conjugate_view_is_saved(tmp_path):
    model = nn.Linear(3, 3)
    model.register_buffer("angles", torch.randn(5, dtype=torch.complex64).conj())
    wanted, optimizer = model.angles.clone(), pyzero.FusedZeroAdamW(model.parameters())
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)
    model.angles = torch.zeros(5, dtype=torch.complex64)
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert torch.equal(model.angles, wanted)


def test_counters_of_the_loss_scale(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), loss_scale=pyzero.LossScale(init_scale=8.0))
    optimizer.backward((model(torch.ones(1, 3)) * float("inf")).sum())
    optimizer.step()
    optimizer.zero_grad()
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    again = pyzero.FusedZeroAdamW(model.parameters(), loss_scale=pyzero.LossScale(init_scale=64.0))
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=again)
    assert counters(again) == [4.0, 1]


@pytest.mark.parametrize("how", ["checkpoint", "full_state_dict", "state_dict"])
def test_a_run_without_a_loss_scale_leaves_none_to_one_with(tmp_path, how):
    """bf16 to fp16, whose gradients would be lost at a scale of 1, and back; skips count on."""

    def trained(dtype: torch.dtype) -> Any:
        model = nn.Linear(3, 2).to(dtype)
        return model, pyzero.FusedZeroAdamW(model.parameters())

    def scale_after(before: torch.dtype, after: torch.dtype) -> list[float]:
        (model, optimizer), (other, resumed_optimizer) = trained(before), trained(after)
        optimizer.backward((model(torch.ones(1, 3, dtype=before)) * float("inf")).sum())
        optimizer.step()
        optimizer.zero_grad()
        if how == "checkpoint":
            pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
            pyzero.load_checkpoint(tmp_path, model=other, optimizer=resumed_optimizer)
        else:
            resumed_optimizer.load_state_dict(getattr(optimizer, how)())
        return [*counters(optimizer), *counters(resumed_optimizer)]

    half, brain = torch.float16, torch.bfloat16
    assert scale_after(brain, half) == [1.0, 1, 2.0**16, 1]
    assert scale_after(half, brain) == [2.0**15, 1, 1.0, 1]
    assert scale_after(half, half) == [2.0**15, 1, 2.0**15, 1]


def loaded_with_another_trained(group: Any, path: Path) -> tuple[str, list[Any]]:
    """What a load says where weights.0 trains only here, and its state after the load that it asks for."""
    model = build(torch.bfloat16, 0)
    model.weights[0].requires_grad_(False)
    optimizer = make("adamw", model, group)
    train(optimizer, model, range(SAVED_AT), group)
    pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=SAVED_AT)
    model = build(torch.bfloat16, 1)
    optimizer = make("adamw", model, group)
    with pytest.raises(pyzero.CheckpointError) as raised:
        pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    model.weights[0].requires_grad_(False)
    optimizer = make("adamw", model, group)
    pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    return str(raised.value), [bool(optimizer.full_state(model.weights[0]))]


def test_a_load_with_another_trained_says_what_to_do(ranks, tmp_path):
    said = "train there (build the optimizer with them frozen, and unfreeze them after the load): weights.0."
    for text, (has_state,) in ranks.run(2, loaded_with_another_trained, tmp_path):
        assert said in text and "missing" not in text and "unexpected" not in text
        assert not has_state


def loaded_frozen(group: Any, dtype: torch.dtype, path: Path) -> list[Any]:
    """Over a model in which two weights are frozen until after the load."""
    model = build(dtype, 1)
    for index in (0, 4):
        model.weights[index].requires_grad_(False)
    optimizer = make("adamw", model, group, bucket_cap_mb=1e-3)
    pyzero.load_checkpoint(path, model=model, optimizer=optimizer)
    assert [index for index, param in enumerate(model.weights) if not param.requires_grad] == [0, 4]
    model.requires_grad_(True)
    train(optimizer, model, range(SAVED_AT, STEPS), group)
    return outcome(optimizer, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_a_load_keeps_the_state_of_what_is_frozen_at_the_time(ranks, tmp_path, size, dtype):
    """As load_state_dict does."""
    ranks.run(2, saved, "adamw", dtype, 2, tmp_path)
    wanted = ranks.run(2, uninterrupted, "adamw", dtype)[0]
    for got in ranks.run(size, loaded_frozen, dtype, tmp_path):
        assert_equal(got, wanted)


def test_state_of_parameters_that_the_optimizer_lacks_is_told_and_may_be_left_out(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    pyzero.save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    optimizer = pyzero.FusedZeroAdamW(model[0].parameters())
    with pytest.raises(pyzero.CheckpointError) as raised:
        pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    said = "do not train here (strict=True keeps it for those that the optimizer has): 1.bias, 1.weight. Build"
    assert said in str(raised.value) and "missing" not in str(raised.value) and "unexpected" not in str(raised.value)
    model[1].requires_grad_(False)  # as the base under an adapter, whose state would take three times its memory
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer, strict=False)
    assert not optimizer.full_state(model[1].weight) and optimizer.full_state(model[0].weight)
