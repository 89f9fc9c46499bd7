"""Skipped steps: who is told what, and when the run ends."""

import copy
import math
import re
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from logs import logged
from ranks import ON_GPU
from torch import nn

import pyzero
from pyzero.loss_scale.overflow import OverflowMonitor

told_at_once = pytest.mark.skipif(ON_GPU, reason="hosts of GPUs hear of a skipped step one or two steps later")


def bad_on_one_rank(group: Any, stage: int, dtype: torch.dtype, transport: str, bad_rank: int) -> dict[str, Any]:
    """Parameter "middle" overflows on one rank in the second of three steps."""
    with logged() as lines:
        names = ("first", "middle", "last")
        params = {name: nn.Parameter(torch.ones(40 + 40 * i, dtype=dtype)) for i, name in enumerate(names)}
        optimizer = pyzero.FusedZeroAdam(
            list(params.items()),
            process_group=group,
            stage=stage,
            transport=transport,
            bucket_cap_mb=2e-4,
            loss_scale=8.0,
        )
        for step in range(3):
            optimizer.zero_grad()
            is_bad = step == 1 and group.rank() == bad_rank
            factors = {name: torch.ones_like(param) for name, param in params.items()}
            if is_bad:
                factors["middle"][7] = float("inf")
            optimizer.backward(sum((params[name] * factors[name]).float().sum() for name in names))
            optimizer.step()
        return {"lines": lines, "skipped": optimizer.skipped_steps}


@told_at_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transport", ["exact", "auto"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (3, 1), (3, 2)])
def test_the_first_rank_names_parameter_and_rank(ranks, dtype, size, stage, transport):
    bad_rank = size - 1
    results = ranks.run(size, bad_on_one_rank, stage, dtype, transport, bad_rank)
    assert all(result["skipped"] == 1 for result in results)
    (line,) = results[0]["lines"]
    assert line.startswith("WARNING: step skipped, nothing changed")
    assert f"the gradient of middle, shape (80,), on rank {bad_rank}" in line
    assert "1 skipped so far, 1 in a row, loss scale now 8)" in line
    assert all(result["lines"] == [] for result in results[1:])


def bad_in_an_earlier_backward(group: Any, stage: int) -> list[str]:
    """Parameter "middle" overflows on rank 1 in the first of two backwards, in each of two steps."""
    with logged() as lines:
        params = {name: nn.Parameter(torch.ones(40)) for name in ("first", "middle", "last")}
        optimizer = pyzero.FusedZeroAdam(list(params.items()), process_group=group, stage=stage)
        for _ in range(2):  # after a skipped step all buckets are searched
            optimizer.zero_grad()
            for factor in (math.inf if group.rank() == 1 else 1.0, 1.0):
                (params["first"].sum() + (params["middle"] * factor).sum() + params["last"].sum()).backward()
            optimizer.step()
        return lines


@told_at_once
@pytest.mark.parametrize("stage", [1, 2])
def test_an_inf_of_an_earlier_backward_keeps_its_names(ranks, stage):
    for line in ranks.run(2, bad_in_an_earlier_backward, stage)[0]:
        assert "the gradient of middle, shape (40,), on rank 1" in line


def bad_by_hand_after_a_cleared_one(group: Any) -> list[str]:
    """An inf in "last" on rank 1 is cleared; then all ranks write one into "first"."""
    with logged() as lines:
        params = {name: nn.Parameter(torch.ones(40)) for name in ("first", "last")}
        optimizer = pyzero.FusedZeroAdam(list(params.items()), process_group=group)
        (params["last"] * (math.inf if group.rank() == 1 else 1.0)).sum().backward()
        optimizer.zero_grad()
        optimizer.set_full_grad(params["first"], torch.full((40,), math.inf))
        optimizer.step()
        return lines


