"""DeepSpeed's schedules against numbers computed by hand, and against DeepSpeed if it is installed."""

import math
import os
from bisect import bisect_right
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.schedules import SCHEDULES, LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR


def optimizer_of(rates: tuple[float, ...] = (7.0,)) -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def follow(make: Any, num_steps: int, rates: tuple[float, ...] = (7.0,)) -> list[tuple[float, Any]]:
    """Return (rate, betas) of the last group in each step."""
    optimizer = optimizer_of(rates)
    schedule = make(optimizer)
    seen = []
    for _ in range(num_steps):
        seen.append((float(optimizer.param_groups[-1]["lr"]), tuple(optimizer.param_groups[-1]["betas"])))
        optimizer.step()
        schedule.step()
    return seen


def rates_of(make: Any, num_steps: int, rates: tuple[float, ...] = (7.0,)) -> list[float]:
    return [rate for rate, _ in follow(make, num_steps, rates)]


def test_warmup_and_decay():
    """The count starts at -1, so the first two steps run at the minimum."""
    found = rates_of(lambda o: WarmupDecayLR(o, 8, 1.0, 5.0, 4, "linear"), 11)
    assert found == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0]


def test_deepspeeds_count_is_loaded():
    def go_on(optimizer: torch.optim.Adam) -> WarmupDecayLR:
        schedule = WarmupDecayLR(optimizer, 8, 1.0, 5.0, 4, "linear")
        schedule.load_state_dict({"last_batch_iteration": 3})
        assert schedule.get_last_lr() == [4.0]
        return schedule

    assert rates_of(go_on, 3)[1:] == [5.0, 4.0]


def test_warmup_stays_at_each_groups_own_rate():
    found = rates_of(lambda o: WarmupLR(o, warmup_num_steps=2, warmup_type="linear"), 5, (7.0, 3.0))
    assert found == [0.0, 0.0, 1.5, 3.0, 3.0]


def test_log_warmup():
    found = rates_of(lambda o: WarmupLR(o, 0.0, 1.0, 8), 10)
    assert found == pytest.approx(
        [0.0, 0.0, 1 / 3, math.log(3, 8), 2 / 3, math.log(5, 8), *[math.log(k, 8) for k in (6, 7, 8)], 1.0]
    )


def test_cosine():
    """The very first step runs at ratio 0.

    Two steps rise from a quarter, then four steps follow cos(pi/4 * k) down to 0.2.
    """
    found = rates_of(lambda o: WarmupCosineLR(o, 6, 0.25, 2, 0.2, "linear"), 9, (10.0,))
    down = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert found == pytest.approx([0.0, 2.5, 6.25, *[10 * ratio for ratio in down], 2.0, 2.0])
    assert found[4] == pytest.approx(10 * (0.2 + 0.8 / 2))


@pytest.mark.parametrize(("staircase", "wanted"), [(False, [2, 3, 4, 5, 6]), (True, [2, 2, 4, 4, 6])])
def test_range_test(staircase, wanted):
    assert rates_of(lambda o: LRRangeTest(o, 2.0, 2, 1.0, staircase), 5) == wanted


def test_one_cycle():
    """Four steps up, two steps down, then the decay.

    The rate falls as 1 / (1 + k / 2), and the first beta grows as 1 + 0.1 * k / 2.
    """
    decay = dict(decay_lr_rate=1.0, decay_mom_rate=0.1, decay_step_size=2)
    momenta = dict(cycle_min_mom=0.5, cycle_max_mom=0.7)
    steps = dict(cycle_first_step_size=4, cycle_second_step_size=2)
    found = follow(lambda o: OneCycle(o, 1.0, 5.0, **steps, **decay, **momenta), 9)
    assert [rate for rate, _ in found] == pytest.approx([1, 2, 3, 4, 5, 3, 1, 1 / 1.5, 1 / 2])
    first = [0.5, 0.65, 0.6, 0.55, 0.5, 0.6, 0.7, 0.7 * 1.05, 0.7 * 1.1]
    assert [betas for _, betas in found] == [(pytest.approx(beta), 0.99) for beta in first]


