"""State that goes from any number of ranks to any other, and to torch's optimizers and back."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from logs import logged
from resume import OPTIMIZERS, SAVED_AT, STEPS, assert_equal, build, counters, make, step
from torch import nn

import pyzero


def saved(group: Any, kind: str, dtype: torch.dtype, to: int | None) -> dict[str, Any]:
    model = build(dtype, 0)
    optimizer = make(kind, model, group, stage=2, bucket_cap_mb=4e-4)
    for number in range(SAVED_AT):
        step(optimizer, model, number, group.rank(), group.size())
    return optimizer.full_state_dict(to=to)


def resumed(group: Any, kind: str, dtype: torch.dtype, stage: int, state: dict[str, Any] | None) -> list[Any]:
    """From a state, over a model that has other weights; or from the start."""
    model = build(dtype, 0 if state is None else 1)
    optimizer = make(kind, model, group, stage=stage, bucket_cap_mb=1e-3)
    if state is not None:
        optimizer.load_state_dict(state)
    for number in range(SAVED_AT if state is not None else 0, STEPS):
        step(optimizer, model, number, group.rank(), group.size())
    return [*counters(optimizer), optimizer.full_state_dict(), [param.detach().clone() for param in model.parameters()]]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_goes_on_bit_for_bit(ranks, size, kind, dtype):
    state = through_a_file(ranks.run(size, saved, kind, dtype, None)[-1])
    wanted = ranks.run(size, resumed, kind, dtype, 2, None)[0]
    assert wanted[1] == 1  # a step was skipped before the save
    for other, stage in ((1, 1), (2, 1), (3, 2), (4, 2)):
        for got in ranks.run(other, resumed, kind, dtype, stage, state):
            assert_equal(got, wanted)


def test_one_rank_may_have_it_alone(ranks):
    states = ranks.run(3, saved, "adamw", torch.bfloat16, 1)
    assert [len(state) > 0 for state in states] == [False, True, False]
    assert_equal(states[1], ranks.run(3, saved, "adamw", torch.bfloat16, None)[0])
    assert all(value.device.type == "cpu" for value in states[1]["state"][0].values())


def test_torch_takes_it_and_gives_it_back(ranks):
    state = ranks.run(2, saved, "adamw", torch.float32, None)[0]
    model = build(torch.float32, 1)
    params = [param for i in range(2) for param in list(model.parameters())[i::2]]
    theirs = torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=1.0)
    theirs.load_state_dict(state)
    for index, param in enumerate(params):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(theirs.state[param][name], state["state"][index][name]), name
    assert [group["lr"] for group in theirs.param_groups] == [2.0**-5, 2.0**-6]
    back = ranks.run(3, loaded, theirs.state_dict())[0]
    for index in range(len(params)):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(back["state"][index][name], state["state"][index][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_what_torch_goes_on_from_is_not_taken_back(num_steps, dtype, caplog):
    """torch.optim.AdamW carries the masters that it is given along, and trains the weights."""
    model = nn.Linear(3, 2).to(dtype)
    model.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)  # no optimizer has state of it
    ours, theirs = pyzero.FusedZeroAdamW(model.parameters(), lr=0.5), torch.optim.AdamW(model.parameters())
    for optimizer, num in ((ours, num_steps), (theirs, 3)):
        if optimizer is theirs:
            theirs.load_state_dict(through_a_file(ours.full_state_dict()))
        for _ in range(num):
            model(torch.ones(1, 3, dtype=dtype)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    other = copy.deepcopy(model)
    back = pyzero.FusedZeroAdamW(other.parameters())
    back.load_state_dict(theirs.state_dict())
    for mine, trained in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, trained) and torch.equal(back.full_master(mine), trained.float())
        assert not mine.requires_grad or float(back.full_state(mine)["step"]) == num_steps + 3
    assert "master_steps" not in back.param_groups[0]
    assert "2 of the masters that were loaded are of an earlier step" in caplog.text


def test_a_state_dict_that_is_kept_and_saved_later_keeps_its_masters():
    """It is of this optimizer's memory: what is saved is of the step at which it is saved, masters too."""
    param = nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdamW([param], lr=1e-3)

    def step() -> None:
        param.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = optimizer.state_dict()
    step()
    other = nn.Parameter(param.detach().clone())
    resumed = pyzero.FusedZeroAdamW([other])
    resumed.load_state_dict(through_a_file(kept))
    assert torch.equal(resumed.full_master(other), optimizer.full_master(param))
    assert not torch.equal(resumed.full_master(other), other.float())


