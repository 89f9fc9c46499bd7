"""What one rank alone does: uses a parameter, assigns a gradient, calls backward more often."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_groups import OwnGroups, is_refused
from torch import nn
from twins import LATEST_S, READS, SEVERAL, STAGES, UP_TO_THREE, UP_TO_TWO, Twins

from pyzero.comm import work


def thawed_for_one_rank(group: Any, stage: int) -> None:
    twins = Twins(group, stage)
    joins = nn.Parameter(torch.full((70,), 2.0), requires_grad=False)
    twins.optimizer.add_param_group({"params": [joins]})
    twins.backward(1.0)
    twins.step()
    twins.drop("optimizer")
    joins.requires_grad_(True)
    loss = twins.loss(2.0)
    if twins.rank == 0:
        loss = loss + (joins * (4.0 * twins.size)).sum()
    loss.backward()
    twins.expect(twins.mean(2.0))
    twins.step()
    twins.check()
    assert torch.equal(twins.optimizer.full_state(joins)["exp_avg"], torch.full((70,), 2.0))


@STAGES
@SEVERAL
def test_a_thawed_parameter_used_on_rank_0_alone(run, size, stage):
    run(size, thawed_for_one_rank, stage)


def thawed_under_a_scale(group: Any, stage: int) -> None:
    twins = Twins(group, stage, loss_scale=8.0)
    joins = nn.Parameter(torch.full((70,), 2.0), requires_grad=False)
    twins.optimizer.add_param_group({"params": [joins]})
    joins.requires_grad_(True)
    twins.optimizer.backward(twins.loss(2.0) + (joins * 4.0).sum())
    twins.expect(twins.mean(2.0))
    twins.step()
    twins.check()
    assert torch.equal(twins.optimizer.full_state(joins)["exp_avg"], torch.full((70,), 2.0))
    late = nn.Parameter(torch.zeros(3))
    late.grad = torch.ones(3)
    with pytest.raises(ValueError, match="expected no gradients of parameters that join an optimizer with a loss"):
        twins.optimizer.add_param_group({"params": [late]})
    late.grad = None
    twins.optimizer.add_param_group({"params": [late]})


@UP_TO_THREE
def test_a_thawed_parameter_under_a_loss_scale(run, size, stage):
    run(size, thawed_under_a_scale, stage)


def appended_with_a_gradient(group: Any, stage: int, how: str) -> None:
    twins = Twins(group, stage, loss_scale=8.0)
    joins = nn.Parameter(torch.full((70,), 2.0))
    if twins.rank == 0:
        joins.grad = torch.ones(70)  # of a scaled loss, or of a plain one
    groups = twins.optimizer.param_groups
    if how == "parameter":
        groups[0]["params"].append(joins)
    else:
        groups.append({**groups[0], "params": [joins]})
    twins.backward(1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"expected no gradients of parameters that join .* got \.grad of"):
            twins.optimizer.step()
    joins.grad = None
    twins.step()
    twins.check()
    twins.drop("optimizer")
    twins.optimizer.backward(twins.loss(2.0) + (joins * 4.0).sum())
    twins.expect(twins.mean(2.0))
    twins.step()
    twins.check()
    assert torch.equal(twins.optimizer.full_state(joins)["exp_avg"], torch.full((70,), 2.0))


@pytest.mark.parametrize("how", ["parameter", "group"])
@UP_TO_TWO
def test_a_parameter_that_is_appended_with_a_gradient(run, size, stage, how):
    run(size, appended_with_a_gradient, stage, how)


def added_with_a_gradient_on_one_rank(group: Any, stage: int) -> None:
    twins = Twins(group, stage)
    joins = nn.Parameter(torch.full((70,), 2.0))
    loss = twins.loss(2.0)
    if twins.rank == 0:
        loss = loss + (joins * (4.0 * twins.size)).sum()
    loss.backward()
    twins.expect(twins.mean(2.0))
    twins.optimizer.clip_grad_norm_(1e9)
    twins.optimizer.add_param_group({"params": [joins]})
    twins.step()
    twins.check()
    assert torch.equal(twins.optimizer.full_state(joins)["exp_avg"], torch.full((70,), 2.0))


@STAGES
@SEVERAL
def test_an_added_parameter_with_a_gradient_on_rank_0_alone(run, size, stage):
    run(size, added_with_a_gradient_on_one_rank, stage)


def reached_on_one_rank_after_a_read(group: Any, stage: int) -> None:
    twins = Twins(group, stage)
    twins.backward(1.0)
    twins.optimizer.clip_grad_norm_(1e9)
    with twins.no_sync(stage == 1):
        if twins.rank == 0:
            (twins.first * (2.0 * twins.size)).sum().backward()
            (twins.second * (4.0 * twins.size)).sum().backward()
    twins.expect(2.0)
    twins.expect(4.0, index=1)
    twins.step()
    twins.check()


@STAGES
@SEVERAL
def test_a_backward_on_rank_0_alone_after_a_read(run, size, stage):
    run(size, reached_on_one_rank_after_a_read, stage)


NEXT: dict[str, Callable[[Twins], Any]] = {"step": lambda t: t.optimizer.step(), **READS}


def assigned_on_one_rank(group: Any, stage: int, value: float | None, then: str) -> tuple[bool, bool]:
    twins = Twins(group, stage)
    twins.loss(1.0).backward()
    if stage == 1:
        twins.optimizer.full_grad(twins.first)
    if twins.rank == 0:
        twins.first.grad = None if value is None else torch.full_like(twins.first, value)
    refused = is_refused(lambda: NEXT[then](twins))
    unchanged = all(torch.equal(param, torch.full_like(param, 2.0)) for param in twins.model)
    if refused:
        twins.drop("optimizer")
        twins.backward(2.0)
        twins.step()
        twins.check()
    return refused, unchanged


@pytest.mark.parametrize("then", NEXT)
@pytest.mark.parametrize("value", [None, 8.0])
@STAGES
@pytest.mark.parametrize("size", [2])
def test_a_reduced_gradient_assigned_on_one_rank_is_refused_on_all(run, size, stage, value, then):
    assert run(size, assigned_on_one_rank, stage, value, then) == [(True, True)] * size


def half_edited_where_used(group: Any, stage: int, then: str) -> tuple[bool, bool]:
    twins = Twins(group, stage)
    twins.loss(1.0).backward()
    twins.optimizer.full_grad(twins.first)
    if twins.rank == 0:
        with twins.optimizer.no_sync():
            twins.loss(1.0).backward()  # from here on a part of its own lies in `.grad`
    twins.first.grad.mul_(2.0)
    refused = is_refused(lambda: NEXT[then](twins)) and is_refused(twins.optimizer.step)
    unchanged = all(torch.equal(param, torch.full_like(param, 2.0)) for param in twins.model)
    twins.drop("optimizer")
    twins.backward(2.0)
    twins.step()
    twins.check()
    return refused, unchanged


@pytest.mark.parametrize("then", NEXT)
@STAGES
@pytest.mark.parametrize("size", [2])
def test_a_half_reduced_gradient_edited_where_it_is_used_is_refused_on_all(run, size, stage, then):
    assert run(size, half_edited_where_used, stage, then) == [(True, True)] * size


def unequal_backwards(group: Any, counts: tuple[int, ...]) -> tuple[str, str, float]:
    twins = Twins(group, 2)
    begin = time.monotonic()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "_ASKS_AFTER_S", 1.0)
            for _ in range(counts[twins.rank]):
                twins.loss(1.0).backward()
            twins.optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


@pytest.mark.parametrize("counts", [(2, 1), (3, 4)], ids=str)
def test_backwards_unequally_often_are_counted(ranks, counts):
    for name, message, seconds in OwnGroups(ranks, 1.5 * LATEST_S)(2, unequal_backwards, counts):
        assert name == "CollectiveError"
        assert seconds < LATEST_S
        numbers = re.findall(r"\b\d+\b", re.sub(r"\brank \d+( of \d+)?", "", message))
        assert "rank 0" in message and "rank 1" in message and {str(count) for count in counts} <= {*numbers}, message