@told_at_once
def test_a_cleared_inf_is_not_named(ranks):
    (line,) = ranks.run(2, bad_by_hand_after_a_cleared_one)[0]
    assert "step skipped" in line and "last" not in line and "rank 1" not in line


@told_at_once
def test_a_librarys_sum_does_not_tell_the_rank(ranks):
    (line,) = ranks.run(2, bad_on_one_rank, 2, torch.float32, "collective", 1)[0]["lines"]
    assert "the gradient of middle, shape (80,)" in line and "rank" not in line


def overflowing_sum(group: Any) -> list[str]:
    with logged() as lines:
        param = nn.Parameter(torch.ones(3))
        optimizer = pyzero.FusedZeroAdam([param], process_group=group)
        (param * 3e38).sum().backward()
        optimizer.step()
        return lines


@told_at_once
def test_a_sum_that_overflows_is_called_that(ranks):
    (line,) = ranks.run(2, overflowing_sum)[0]
    assert "the sum of the gradients over ranks" in line


def test_parameters_without_names_have_numbers(caplog):
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(n)) for n in (3, 4)]}]
    optimizer = pyzero.FusedZeroAdam(groups)
    (groups[1]["params"][1] * float("nan")).sum().backward()
    optimizer.step()
    assert "parameter 1 of group 1, shape (4,)" in caplog.text


def until_it_ends(group: Any, limit: int | None, num_steps: int) -> tuple[int, str, bool]:
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([("weight", param)], process_group=group, max_consecutive_skips=limit)
    for step in range(num_steps):
        optimizer.zero_grad()
        (param * (1.0 if step == 1 else float("nan"))).sum().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return step, str(error), bool((param < 1).all())
    return num_steps, "", bool((param < 1).all())


@told_at_once
@pytest.mark.parametrize("size", [1, 2])
def test_too_many_in_a_row_end_the_run_on_every_rank(ranks, size):
    for step, message, moved in ranks.run(size, until_it_ends, 3, 10):
        assert step == 4  # 0 was skipped, 1 was not; 2, 3, 4 are three in a row
        assert moved
        for words in ("3 steps in a row", "weight", "look at the loss", "max_consecutive_skips"):
            assert words in message
    assert ranks.run(size, until_it_ends, None, 10)[0][0] == 10


@pytest.mark.parametrize("how", ["bf16", "plain", "GradScaler", "own"])
def test_the_loss_scale_is_told_where_it_was_applied(how, caplog):
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16 if how == "bf16" else torch.float16))
    optimizer = pyzero.FusedZeroAdam([param], max_consecutive_skips=1)
    scaler = torch.amp.GradScaler("cpu")
    loss = (param * math.nan).sum()
    with pytest.raises(RuntimeError, match="1 steps in a row") as caught:
        if how == "GradScaler":
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        else:
            optimizer.backward(loss) if how == "own" else loss.backward()
            optimizer.step()
    told = (
        ("1 in a row, loss scale now 32768)", ", loss scale now 32768; look")
        if how == "own"
        else ("1 in a row)", "; look")
    )
    assert told[0] in caplog.text and told[1] in str(caught.value)
    assert how == "own" or "loss scale now" not in f"{caplog.text}{caught.value}"


def numbers_warned_of(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(n) for n in re.findall(r"(\d+) in a row", caplog.text)]


def test_many_skips_in_a_row_are_told_now_and_then(caplog):
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], max_consecutive_skips=None)

    def step(factor: float, times: int = 1) -> None:
        for _ in range(times):
            optimizer.zero_grad()
            (param * factor).sum().backward()
            optimizer.step()

    step(math.nan, 99)
    assert numbers_warned_of(caplog) == [1, 2, 5, 10, 20, 50]
    caplog.clear()
    for factor in (1.0, math.nan, 1.0, math.nan, math.nan):
        step(factor)
    assert numbers_warned_of(caplog) == [1, 1, 2]
    caplog.clear()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # 2 in a row by then
    step(math.nan)
    assert numbers_warned_of(caplog) == [3], "the first of a run is always told"