def test_a_damaged_note_of_steps_is_none():
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdamW([param])
    state = optimizer.full_state_dict()
    for note in ("{", "[1", "7", None, ["x"]):
        state["param_groups"][0]["master_steps"] = note
        optimizer.load_state_dict(state)


def loaded(group: Any, state: dict[str, Any]) -> dict[str, Any]:
    optimizer = make("adamw", build(torch.float32, 1), group)
    optimizer.load_state_dict(state)
    assert (optimizer.consolidate_state_dict() == {}) is (group.rank() > 0)
    return optimizer.full_state_dict()


def test_what_does_not_fit_is_refused():
    model = build(torch.float32, 0)
    optimizer = make("adamw", model, None)
    with pytest.raises(ValueError, match="expected to as a rank from 0 to 0, or None, got 3"):
        optimizer.full_state_dict(to=3)
    state = optimizer.full_state_dict()
    state["state"][0]["master"] = torch.zeros(5)
    before = optimizer.full_state_dict()
    with pytest.raises(ValueError, match=r"expected master of parameter 0 with shape \(17, 9\), got \(5,\)"):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.full_state_dict(), before)


NO_STEPS = ["text", None, torch.tensor(torch.nan), torch.inf, -1, [1], torch.ones(2), 1j]
NO_VALUES = [torch.ones(17, 9) * 1j, torch.ones(17, 9).to_sparse(), torch.ones(17, 9, device="meta")]


@pytest.mark.parametrize(
    ("key", "value"), [*[("step", value) for value in NO_STEPS], *[("exp_avg", value) for value in NO_VALUES]], ids=repr
)
def test_values_that_no_state_can_have_are_refused_before_anything_is_written(key, value):
    model = build(torch.float32, 0)
    first = next(model.parameters())
    optimizer = make("adamw", model, None)
    before = optimizer.full_state_dict()
    state = copy.deepcopy(before)
    for values in state["state"].values():
        values["exp_avg_sq"] += 1.0
    state["state"][0][key] = value
    said = "expected (the )?step.* as a number" if key == "step" else "exp_avg.* as a dense tensor of real values"
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=said):
        optimizer.set_full_state(first, {"exp_avg_sq": torch.ones_like(first), key: value})
    assert_equal(optimizer.full_state_dict(), before)


@pytest.mark.parametrize("key", ["state", "param_groups"])
@pytest.mark.parametrize("value", ["text", None, 5, {0: 1}, [2]])
def test_what_has_not_the_form_of_a_state_dict_is_refused(key, value):
    optimizer = pyzero.FusedZeroAdamW(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match=f"expected a .* at '{key}' of a state dict, got"):
        optimizer.load_state_dict({**optimizer.state_dict(), key: value})


@pytest.mark.parametrize("given", [None, [1, 2], "best.pt"])
def test_what_is_no_state_dict_is_refused_by_its_value(given):
    with pytest.raises(ValueError, match=f"expected an optimizer's state dict, .*got {re.escape(repr(given))}; pass"):
        pyzero.FusedZeroAdamW(nn.Linear(3, 2).parameters()).load_state_dict(given)


@pytest.mark.parametrize("kind", ["amsgrad", "other", "model"])
def test_state_of_another_kind_is_refused(kind):
    model = nn.Linear(3, 2)
    theirs = torch.optim.NAdam(model.parameters()) if kind == "other" else torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    theirs.step()
    state = model.state_dict() if kind == "model" else theirs.state_dict()
    if kind == "amsgrad":
        state["param_groups"][0]["amsgrad"] = True
    said = {
        "amsgrad": "got amsgrad=True, which is not supported",
        "other": "got mu_product of parameter 0, which the rule adam has not",
        "model": "expected an optimizer's state dict, of keys 'state' and 'param_groups', got keys",
    }
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=said[kind]):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("exported", ["state_dict", "full_state_dict"])
def test_state_of_another_rule_is_refused(exported):
    """Lamb's has the names and shapes of Adam's."""
    model = nn.Linear(3, 2)
    state = getattr(pyzero.ZeroLamb(model.parameters()), exported)()
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match="expected the state of the update rule adam, got that of lamb"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5 and "max_coeff" not in optimizer.param_groups[0]


def test_a_torch_optimizers_caller_may_have_our_names():
    model = nn.Linear(3, 2)
    own = {"rule": "mine", "zero": 0, "scaler": 2.0, "master_steps": 7}
    theirs = torch.optim.AdamW([{"params": [*model.parameters()], **own}], lr=0.25)
    model(torch.ones(1, 3)).sum().backward()
    theirs.step()
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    optimizer.load_state_dict(theirs.state_dict())
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25 and not own.keys() & group.keys()
    assert torch.equal(optimizer.full_state(model.weight)["exp_avg"], theirs.state[model.weight]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())