def test_a_step_to_an_iteration():
    """In DeepSpeed's count, 0 is the second optimizer step."""
    schedule = WarmupLR(optimizer_of(), 0.0, 4.0, 4, "linear")
    for iteration, wanted in ((1, 1.0), (3, 3.0), (0, 0.0)):
        schedule.step(iteration)
        assert schedule.last_batch_iteration == iteration and schedule.get_lr() == [wanted]
        assert schedule.optimizer.param_groups[0]["lr"] == wanted
    schedule.step()
    assert schedule.last_batch_iteration == 1


def test_readouts_of_ratio_and_momentum():
    cosine = WarmupCosineLR(optimizer_of((10.0,)), 6, 0.25, 2, 0.2, "linear")
    assert cosine.get_lr_ratio() == 0.0
    cosine.step(1)
    assert cosine.get_lr_ratio() == 0.625
    cycle = OneCycle(optimizer_of(), 1.0, 5.0, cycle_first_step_size=4, cycle_min_mom=0.5, cycle_max_mom=0.7)
    assert cycle.get_mom() == [(0.7, 0.99)]
    cycle.step(3)
    assert cycle.get_mom() == [(pytest.approx(0.5), 0.99)] == [cycle.optimizer.param_groups[0]["betas"]]
    assert OneCycle(optimizer_of(), 1.0, 5.0, cycle_momentum=False).get_mom() is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: WarmupLR(o, warmup_num_steps=-5), "warmup_num_steps as a whole number from 1, got -5"),
        (lambda o: WarmupDecayLR(o, 9, warmup_num_steps=None), "warmup_num_steps as a whole number from 1, got None"),
        (lambda o: WarmupCosineLR(o, 9, warmup_num_steps=0), "warmup_num_steps as a whole number from 1, got 0"),
        (
            lambda o: LRRangeTest(o, lr_range_test_step_size=0),
            "lr_range_test_step_size as a whole number from 1, got 0",
        ),
        (lambda o: WarmupLR(o, warmup_type="cosine"), 'warmup_type as "log" or "linear", got \'cosine\''),
    ],
)
def test_schedules_refuse(make, words):
    with pytest.raises(ValueError, match=words):
        make(optimizer_of())


def test_one_cycle_leaves_the_betas_alone():
    found = follow(lambda o: OneCycle(o, 1.0, 5.0, cycle_first_step_size=2, cycle_momentum=False), 6)
    assert [betas for _, betas in found] == [(0.9, 0.999)] * 6
    assert [rate for rate, _ in found] == [1, 3, 5, 3, 1, 1]


def test_one_cycle_in_stairs():
    found = rates_of(lambda o: OneCycle(o, 0.0, 1.0, 0.0, 8, 4, 2, 2, cycle_momentum=False), 13)
    assert found == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0, 0]