def test_skips_that_are_seen_late_are_told(caplog):
    """As on a GPU, where the host looks now and then."""
    monitor = OverflowMonitor(torch.device("cpu"), limit=None, warns=True)
    stats = Mock(first_bad=torch.zeros(1, dtype=torch.float64))
    for skipped, in_a_row in ((1, 1), (4, 4), (7, 7), (8, 8), (9, 0), (12, 1), (12, 1)):
        state = torch.tensor([1.0, 0.0, 1.0, skipped, in_a_row])
        monitor.after_step(state, stats, str, False)
    assert numbers_warned_of(caplog) == [1, 4, 7, 0, 1]  # the 9th may have been a run of its own


def test_the_first_skip_whose_parameter_is_known_is_told(caplog):
    """As on a GPU, where it is looked for from the second step after the first skip on."""
    monitor = OverflowMonitor(torch.device("cpu"), limit=None, warns=True)
    for skipped in range(1, 9):
        stats = Mock(first_bad=torch.tensor([3.0 if skipped > 2 else math.inf], dtype=torch.float64))
        monitor.after_step(torch.tensor([1.0, 0.0, 1.0, skipped, skipped]), stats, str, False)
    assert numbers_warned_of(caplog) == [1, 2, 3, 5]
    assert ["NaN in 3.0" in record.getMessage() for record in caplog.records] == [False, False, True, True]


def steps_after_the_end(group: Any, loads: bool) -> list[Any]:
    """The limit is two skips; whoever goes on has good gradients, then a bad one."""
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, max_consecutive_skips=2)
    good = copy.deepcopy(optimizer.state_dict())
    applied: list[Any] = []
    for factor in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        optimizer.zero_grad()
        (param * factor).sum().backward()
        try:
            optimizer.step()
            applied.append(optimizer.was_step_applied)
        except RuntimeError as error:
            applied.append("2 steps in a row" in str(error))
            if loads:
                optimizer.load_state_dict(good)
    return applied


@told_at_once
@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_goes_on_after_its_end(ranks, size, loads):
    for applied in ranks.run(size, steps_after_the_end, loads):
        assert applied == [False, True, True, False, True]  # the second and the last say what was wrong


def test_skips_before_a_resume_are_no_news(caplog):
    def make() -> tuple[nn.Parameter, pyzero.FusedZeroAdam]:
        param = nn.Parameter(torch.ones(3))
        return param, pyzero.FusedZeroAdam([param])

    param, optimizer = make()
    (param * float("inf")).sum().backward()
    optimizer.step()
    assert "1 skipped so far" in caplog.text
    caplog.clear()
    other, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    other.sum().backward()
    resumed.step()
    assert resumed.skipped_steps == 1 and caplog.text == ""


def test_skips_in_a_row_before_a_load_do_not_end_the_run():
    """As on a GPU, where the host may learn of the last one after the step, and then load."""
    monitor = OverflowMonitor(torch.device("cpu"), limit=2, warns=False)
    stats = Mock(first_bad=torch.zeros(1, dtype=torch.float64))
    monitor.after_step(torch.tensor([1.0, 0.0, 1.0, 2.0, 2.0]), stats, str, False)
    monitor.start_from(0)
    monitor.check(monitor.num_in_a_row, str)


def test_what_is_copied_to_the_host_is_awaited_on_its_own_device(monkeypatch):
    """The current device may be another one, whose stream has nothing to wait for."""
    monitor = OverflowMonitor(torch.device("cpu"), limit=None, warns=False)
    monitor._device, monitor._arrived = torch.device("cuda", 1), Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monitor.after_step(monitor._state.clone(), Mock(first_bad=torch.zeros(1, dtype=torch.float64)), str, False)
    monitor._arrived.record.assert_called_once_with("stream of cuda:1")