def load_spoiled(group: Any) -> list[str]:
    """Rank 1 has a path in place of a state dict, or one of which a value makes no sense."""
    optimizer = pyzero.FusedZeroAdamW(nn.Linear(3, 2).parameters(), process_group=group)
    state = optimizer.full_state_dict()
    found = []
    for key, value in ((None, "best.pt"), ("exp_avg", "x"), ("step", "x"), ("state", 3)):
        spoiled = value if key is None else copy.deepcopy(state)
        if key is not None:
            (spoiled if key == "state" else spoiled["state"][0])[key] = value
        try:
            optimizer.load_state_dict(spoiled if group.rank() else state)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_rank_that_cannot_load_leaves_no_other_waiting(ranks):
    found, of_rank_1 = ranks.run(2, load_spoiled)
    assert all("nothing was loaded, for rank 1 could not" in text for text in found)
    assert "got 'best.pt'" in of_rank_1[0] and "expected exp_avg of parameter 0 as a tensor, got 'x'" in of_rank_1[1]
    assert all("no error" not in text for text in of_rank_1)


def partly_saved(group: Any, options: dict[str, Any], savers: list[int]) -> list[str]:
    """Warnings of three steps, behind the first two of which some ranks call state_dict()."""
    with logged() as lines:
        model = build(torch.float32, 0)
        optimizer = make("adamw", model, group, **options)
        for number in range(3):
            step(optimizer, model, number, 0, 1)
            optimizer.full_state_dict(to=0)
            if group.rank() in savers:
                optimizer.state_dict()
        return [line for line in lines if "state_dict" in line]


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"reduce_grads": False}], ids=str)
def test_a_state_dict_of_some_ranks_is_warned_of_once(ranks, options):
    first, *others = ranks.run(3, partly_saved, options, [0])
    (line,) = first
    assert "on some ranks only, and not on ranks [1, 2] of 3" in line and "pyzero.save_checkpoint()" in line
    assert others == [[], []]
    assert ranks.run(3, partly_saved, options, [0, 1, 2]) == [[], [], []]


def test_later_steps_leave_it_alone():
    model = build(torch.float32, 0)
    optimizer = make("adamw", model, None, stage=2)
    whole = optimizer.full_state_dict()
    before = copy.deepcopy(whole)
    step(optimizer, model, 0, 0, 1)
    assert_equal([whole], [before])


def test_a_rate_that_was_saved_or_loaded_is_a_copy():
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdamW([param], lr=torch.tensor(0.5))
    first = optimizer.full_state_dict()
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert first["param_groups"][0]["lr"] == 0.5
    optimizer.load_state_dict(first)
    optimizer.param_groups[0]["lr"].mul_(0.25)
    assert first["param_groups"][0]["lr"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.125


def while_a_layer_is_frozen(group: Any, way: str, dtype: torch.dtype, stage: int, model_first: bool) -> list[Any]:
    """Weights of a run that goes on, and of one that resumes in a phase in which a layer is frozen that has trained."""

    def make_net() -> tuple[nn.Sequential, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        return model, lambda: pyzero.FusedZeroAdamW(model.parameters(), lr=0.1, process_group=group, stage=stage)

    def train(model: nn.Module, optimizer: Any, num_steps: int) -> None:
        for number in range(num_steps):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(9 * number + group.rank()))
            (model(x.to(dtype)).float() - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, build_optimizer = make_net()
    optimizer = build_optimizer()
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    train(model, optimizer, 2)
    state = copy.deepcopy(getattr(optimizer, way)())
    other, build_optimizer = make_net()
    other[0].requires_grad_(False)
    if model_first:
        other.load_state_dict(model.state_dict())
    before = other[0].weight.detach().clone()
    resumed = build_optimizer()
    resumed.load_state_dict(state)
    assert not other[0].weight.requires_grad
    assert torch.equal(other[0].weight, before)  # as with torch.optim: frozen weights are the model's
    if not model_first:
        other.load_state_dict(model.state_dict())
    for one, its_optimizer in ((model, optimizer), (other, resumed)):
        train(one, its_optimizer, 1)
        one[0].requires_grad_(True)
        train(one, its_optimizer, 2)
    return [[param.detach() for param in one.parameters()] for one in (model, other)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "full_state_dict"])
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_state_of_a_layer_that_is_frozen_for_a_while_is_loaded(ranks, size, stage, model_first, way, dtype):
    for wanted, got in ranks.run(size, while_a_layer_is_frozen, way, dtype, stage, model_first):
        assert_equal(got, wanted)