def test_a_number_for_each_group():
    assert rates_of(lambda o: LRRangeTest(o, [1.0, 3.0], 1), 2, (7.0, 7.0)) == [3.0, 6.0]
    with pytest.raises(ValueError, match="expected 2 numbers for lr_range_test_min_lr"):
        LRRangeTest(optimizer_of((1.0, 2.0)), [1.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_goes_on_where_it_was(name):
    params = CASES[name][0]
    whole = follow(lambda o: SCHEDULES[name](o, **params), 12)
    optimizer = optimizer_of()
    schedule = SCHEDULES[name](optimizer, **params)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    groups = [dict(group) for group in optimizer.state_dict()["param_groups"]]

    other = optimizer_of()
    resumed = SCHEDULES[name](other, **params)
    other.load_state_dict({**other.state_dict(), "param_groups": groups})
    resumed.load_state_dict(schedule.state_dict())
    for step in range(5, 12):
        assert (other.param_groups[0]["lr"], tuple(other.param_groups[0]["betas"])) == whole[step]
        other.step()
        resumed.step()


def test_it_goes_on_by_its_own_numbers():
    """As in DeepSpeed, only the count is loaded. Rates and lengths come from the resumed run's config."""
    saved = WarmupDecayLR(optimizer_of(), 8, 1.0, 5.0, 4, "linear")
    for _ in range(6):
        saved.optimizer.step()
        saved.step()
    resumed = WarmupDecayLR(optimizer_of(), 104, 1.0, 51.0, 4, "linear")
    resumed.load_state_dict(saved.state_dict())
    assert resumed.get_last_lr() == [50.5]
    resumed.step()
    assert resumed.optimizer.param_groups[0]["lr"] == 50.0
    cosine = WarmupCosineLR(optimizer_of((10.0,)), 6, 0.25, 2, 0.2, "linear")
    cosine.load_state_dict(WarmupCosineLR(optimizer_of((1.0,)), 6, 0.25, 2, 0.2, "linear").state_dict())
    cosine.step()
    assert cosine.get_lr() == [2.5]


CASES: dict[str, list[dict[str, Any]]] = {
    "WarmupLR": [
        {"warmup_min_lr": 0.1, "warmup_max_lr": 0.7, "warmup_num_steps": 7},
        {"warmup_num_steps": 5, "warmup_type": "linear"},
        {"warmup_num_steps": 1},
    ],
    "WarmupDecayLR": [
        {"total_num_steps": 20, "warmup_max_lr": 0.7, "warmup_num_steps": 6},
        {"total_num_steps": 5, "warmup_num_steps": 9, "warmup_type": "linear"},
        {"total_num_steps": 30},
    ],
    "WarmupCosineLR": [
        {"total_num_steps": 20, "warmup_min_ratio": 0.1, "warmup_num_steps": 6, "cos_min_ratio": 0.05},
        {"total_num_steps": 20, "warmup_num_steps": 4, "warmup_type": "linear"},
        {"total_num_steps": 5, "warmup_num_steps": 9},
    ],
    "LRRangeTest": [
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 5, "lr_range_test_step_rate": 3.0},
        {"lr_range_test_step_size": 4, "lr_range_test_staircase": True},
    ],
    "OneCycle": [
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.9, "cycle_first_step_size": 7, "cycle_second_step_size": 5},
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.9,
            "cycle_first_step_size": 8,
            "cycle_first_stair_count": 4,
            "cycle_second_stair_count": 2,
            "decay_step_size": 3,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.01,
            "cycle_min_mom": 0.85,
            "cycle_max_mom": 0.95,
        },
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.9, "cycle_first_step_size": 3, "cycle_momentum": False},
    ],
}


