"""Gradients that hooks or autograd functions change, take away or break off."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from own_groups import is_refused
from torch import Tensor, nn
from twins import ADAM, STAGES, UP_TO_TWO, Twins

import pyzero


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


def read_by_a_hook(group: Any, is_early: bool) -> None:
    param, seen = nn.Parameter(torch.ones(64)), []
    if is_early:
        param.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group)
    if not is_early:
        param.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    loss = (param * (1 + group.rank())).sum()
    if is_early:
        loss.backward()
        assert (seen[0] == 1 + group.rank()).all()
    else:
        with pytest.raises(RuntimeError, match="registered before the optimizer is built"):
            loss.backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("is_early", [True, False])
def test_a_hook_that_comes_too_late_is_told_of(run, is_early):
    run(2, read_by_a_hook, is_early)


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
