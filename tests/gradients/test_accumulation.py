"""Backward, read, drop and step in any order. What counts is what torch's Adam does on the mean; see twins.py."""

import math
import time
from typing import Any

import pytest
import torch
from own_groups import is_refused
from torch import Tensor, nn
from twins import DROPS, READS, SIZES, STAGES, UP_TO_THREE, UP_TO_TWO, Twins

import pyzero

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


def scaled_then_zeroed(group: Any, how: str) -> None:
    twins = Twins(group, 1, loss_scale=8.0)
    twins.optimizer.backward(twins.loss(1.0))
    twins.expect(twins.mean(1.0))
    twins.drop(how)
    if group.rank() == 0:  # the zeros of the others came with a loss scale
        twins.loss(2.0).backward()
    twins.expect(2.0 / group.size())
    twins.step()
    twins.check()


@pytest.mark.parametrize("how", ["optimizer, zeros", "model, zeros"])
@SIZES
def test_a_scaled_gradient_that_was_zeroed_carries_any_scale(run, size, how):
    run(size, scaled_then_zeroed, how)


def replaced_after_a_nan(group: Any, index: int) -> None:
    twins = Twins(group, 2)
    with twins.optimizer.no_sync():
        (twins.model[index].float() * float("nan")).sum().backward()
    nn.utils.clip_grad_norm_(twins.model.parameters(), 0.5)  # by NaN, the gap behind the second with it
    twins.loss(1.0).backward()
    for param in (twins.first, twins.second):
        twins.optimizer.set_full_grad(param, torch.full(param.shape, 3.0))
    for index in (0, 1):
        twins.expect(3.0, index)
    twins.step()
    assert twins.optimizer.was_step_applied
    twins.check()


@pytest.mark.parametrize("index", [0, 1])
@SIZES
def test_a_gradient_that_was_nan_is_replaced(run, size, index):
    run(size, replaced_after_a_nan, index)


def dropped_under_way(group: Any, slow_rank: int) -> None:
    twins = Twins(group, 2)
    if twins.rank == slow_rank:
        time.sleep(0.5)  # the other rank has ended its backward by then, and dropped its gradient
    (twins.loss(1.0) + twins.loss(1.0, index=1)).backward()
    twins.expect(twins.mean(1.0), index=1)
    twins.first.grad = None
    twins.backward(4.0)
    twins.step()
    twins.check()


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_gradient_that_was_dropped_before_it_arrived_counts_no_more(run, slow_rank):
    run(2, dropped_under_way, slow_rank)


def dropped_with_its_bucket(group: Any, stage: int, factor: float) -> None:
    twins = Twins(group, stage, bucket_cap_mb=1e-6, max_grad_norm=2.0)
    twins.backward(1.0)
    twins.loss(factor, index=1).backward()
    READS["full_grad"](twins)
    twins.second.grad = None
    twins.optimizer.step()
    assert twins.optimizer.was_step_applied
    assert float(twins.optimizer.grad_norm) == 8.0 * twins.mean(1.0)


@pytest.mark.parametrize("factor", [4.0, math.inf])
@UP_TO_THREE
def test_a_gradient_that_was_dropped_with_its_bucket_counts_no_more(run, size, stage, factor):
    run(size, dropped_with_its_bucket, stage, factor)


def scaled_in_a_round_without_it(group: Any, stage: int) -> None:
    twins = Twins(group, stage)
    for index in (0, 1):  # in stage 2 no bucket waits for the second in the next step
        twins.backward(1.0, index)
        if index == 1:
            READS["clip"](twins)
            twins.backward(2.0)
            for model in (twins.model, twins.theirs):
                for param in model[:2]:
                    param.grad.mul_(0.5)
            twins.backward(4.0)
        twins.step()
        twins.check()
        twins.drop("optimizer")


@UP_TO_THREE
def test_what_a_round_left_out_is_scaled_too(run, size, stage):
    run(size, scaled_in_a_round_without_it, stage)


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