@pytest.mark.parametrize(("name", "index"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_against_deepspeed(name, index):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip("deepspeed.runtime.lr_schedules", reason="deepspeed is not installed")
    params = CASES[name][index]
    mine = follow(lambda o: SCHEDULES[name](o, **params), 40, (0.5,))
    other = follow(lambda o: getattr(theirs, name)(o, **params), 40, (0.5,))
    mine += follow(lambda o: SCHEDULES[name](o, **params, last_batch_iteration=3), 40, (0.5,))
    other += follow(lambda o: getattr(theirs, name)(o, **params, last_batch_iteration=3), 40, (0.5,))
    for (rate, betas), (their_rate, their_betas) in zip(mine, other, strict=True):
        assert rate == pytest.approx(their_rate, rel=1e-12, abs=1e-15)
        assert betas == pytest.approx(their_betas, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_from_a_config(name):
    for params in CASES[name]:
        section = load({"scheduler": {"type": name, "params": params}}).scheduler
        assert section.arguments() == params


GOING_ON = {  # rates and first betas after the first step, by hand; see test_against_deepspeed
    "WarmupLR": ({"warmup_max_lr": 5.0, "warmup_num_steps": 8, "warmup_type": "linear"}, [2.5, 3.125, 3.75], [0.9] * 3),
    "WarmupDecayLR": (
        {"total_num_steps": 12, "warmup_max_lr": 4.0, "warmup_num_steps": 4, "warmup_type": "linear"},
        [4.0, 3.5, 3.0],
        [0.9] * 3,
    ),
    "WarmupCosineLR": (
        {"total_num_steps": 6, "warmup_num_steps": 4, "cos_min_ratio": 0.0},
        [3.5, 0.0, 0.0],
        [0.9] * 3,
    ),
    "LRRangeTest": ({"lr_range_test_min_lr": 1.0, "lr_range_test_step_size": 2}, [3.5, 4.0, 4.5], [0.9] * 3),
    "OneCycle": (
        {"cycle_min_lr": 1.0, "cycle_max_lr": 5.0, "cycle_first_step_size": 4},
        [4.0, 3.0, 2.0],
        [0.825, 0.85, 0.875],
    ),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_a_schedule_that_goes_on_leaves_the_first_rate_alone(name):
    params, rates, betas = GOING_ON[name]
    found = follow(lambda o: SCHEDULES[name](o, **params, last_batch_iteration=3), 4)
    assert [rate for rate, _ in found] == pytest.approx([7.0, *rates], abs=1e-15)
    assert [beta for _, (beta, _) in found] == pytest.approx([0.9, *betas])


def test_torchs_schedules_by_name():
    section = load({"scheduler": {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}}}).scheduler
    assert rates_of(section.make, 5) == [7.0, 7.0, 3.5, 3.5, 1.75]
    assert section.model_dump(exclude_unset=True)["params"] == {"step_size": 2, "gamma": 0.5}
    config = load({"scheduler": {"type": "CyclicLR", "params": {"base_lr": 1, "max_lr": 2, "cycle_momentum": False}}})
    assert config.scheduler_params() == {"base_lr": 1, "max_lr": 2, "cycle_momentum": False}
    assert rates_of(config.scheduler.make, 2) == pytest.approx([1.0, 1.0005])


def test_auto_is_the_default_and_the_end_has_none():
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    config = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    with pytest.raises(ValueError, match="number of optimizer steps"):
        load(config).scheduler.arguments()
    params["total_num_steps"] = 9
    assert load(config).scheduler.arguments() == {"warmup_max_lr": None, "total_num_steps": 9}


IN_TURN = {
    "WarmupLR": lambda o: WarmupLR(o, warmup_num_steps=4),
    "WarmupDecayLR": lambda o: WarmupDecayLR(o, 8, 1.0, 5.0, 4, "linear"),
    "WarmupCosineLR": lambda o: WarmupCosineLR(o, 8, 0.1, 3),
    "LRRangeTest": lambda o: LRRangeTest(o, 1.0, 2),
    "OneCycle": lambda o: OneCycle(o, 1.0, 2.0, cycle_first_step_size=3),
}


def older_step(self: SequentialLR) -> None:
    """Step as SequentialLR of torch 2.6 does: it starts a schedule by step(0) when its turn comes."""
    self.last_epoch += 1
    index = bisect_right(self._milestones, self.last_epoch)
    at_start = (0,) if self.last_epoch in self._milestones else ()
    self._schedulers[index].step(*at_start)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("is_older", [False, True], ids=["step", "step(0)"])
@pytest.mark.parametrize("name", IN_TURN)
def test_in_turn_after_another(monkeypatch, name, is_older):
    """In torch's SequentialLR, each schedule starts as it does alone, from the groups' initial rates."""
    if is_older:
        monkeypatch.setattr(SequentialLR, "step", older_step)
    alone = follow(IN_TURN[name], 9)
    last = follow(lambda o: SequentialLR(o, [ConstantLR(o, 0.5), IN_TURN[name](o)], [3]), 12)
    assert last[3:] == alone
    first = follow(lambda o: SequentialLR(o, [IN_TURN[name](o), ConstantLR(o, 1.0)], [5]), 9)
    assert first[:5] == alone[:5] and [rate for rate, _ in first[5:]] == [7.0] * 4


def test_a_step_to_0_of_the_callers_is_deepspeeds():
    optimizer = optimizer_of()
    schedule = LRRangeTest(optimizer, 1.0, 2)
    optimizer.step()
    schedule.step(0)
    assert schedule.last_batch_iteration == 0 and schedule.get_last_lr() == [1.5]
