"""Ordinary calls in any order: backward, read, edit, drop, step. What counts is what torch's Adam does on the mean.

A gradient is a small integer times a power of two, and so are its sums and means over up to 3 ranks: they are exact.
Adam halves: exp_avg is half of the first gradient, in which any other gradient would show.
"""

import math
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from own_groups import OwnGroups, is_refused
from torch import Tensor, nn

import pyzero
from pyzero.comm import group as comm_group

ADAM = {"lr": 0.125, "betas": (0.5, 0.5), "eps": 1.0}
SHAPES = ((64,), (3, 67), (5,))
LATEST_S = 20  # for an error that is found by counting, not by a timeout

STAGES = pytest.mark.parametrize("stage", [1, 2])
SIZES = pytest.mark.parametrize("size", [1, 2, 3])
SEVERAL = pytest.mark.parametrize("size", [2, 3])
# One rank has no stages.
UP_TO_TWO = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
UP_TO_THREE = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])


class Twins:
    """A model on this rank, and torch's Adam in one process, which gets the mean of all ranks' gradients."""

    def __init__(self, group: Any, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.rank, self.size, self.stage = group.rank(), group.size(), stage
        self.model = nn.ParameterList(nn.Parameter(torch.full(shape, 2.0, dtype=dtype)) for shape in SHAPES)
        self.first, self.second, self.unused = self.model
        self.optimizer = pyzero.FusedZeroAdam(
            self.model.parameters(), **ADAM, process_group=group, stage=stage, **{"loss_scale": None, **options}
        )
        self.theirs = nn.ParameterList(nn.Parameter(torch.full(shape, 2.0)) for shape in SHAPES)
        self.adam = torch.optim.Adam(self.theirs.parameters(), **ADAM, foreach=False)

    def mean(self, factor: float) -> float:
        """Of factor * (1 + rank)."""
        return factor * (1 + self.size) / 2

    def loss(self, factor: float, index: int = 0) -> Tensor:
        """Of which each element's gradient is factor * (1 + rank)."""
        return (self.model[index].float() * (factor * (1 + self.rank))).sum()

    def expect(self, mean: float, index: int = 0) -> None:
        """Have torch add this to its gradient."""
        (self.theirs[index] * mean).sum().backward()

    def backward(self, factor: float, index: int = 0) -> None:
        self.loss(factor, index).backward()
        self.expect(self.mean(factor), index)

    def step(self) -> None:
        self.optimizer.step()
        self.adam.step()

    def drop(self, how: str) -> None:
        """All gradients, on both sides."""
        for optimizer, model in ((self.optimizer, self.model), (self.adam, self.theirs)):
            if how == "p.grad = None":
                for param in model:
                    param.grad = None
            else:
                {"optimizer": optimizer, "model": model}[how.split(",")[0]].zero_grad("zeros" not in how)

    def check(self) -> None:
        """State and weights are torch's. Collective."""
        ours = [self.optimizer.full_state(param) for param in self.model]
        for index, (state, param, other) in enumerate(zip(ours, self.model, self.theirs, strict=True)):
            wanted = self.adam.state.get(other) or {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(other)}
            assert state["step"] == wanted["step"], f"parameter {index}"
            torch.testing.assert_close(state["exp_avg"], wanted["exp_avg"], rtol=1e-6, atol=0)
            torch.testing.assert_close(state["master"], other.detach(), rtol=1e-6, atol=0)
            assert torch.equal(param, state["master"].to(param.dtype))

    def no_sync(self, sync: bool) -> AbstractContextManager[None]:
        return nullcontext() if sync else self.optimizer.no_sync()


DROPS = ("optimizer", "optimizer, zeros", "model", "model, zeros", "p.grad = None")
READS: dict[str, Callable[[Twins], Any]] = {
    "clip": lambda t: t.optimizer.clip_grad_norm_(1e9),
    "full_grad": lambda t: t.optimizer.full_grad(t.first),
}


# ---- reads between two backwards ----------------------------------------------------------------------------------


def overflow_after_a_read(group: Any, stage: int, read: str) -> tuple[bool, bool]:
    twins = Twins(group, stage)
    twins.loss(1.0).backward()
    READS[read](twins)
    twins.loss(math.inf if twins.rank == twins.size - 1 else 1.0).backward()
    twins.optimizer.step()
    return twins.optimizer.was_step_applied, torch.equal(twins.first, torch.full_like(twins.first, 2.0))


@pytest.mark.parametrize("read", READS)
@UP_TO_THREE
def test_an_overflow_after_a_read_skips_the_step(run, size, stage, read):
    for applied, unchanged in run(size, overflow_after_a_read, stage, read):
        assert not applied and unchanged


def norm_after_a_read(group: Any, stage: int) -> tuple[float, Tensor]:
    twins = Twins(group, stage, max_grad_norm=1.0)
    twins.first.sum().backward()
    twins.optimizer.full_grad(twins.first)  # of norm 8
    (twins.first.sum() * 1000).backward()
    twins.optimizer.step()
    return float(twins.optimizer.grad_norm), twins.optimizer.full_state(twins.first)["exp_avg"]


@UP_TO_THREE
def test_max_grad_norm_clips_by_the_norm_at_the_step(run, size, stage):
    for norm, exp_avg in run(size, norm_after_a_read, stage):
        assert norm == 8008.0
        torch.testing.assert_close(exp_avg, torch.full_like(exp_avg, 0.5 / 8), rtol=1e-6, atol=0)


def used_after_a_read(group: Any, stage: int, read: str) -> None:
    twins = Twins(group, stage)
    twins.backward(1.0)
    READS[read](twins)
    twins.backward(2.0, index=1)
    twins.step()
    twins.check()


@pytest.mark.parametrize("read", READS)
@UP_TO_THREE
def test_a_parameter_first_used_after_a_read_is_updated(run, size, stage, read):
    run(size, used_after_a_read, stage, read)


def norm_of_each_micro_batch(group: Any, stage: int, sync: bool) -> list[float]:
    twins, norms = Twins(group, stage), []
    for _ in range(3):
        with twins.no_sync(sync):
            twins.first.sum().backward()
        twins.expect(1.0)
        norms.append(float(twins.optimizer.clip_grad_norm_(1e9)))
    twins.step()
    twins.check()
    return norms


@pytest.mark.parametrize("sync", [True, False])
@UP_TO_THREE
def test_the_norm_grows_with_each_micro_batch(run, size, stage, sync):
    assert run(size, norm_of_each_micro_batch, stage, sync) == [[8.0, 16.0, 24.0]] * size


def clipped_before_more(group: Any, stage: int) -> tuple[list[float], Tensor]:
    twins = Twins(group, stage)
    norms = []
    for _ in range(2):
        twins.first.sum().backward()
        norms.append(float(twins.optimizer.clip_grad_norm_(0.5)))  # then 1/16 each
    twins.first.sum().backward()
    grad = twins.optimizer.full_grad(twins.first)
    norms.append(float(twins.optimizer.clip_grad_norm_(1e9)))
    twins.expect(1.0625)
    twins.step()
    state = twins.optimizer.full_state(twins.first)
    torch.testing.assert_close(state["exp_avg"], twins.adam.state[twins.theirs[0]]["exp_avg"], rtol=1e-6, atol=0)
    return norms, grad


@UP_TO_THREE
def test_clip_grad_norm_scales_the_gradient_as_it_is_then(run, size, stage):
    for norms, grad in run(size, clipped_before_more, stage):
        assert norms == pytest.approx([8.0, 8.5, 8.5], rel=1e-6)  # torch divides by the norm and 1e-6
        torch.testing.assert_close(grad, torch.full_like(grad, 1.0625), rtol=1e-6, atol=0)


def read_after_each_step(group: Any, stage: int) -> tuple[list[bool], list[float]]:
    twins, applied, grads = Twins(group, stage), [], []
    for step in range(4):
        twins.backward(2.0**step)
        twins.step()
        grad = twins.optimizer.full_grad(twins.first)  # which is there until it is dropped
        grads.append(math.nan if grad is None else float(grad[0]))
        twins.drop("model")
        applied.append(twins.optimizer.was_step_applied)
    if all(applied):
        twins.check()
        assert twins.optimizer.full_state(twins.first)["step"] == 4
    return applied, grads


@UP_TO_THREE
def test_a_read_between_step_and_zero_grad_spoils_no_step(run, size, stage):
    for applied, grads in run(size, read_after_each_step, stage):
        assert applied == [True] * 4
        assert grads == [factor * (1 + size) / 2 for factor in (1.0, 2.0, 4.0, 8.0)]


def step_with_reads(group: Any, stage: int, dtype: torch.dtype, sync: bool, reads: bool) -> list[Tensor]:
    twins = Twins(group, stage, dtype)
    for step in range(2):
        for micro in range(3):
            with twins.no_sync(sync):
                twins.backward(1.0 + micro + step, index=micro % 2)
            if reads:
                for read in READS.values():
                    read(twins)
                twins.optimizer.full_master(twins.second)
                twins.optimizer.state_dict()
        twins.step()
        if reads:
            twins.optimizer.full_state(twins.first)
            twins.optimizer.full_grad(twins.second)
        twins.drop("model")
    twins.check()
    return [param.detach().clone() for param in twins.model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sync", [True, False])
@STAGES
@pytest.mark.parametrize("size", [3])
def test_reads_change_no_bit(run, size, stage, sync, dtype):
    wanted = run(size, step_with_reads, stage, dtype, sync, False)[0]
    for got in run(size, step_with_reads, stage, dtype, sync, True):
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours, theirs)


# ---- gradients that are dropped ------------------------------------------------------------------------------------


def dropped_batch(group: Any, stage: int, dtype: torch.dtype, sync: bool) -> None:
    twins = Twins(group, stage, dtype)
    for how in DROPS:
        with twins.no_sync(sync):
            twins.backward(1.0)
            twins.backward(2.0)
        twins.drop(how)
        with twins.no_sync(sync):
            twins.backward(4.0)
        twins.backward(8.0)
        grad = twins.optimizer.full_grad(twins.first)
        assert grad is not None and torch.equal(grad, torch.full((64,), twins.mean(12.0))), how
        twins.step()
        twins.drop(how)
    twins.backward(16.0)
    twins.step()
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_THREE
def test_a_dropped_batch_leaves_nothing(run, size, stage, sync, dtype):
    run(size, dropped_batch, stage, dtype, sync)


def dropped_overflow(group: Any, stage: int, how: str, sync: bool) -> bool:
    twins = Twins(group, stage)
    with twins.no_sync(sync):
        twins.loss(math.nan if twins.rank == 0 else 1.0).backward()
    for model in (twins.model, twins.theirs):
        if how == "model":
            model.zero_grad()
        else:
            for param in model:
                param.grad = None
    twins.backward(2.0)
    twins.step()
    twins.check()
    return twins.optimizer.was_step_applied


@pytest.mark.parametrize("how", ["model", "p.grad = None"])
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_a_dropped_overflow_skips_no_step(run, size, stage, sync, how):
    assert run(size, dropped_overflow, stage, how, sync) == [True] * size


# ---- torch's life of a gradient ------------------------------------------------------------------------------------


def zeroed(group: Any, stage: int, how: str) -> None:
    twins = Twins(group, stage)
    twins.backward(2.0)
    twins.backward(1.0, index=1)
    twins.step()
    twins.drop(how)
    twins.step()  # on by momentum
    twins.check()
    twins.backward(4.0)
    twins.step()
    twins.check()
    assert twins.optimizer.full_state(twins.second)["step"] == 3


@pytest.mark.parametrize("how", ["optimizer, zeros", "model, zeros"])
@UP_TO_THREE
def test_a_zeroed_gradient_goes_on_by_momentum(run, size, stage, how):
    run(size, zeroed, stage, how)


def assigned_then_zeroed(group: Any, stage: int, how: str) -> None:
    twins = Twins(group, stage, loss_scale=8.0)
    for model in (twins.model, twins.theirs):
        model[0].grad = torch.full_like(model[0], 3.0)
    twins.drop(how)
    if group.rank() == 0:  # zeros carry the loss scale of any rank
        twins.optimizer.backward(twins.loss(2.0))
    twins.expect(2.0 / group.size())
    twins.step()
    twins.check()


@pytest.mark.parametrize("how", ["optimizer, zeros", "model, zeros"])
@SIZES
def test_a_gradient_that_was_assigned_and_zeroed_carries_any_scale(run, size, how):
    run(size, assigned_then_zeroed, 1, how)


def replaced_after_a_nan(group: Any) -> None:
    twins = Twins(group, 2)
    with twins.optimizer.no_sync():
        (twins.first.float() * float("nan")).sum().backward()
    nn.utils.clip_grad_norm_(twins.model.parameters(), 0.5)  # by NaN, the padding of the shard with it
    twins.loss(1.0).backward()
    for param in (twins.first, twins.second):
        twins.optimizer.set_full_grad(param, torch.full(param.shape, 3.0))
    for index in (0, 1):
        twins.expect(3.0, index)
    twins.step()
    assert twins.optimizer.was_step_applied
    twins.check()


@SIZES
def test_a_gradient_that_was_nan_is_replaced(run, size):
    run(size, replaced_after_a_nan)


def stepped_twice(group: Any, stage: int, dtype: torch.dtype) -> None:
    twins = Twins(group, stage, dtype)
    twins.backward(2.0)
    twins.step()
    twins.step()
    twins.check()
    assert twins.optimizer.full_state(twins.first)["step"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_THREE
def test_a_second_step_applies_the_same_gradient(run, size, stage, dtype):
    run(size, stepped_twice, stage, dtype)


def never_zeroed(group: Any, stage: int, dtype: torch.dtype) -> None:
    twins = Twins(group, stage, dtype)
    for step in range(3):
        twins.backward(2.0**step)
        if step == 1:
            twins.backward(1.0, index=1)
        twins.step()
        twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_THREE
def test_without_zero_grad_gradients_add_up_over_steps(run, size, stage, dtype):
    run(size, never_zeroed, stage, dtype)


# ---- a loss scale --------------------------------------------------------------------------------------------------


def mixed_backwards(group: Any, stage: int, where: str, scaled_first: bool) -> list[bool]:
    refusals = []
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype, loss_scale=1024.0)
        losses = [twins.loss(1.0), twins.loss(2.0)]
        backwards = [twins.optimizer.backward, Tensor.backward]

        def both(twins: Twins = twins, losses: Any = losses, backwards: Any = backwards) -> None:
            for index, backward in enumerate(backwards if scaled_first else backwards[::-1]):
                with twins.no_sync(where == "outside" or (where == "first inside" and index == 1)):
                    backward(losses[index])
            twins.optimizer.step()

        refusals.append(is_refused(both))
        if not refusals[-1]:
            twins.expect(twins.mean(3.0))
            twins.adam.step()
        twins.check()
        twins.drop("optimizer")
        twins.optimizer.backward(twins.loss(4.0))
        twins.expect(twins.mean(4.0))
        twins.step()
        twins.check()
    return refusals


@pytest.mark.parametrize("scaled_first", [True, False])
@pytest.mark.parametrize("where", ["outside", "inside", "first inside"])
@UP_TO_TWO
def test_scaled_and_plain_backwards_mix_rightly_or_not_at_all(run, size, stage, where, scaled_first):
    results = run(size, mixed_backwards, stage, where, scaled_first)
    assert all(refusals == results[0] for refusals in results)
    if size > 1 and stage == 2 and where == "outside":
        assert results[0] == [False, False]  # each is reduced by itself


def assigned_after_scaled(group: Any, stage: int, dtype: torch.dtype, drop: str) -> None:
    twins = Twins(group, stage, dtype, loss_scale=1024.0)
    for repeats in (1, 2):
        twins.optimizer.backward(twins.loss(4.0))
        twins.expect(twins.mean(4.0))
        for _ in range(repeats):
            twins.step()
        twins.check()
        twins.drop(drop)
        twins.first.grad = torch.full_like(twins.first, 2.0)
        if twins.size == 1 and drop != "optimizer":  # it may be of the scaled ones, as far as anybody knows
            assert is_refused(twins.optimizer.step)
            twins.optimizer.zero_grad()
            twins.first.grad = torch.full_like(twins.first, 2.0)
        twins.expect(2.0)
        twins.step()
        twins.check()
        twins.drop(drop)


@pytest.mark.parametrize("drop", ["optimizer", "model", "p.grad = None"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_what_is_assigned_after_a_scaled_step_has_no_scale_or_is_refused(run, size, stage, dtype, drop):
    run(size, assigned_after_scaled, stage, dtype, drop)


def dropped_in_a_context(group: Any, stage: int, drop: str, steps: bool) -> None:
    twins = Twins(group, stage, torch.bfloat16, loss_scale=pyzero.LossScale(init_scale=1024.0, growth_interval=1))
    with twins.optimizer.scaled_gradients():
        for factor in (1.0, 2.0, 4.0):
            twins.optimizer.scale(twins.loss(factor)).backward()
            twins.expect(twins.mean(factor))
            if steps:
                twins.step()
                twins.check()
            if factor < 4.0:
                twins.drop(drop)
    if not steps:
        twins.step()
    twins.check()


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("drop", ["optimizer", "model"])
@UP_TO_TWO
def test_backwards_in_one_context_keep_their_scale(run, size, stage, drop, steps):
    run(size, dropped_in_a_context, stage, drop, steps)


def set_beyond_fp16(group: Any, stage: int) -> str | None:
    twins = Twins(group, stage, torch.float16, loss_scale=65536.0)
    twins.optimizer.backward(twins.loss(2.0**-6))
    twins.optimizer.backward(twins.loss(2.0**-6, index=1))
    before = twins.optimizer.full_grad(twins.first)
    message = None
    try:
        twins.optimizer.set_full_grad(twins.first, torch.full_like(twins.first, 2.0))
    except ValueError as error:
        message = str(error)
    wanted = before if message else torch.full((64,), 2.0)
    assert torch.equal(twins.optimizer.full_grad(twins.first), wanted)
    twins.optimizer.step()
    assert not twins.optimizer.skipped_steps
    return message


@UP_TO_TWO
def test_a_gradient_that_fp16_cannot_hold_with_its_scale_is_set_or_refused(run, size, stage):
    for message in run(size, set_beyond_fp16, stage):
        assert message is None if size > 1 else "times the loss scale of the other gradients, 65536" in message


# ---- edits of `.grad` ----------------------------------------------------------------------------------------------


def assigned(group: Any, stage: int, sync: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype)
        with twins.no_sync(sync):
            twins.loss(1.0).backward()
        twins.backward(1.0, index=1)
        twins.first.grad = torch.full_like(twins.first, 8.0 * (1 + twins.rank))
        twins.expect(twins.mean(8.0))
        grad = twins.optimizer.full_grad(twins.first)
        assert grad is not None and torch.equal(grad, torch.full((64,), twins.mean(8.0)))
        twins.step()
        twins.check()
        twins.drop("model")
        twins.backward(2.0)
        twins.step()
        twins.check()


@pytest.mark.parametrize("sync", [True, False])
@UP_TO_THREE
def test_an_assigned_gradient_counts_once(run, size, stage, sync):
    run(size, assigned, stage, sync)


def assigned_and_added_to(group: Any, stage: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype)
        twins.loss(1.0).backward()
        twins.first.grad = torch.full_like(twins.first, 8.0 * (1 + twins.rank))
        twins.expect(twins.mean(8.0))
        twins.backward(2.0)
        twins.backward(4.0, index=1)
        twins.step()
        twins.check()


@UP_TO_THREE
def test_a_backward_adds_to_an_assigned_gradient(run, size, stage):
    run(size, assigned_and_added_to, stage)


def assigned_and_passed_by(group: Any, stage: int, sync: bool) -> None:
    twins = Twins(group, stage)
    twins.first.grad = torch.full_like(twins.first, 8.0 * (1 + twins.rank))
    twins.expect(twins.mean(8.0))
    with twins.no_sync(sync):
        twins.backward(4.0, index=1)
    twins.step()
    twins.check()


@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_a_backward_of_others_leaves_an_assigned_gradient(run, size, stage, sync):
    run(size, assigned_and_passed_by, stage, sync)


def broken_off(grad: Tensor) -> None:
    raise ArithmeticError("on purpose")


def dropped_after_a_broken_backward(group: Any, stage: int, sync: bool, how: str) -> None:
    twins = Twins(group, stage)
    for breaks in (True, twins.rank == twins.size - 1):  # on all ranks, then on one
        product = twins.second * 1.0  # its gradient comes last
        if breaks:
            product.register_hook(broken_off)
        with twins.no_sync(sync), pytest.raises(ArithmeticError) if breaks else nullcontext():
            (product.sum() + twins.loss(1.0)).backward()
        twins.drop(how)
    with twins.no_sync(sync):
        twins.backward(4.0, index=1)
    twins.step()
    twins.check()


@pytest.mark.parametrize("how", ["optimizer", "model"])
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_what_a_broken_backward_left_stays_dropped(run, size, stage, sync, how):
    run(size, dropped_after_a_broken_backward, stage, sync, how)


def multiply(grad: Tensor) -> None:
    grad.mul_(2.0)


def add(grad: Tensor) -> None:
    grad.add_(1.0)


def write_one(grad: Tensor) -> None:
    grad[0] = 5.0


EDITS = {"multiply": multiply, "add": add, "write one": write_one}


def edited_after_a_read(group: Any, stage: int, read: str, how: str) -> list[bool]:
    refusals = []
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype)
        twins.backward(4.0)
        READS[read](twins)

        def edit(twins: Twins = twins) -> None:
            if how == "assign":
                twins.first.grad = torch.full_like(twins.first, 8.0 * (1 + twins.rank))
            else:
                EDITS[how](twins.first.grad)
            twins.optimizer.step()

        refusals.append(is_refused(edit))
        if refusals[-1]:
            continue
        if how == "assign":
            twins.theirs[0].grad.fill_(twins.mean(8.0))
        else:
            EDITS[how](twins.theirs[0].grad)
        twins.adam.step()
        twins.check()
    return refusals


@pytest.mark.parametrize("how", [*EDITS, "assign"])
@pytest.mark.parametrize("read", READS)
@UP_TO_TWO
def test_an_edit_after_a_read_counts_or_is_refused(run, size, stage, read, how):
    results = run(size, edited_after_a_read, stage, read, how)
    assert all(refusals == results[0] for refusals in results)
    if size > 1 and how in ("multiply", "assign"):
        assert results[0] == [False, False]


def set_and_added_to(group: Any, stage: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype)
        twins.loss(1.0).backward()
        twins.optimizer.set_full_grad(twins.first, torch.full((64,), 8.0))
        twins.optimizer.set_full_grad(twins.second, torch.full((3, 67), 2.0))
        twins.expect(8.0)
        twins.expect(2.0, index=1)
        twins.backward(4.0)
        grad = twins.optimizer.full_grad(twins.first)
        assert grad is not None and torch.equal(grad, torch.full((64,), 8.0 + twins.mean(4.0)))
        twins.step()
        twins.check()


@UP_TO_THREE
def test_a_backward_adds_to_a_gradient_that_was_set(run, size, stage):
    run(size, set_and_added_to, stage)


def asked_autograd(group: Any, stage: int, sync: bool, on_all_ranks: bool) -> list[bool]:
    """Whether `.grad` stayed as it was, and what autograd gave was right, for each dtype."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        twins = Twins(group, stage, dtype)
        with twins.no_sync(sync):
            twins.backward(4.0)
            before = twins.first.grad
            real = before is not None and (twins.size == 1 or stage == 1 or not sync)
            copy = before.detach().clone() if real else None
            right = True
            if on_all_ranks or twins.rank == 0:
                (grad,) = torch.autograd.grad(twins.loss(16.0), [twins.first])
                right = bool((grad == 16.0 * (1 + twins.rank)).all())
            after = twins.first.grad
            right &= torch.equal(after, copy) if real and after is not None else after is before
        twins.backward(1.0, index=1)
        twins.step()
        twins.check()
        results.append(right)
    return results


@pytest.mark.parametrize("on_all_ranks", [True, False])
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_autograd_grad_leaves_gradients_alone(run, size, stage, sync, on_all_ranks):
    for right in run(size, asked_autograd, stage, sync, on_all_ranks):
        assert right == [True, True]


def whole_local_sum(group: Any, stage: int) -> bool:
    twins = Twins(group, stage, torch.bfloat16)
    with twins.no_sync(stage == 1):
        for factor in (256.0, 1.0, 1.0):  # bf16 alone would stay at 256
            (twins.first * (factor * 2**twins.rank)).sum().backward()
    shown = bool((twins.first.grad == 258.0 * 2**twins.rank).all())
    twins.expect(258.0 * (2**twins.size - 1) / twins.size)
    twins.step()
    twins.check()
    return shown


@STAGES
@pytest.mark.parametrize("size", [2])
def test_a_16_bit_gradient_shows_the_whole_local_sum(run, size, stage):
    assert all(run(size, whole_local_sum, stage))


# ---- what one rank alone does --------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="expected no gradients in a group that is added to an optimizer with a loss"):
        twins.optimizer.add_param_group({"params": [late]})
    late.grad = None
    twins.optimizer.add_param_group({"params": [late]})


@UP_TO_THREE
def test_a_thawed_parameter_under_a_loss_scale(run, size, stage):
    run(size, thawed_under_a_scale, stage)


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
            patch.setattr(comm_group, "_ASKS_AFTER_S", 1.0)
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


# ---- what is kept of .grad ------------------------------------------------------------------------------------------

KEPT = {
    "zero_": lambda grad: grad.zero_(),
    "mul_": lambda grad: grad.mul_(2.0),
    "div_": lambda grad: grad.div_(2.0),
    "foreach": lambda grad: torch._foreach_mul_([grad], 2.0),
}


def kept_over_zero_grad(group: Any, stage: int, how: str, drop: str, sync: bool) -> None:
    twins = Twins(group, stage)
    with nullcontext() if sync else twins.optimizer.no_sync():
        twins.loss(1.0).backward()
    kept = twins.first.grad
    twins.drop(drop)
    twins.backward(4.0)
    twins.optimizer.full_grad(twins.first)  # it is reduced in stage 1 too
    KEPT[how](kept)
    twins.step()
    twins.check()


@pytest.mark.parametrize(("drop", "sync"), [("optimizer", True), ("p.grad = None", False)])
@pytest.mark.parametrize("how", KEPT)
@STAGES
def test_an_edit_of_a_gradient_that_was_cleared_is_not_one_of_the_present_gradient(run, stage, how, drop, sync):
    run(2, kept_over_zero_grad, stage, how, drop, sync)


def norms_kept(group: Any, stage: int) -> tuple[float, float, bool]:
    twins = Twins(group, stage)
    with twins.optimizer.no_sync():
        twins.loss(1.0).backward()
    local = twins.first.grad
    twins.drop("model")
    before = float(local.norm())  # of this rank's own
    twins.loss(4.0).backward()
    twins.optimizer.full_grad(twins.first)
    reduced = twins.first.grad
    twins.drop("model")
    twins.loss(16.0).backward()
    return before, float(local.norm()), is_refused(reduced.norm)


@STAGES
def test_a_norm_of_a_gradient_that_was_cleared_is_not_of_the_present_one(run, stage):
    assert run(2, norms_kept, stage) == [(8.0 * (1 + rank), 8.0 * (1 + rank), True) for rank in range(2)]


READS_OF_A_PART = {
    "p.grad = p.grad / 2": lambda twins, total: setattr(twins.first, "grad", twins.first.grad / 2),
    "add_": lambda twins, total: total.add_(twins.first.grad),
    "foreach": lambda twins, total: torch._foreach_add_([total], [twins.first.grad]),
    "numpy": lambda twins, total: twins.first.grad.cpu().numpy(),
    "clone": lambda twins, total: twins.first.grad.clone(),
}


def read_where_a_part_is_reduced(group: Any, how: str) -> bool:
    twins = Twins(group, 2)
    twins.backward(1.0)
    with twins.optimizer.no_sync():
        twins.backward(2.0)
    refused = is_refused(lambda: READS_OF_A_PART[how](twins, torch.zeros(SHAPES[0])))
    twins.step()
    twins.check()
    return refused


@pytest.mark.parametrize("how", READS_OF_A_PART)
def test_values_of_a_gradient_of_which_a_part_is_reduced_are_refused(run, how):
    assert run(2, read_where_a_part_is_reduced, how) == [True] * 2


def set_aside(group: Any, is_half_reduced: bool) -> bool:
    twins = Twins(group, 2)
    if is_half_reduced:
        twins.backward(1.0)
    with twins.optimizer.no_sync():
        twins.backward(2.0)
    kept, twins.first.grad = twins.first.grad, None
    with twins.optimizer.no_sync():
        twins.loss(4.0).backward()
    twins.first.grad = kept
    if is_half_reduced:
        return is_refused(twins.optimizer.step)
    twins.step()
    twins.check()
    return False


@pytest.mark.parametrize("is_half_reduced", [False, True])
def test_a_gradient_that_was_set_aside_comes_back_whole_or_not_at_all(run, is_half_reduced):
    assert run(2, set_aside, is_half_reduced) == [is_half_reduced] * 2


def edited_later(group: Any, how: str) -> bool:
    twins = Twins(group, 2)
    twins.backward(1.0)
    kept = twins.first.grad
    with twins.optimizer.no_sync():
        twins.backward(2.0)
    KEPT[how](kept)
    if how != "zero_":
        return is_refused(twins.optimizer.step)
    twins.theirs[0].grad.zero_()
    twins.step()
    twins.check()
    return True


@pytest.mark.parametrize("how", KEPT)
def test_an_edit_reaches_what_has_come_since_or_is_refused(run, how):
    assert run(2, edited_later, how) == [True] * 2


# ---- gradients that do not come from backward, or do not arrive ------------------------------------------------------


def taken_by_a_hook(group: Any, stage: int, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.full((64,), 2.0, dtype=dtype))
    takes = False

    def hook(param: Tensor) -> None:
        if takes:
            param.grad = None

    param.register_post_accumulate_grad_hook(hook)  # ahead of the optimizer's own
    optimizer = pyzero.FusedZeroAdam([param], **ADAM, process_group=group, stage=stage, loss_scale=None)
    for num_before in (0, 1):  # what lies in `.grad` goes with it
        for now in [False] * num_before + [True]:
            takes = now
            param.float().sum().backward()
        optimizer.step()
        assert param.grad is None or not float(param.grad.norm())
        assert torch.equal(param, torch.full_like(param, 2.0))
        optimizer.zero_grad()
    takes = False
    (param.float() * 4.0).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.full_state(param)["exp_avg"], torch.full((64,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_a_hook_may_take_a_gradient_away(run, size, stage, dtype):
    run(size, taken_by_a_hook, stage, dtype)


def masked_by_a_hook(group: Any, stage: int, dtype: torch.dtype, how: str, reads: bool) -> bool:
    twins = Twins(group, stage, dtype)
    mask = torch.arange(twins.second.numel()).view_as(twins.second).lt(100).to(dtype)

    def hook(param: Tensor) -> None:  # behind the optimizer's own; the parameter's bucket waits for the other
        if how == "assigns":
            param.grad = param.grad * mask
        else:
            param.grad.mul_(mask)

    twins.second.register_post_accumulate_grad_hook(hook)
    for factor in (1.0, 2.0):
        (twins.loss(factor) + twins.loss(factor, index=1)).backward()
        (twins.theirs[1] * twins.mean(factor) * mask).sum().backward()
        twins.expect(twins.mean(factor))
        if reads:
            twins.optimizer.clip_grad_norm_(1e9) if factor == 1.0 else None
    if is_refused(twins.optimizer.step):
        return False
    twins.adam.step()
    twins.check()
    return True


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("how", ["assigns", "edits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_what_a_hook_makes_of_a_gradient_counts_or_is_refused(run, size, stage, dtype, how, reads):
    is_partly_reduced = size > 1 and (stage == 2 or reads)
    assert run(size, masked_by_a_hook, stage, dtype, how, reads) == [not is_partly_reduced] * size


def broken_by_a_hook(group: Any, stage: int, dtype: torch.dtype, sync: bool) -> None:
    """On the last rank a hook that was there before the optimizer's raises behind the second gradient."""
    raises = False

    def hook(param: Tensor) -> None:
        if raises:
            raise ArithmeticError("on purpose")

    first, second = (nn.Parameter(torch.zeros(64, dtype=dtype)) for _ in range(2))
    first.register_post_accumulate_grad_hook(hook)
    optimizer = pyzero.FusedZeroSGD([first, second], lr=1.0, process_group=group, stage=stage, loss_scale=None)
    is_last = group.rank() == group.size() - 1
    for _ in range(2):
        with nullcontext() if sync else optimizer.no_sync():
            (first.sum() + second.sum()).backward()
            raises = is_last
            with pytest.raises(ArithmeticError) if raises else nullcontext():
                ((first * 2.0).sum() + (second * 0.0).sum()).backward()
            raises = False
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(first, torch.full_like(first, -6.0))
    assert torch.equal(second, torch.full_like(second, -2.0))


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_a_hook_that_raises_loses_no_earlier_gradient(run, size, stage, dtype, sync):
    run(size, broken_by_a_hook, stage, dtype, sync)


def dropped_after_a_hook_has_raised(group: Any, stage: int, to_none: bool) -> None:
    param = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    raises = [False]

    def hook(param: Tensor) -> None:
        if raises[0]:
            raise ArithmeticError("on purpose")

    param.register_post_accumulate_grad_hook(hook)
    optimizer = pyzero.FusedZeroSGD([param], lr=1.0, process_group=group, stage=stage, loss_scale=None)
    module = nn.ParameterList([param])
    for clears in (optimizer, module):
        with optimizer.no_sync():
            param.sum().backward()
            raises[0] = True
            with pytest.raises(ArithmeticError):
                param.sum().backward()
            raises[0] = False
        clears.zero_grad(set_to_none=to_none)
        (param * 4.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(param, torch.full_like(param, -8.0))


@pytest.mark.parametrize("to_none", [True, False])
@UP_TO_TWO
def test_what_a_hook_that_raised_left_can_be_dropped(run, size, stage, to_none):
    run(size, dropped_after_a_hook_has_raised, stage, to_none)


def assigned_to_a_frozen_one(group: Any, stage: int, reads: bool) -> None:
    trained, frozen, unused = (nn.Parameter(torch.full((64,), 2.0), requires_grad=i == 0) for i in range(3))
    optimizer = pyzero.FusedZeroAdam([trained, frozen, unused], **ADAM, process_group=group, stage=stage)
    for _ in range(2):
        trained.sum().backward()
        frozen.grad = torch.full((64,), 4.0 * (1 + group.rank()))
        if reads:
            wanted = math.hypot(1.0, 4.0) if group.size() == 1 else 1.0
            assert float(optimizer.clip_grad_norm_(1e9)) == pytest.approx(8 * wanted)
        optimizer.step()
        optimizer.zero_grad()
    if group.size() == 1:
        assert torch.equal(optimizer.full_state(frozen)["exp_avg"], torch.full((64,), 3.0))
    else:
        assert torch.equal(frozen, torch.full_like(frozen, 2.0))
    assert torch.equal(unused, torch.full_like(unused, 2.0)) and len(optimizer.state) == 3 - group.size()


@pytest.mark.parametrize("reads", [False, True])
@UP_TO_TWO
def test_a_gradient_assigned_to_a_frozen_parameter_counts_on_one_rank_as_torchs_does(run, size, stage, reads):
    run(size, assigned_to_a_frozen_one, stage, reads)


def frozen_on_one_rank(group: Any, stage: int) -> None:
    """Rank 0 alone has a `.grad` in a frozen parameter: of before the optimizer was built, or of after."""
    trained, before, after = (nn.Parameter(torch.full((64,), 2.0)) for _ in range(3))
    before.requires_grad_(False)
    after.requires_grad_(False)
    if group.rank() == 0:
        before.grad = torch.ones(64)
    optimizer = pyzero.FusedZeroAdam([trained, before, after], **ADAM, process_group=group, stage=stage)
    for _ in range(2):
        trained.sum().backward()
        if group.rank() == 0:
            after.grad = torch.ones(64)
        optimizer.step()
    for frozen in (before, after):
        assert torch.equal(frozen, torch.full_like(frozen, 2.0))
    assert len(optimizer.state) == 1


@STAGES
def test_a_gradient_of_a_frozen_parameter_on_one_rank_alone_holds_nobody_up(run, stage):
    run(2, frozen_on_one_rank, stage)


def of_another_dtype(group: Any, stage: int) -> str:
    param = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    with pytest.raises(TypeError) as error:
        param.float().sum().backward()
    optimizer.zero_grad()
    return str(error.value)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@STAGES
def test_a_gradient_of_another_dtype_is_refused_by_name(run, stage):
    for message in run(2, of_another_dtype, stage):
        assert "grad_dtype" in message and "float32" in message


class Product(torch.autograd.Function):
    """x * weight, which gives the weight a gradient or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gives: bool) -> Tensor:
        ctx.gives = gives
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x if ctx.gives else None, None


def without_a_gradient(group: Any, stage: int, dtype: torch.dtype, sync: bool) -> list[float]:
    """`.grad` after backwards that give one, None, and one."""
    weight = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = pyzero.FusedZeroAdam([weight], process_group=group, stage=stage, loss_scale=None)
    found = []
    for gives in (True, False, True):
        x = torch.full((64,), 2.0, dtype=dtype, requires_grad=True)
        with nullcontext() if sync or not found else optimizer.no_sync():
            Product.apply(x, weight, gives).sum().backward()
        grad = optimizer.full_grad(weight)
        found.append(0.0 if grad is None else float(grad[0]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_a_function_that_gives_none_leaves_the_gradient_alone(run, size, stage, sync, dtype):
    for found in run(size, without_a_gradient, stage, dtype, sync):
        assert found == [2.0, 2.0, 4.0]


# ---- writes that no version counter shows ---------------------------------------------------------------------------


def summed_by_hand(group: Any, stage: int, dtype: torch.dtype, num_backwards: int, how: str) -> list[float]:
    """Weights after a step of SGD on gradients that the caller has summed over ranks, as of a weight on two stages."""
    weight = nn.Parameter(torch.zeros(70, dtype=dtype))
    optimizer = pyzero.FusedZeroSGD([weight], lr=1.0, process_group=group, stage=stage, loss_scale=None)
    if how == "all_reduce, from an odd address":
        weight.grad = torch.zeros(71, dtype=dtype)[1:]
    with optimizer.no_sync():
        for _ in range(num_backwards):
            weight.sum().backward()
    if how.startswith("all_reduce"):
        dist.all_reduce(weight.grad, group=group)
    else:
        weight.grad.data.mul_(group.size())
    optimizer.step()
    found: list[float] = weight.detach().float().unique().tolist()
    return found


@STAGES
@pytest.mark.parametrize("how", ["all_reduce", "all_reduce, from an odd address", "data"])
@pytest.mark.parametrize("num_backwards", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_collective_on_grad_counts(run, stage, dtype, num_backwards, how):
    for weights in run(2, summed_by_hand, stage, dtype, num_backwards, how):
        assert weights == [-2.0 * num_backwards]


# ---- factors of one rank's own --------------------------------------------------------------------------------------


def multiplied_unequally(group: Any, stage: int, how: str) -> str:
    twins = Twins(group, stage)
    twins.loss(1.0).backward()
    twins.optimizer.clip_grad_norm_(1e9)
    factor: Any = 0.5 + twins.rank
    if how == "NaN on all":
        factor = math.nan
    twins.first.grad.mul_(torch.tensor(factor, device="cpu") if how == "tensor" else factor)
    try:
        twins.optimizer.full_grad(twins.first)
    except pyzero.CollectiveError:
        raise
    except RuntimeError as error:
        return str(error)
    return "no error"


@STAGES
@pytest.mark.parametrize("how", ["number", "tensor", "NaN on all"])
def test_reduced_gradients_multiplied_by_other_numbers_are_refused(run, stage, how):
    for message in run(2, multiplied_unequally, stage, how):
        assert message == "no error" if how == "NaN on all" else "got products [0.5, 1.5] by rank" in message


# ---- conversions there and back: torch drops the autograd nodes that hooks are on -----------------------------------


def convert_and_back(model: nn.Module, dtype: torch.dtype) -> None:
    model.double()
    model.to(dtype)


def converted_and_back(group: Any, stage: int, sync: bool, dtype: torch.dtype, scale: float | None) -> None:
    twins = Twins(group, stage, dtype, loss_scale=scale)
    for step in range(3):
        if step == 1:
            convert_and_back(twins.model, dtype)
        for micro in (1.0, 2.0):
            with twins.no_sync(sync or micro == 2.0):
                twins.optimizer.backward(twins.loss(micro))
            twins.expect(twins.mean(micro))
        twins.optimizer.backward(twins.loss(4.0, index=1))
        twins.expect(twins.mean(4.0), index=1)
        twins.step()
        twins.check()
        twins.drop("model")


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_a_model_converted_and_back_trains_on(run, size, stage, sync, dtype, scale):
    run(size, converted_and_back, stage, sync, dtype, scale)


def converted_with_frozen(group: Any, stage: int, scale: float | None) -> None:
    twins = Twins(group, stage, torch.bfloat16, loss_scale=scale)
    for step in range(3):
        for param, other in zip(twins.model, twins.theirs, strict=True):
            param.requires_grad_(step != 1 or param is not twins.second)
            other.requires_grad_(param.requires_grad)
        if step == 1:
            convert_and_back(twins.model, torch.bfloat16)
        for index, param in enumerate((twins.first, twins.second)):
            if param.requires_grad:
                twins.optimizer.backward(twins.loss(2.0, index))
                twins.expect(twins.mean(2.0), index)
        twins.step()
        twins.check()
        twins.drop("model")


@pytest.mark.parametrize("scale", [None, 1024.0])
@UP_TO_TWO
def test_so_does_one_of_which_a_part_is_frozen(run, size, stage, scale):
    run(size, converted_with_frozen, stage, scale)


def converted_with_a_gradient(group: Any, stage: int, dtype: torch.dtype, scale: float | None) -> None:
    twins = Twins(group, stage, dtype, loss_scale=scale)
    for factor in (1.0, 2.0):
        with twins.no_sync(factor == 2.0):
            twins.optimizer.backward(twins.loss(factor))
        twins.expect(twins.mean(factor))
        if factor == 1.0:
            convert_and_back(nn.ParameterList([twins.first]), dtype)  # the others' gradients refuse it
    twins.step()
    twins.check()


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_a_gradient_kept_over_a_conversion_counts_once(run, size, stage, dtype, scale):
    run(size, converted_with_a_gradient, stage, dtype, scale)
