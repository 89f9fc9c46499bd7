"""What callers write to `.grad`, on all ranks and between all calls, counts as in torch, or is refused."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from own_groups import is_refused
from torch import Tensor, nn
from twins import READS, SHAPES, STAGES, UP_TO_THREE, UP_TO_TWO, Twins

import pyzero

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


def averaged_by_hand(group: Any) -> None:
    """The loop of a script that averaged the gradients itself."""
    weight = nn.Parameter(torch.zeros(70))
    optimizer = pyzero.FusedZeroSGD([weight], lr=1.0, process_group=group)
    weight.sum().backward()
    for average in (
        lambda: dist.all_reduce(weight.grad, group=group),
        lambda: dist.all_reduce_coalesced([weight.grad], group=group),
        lambda: functional_collectives.all_reduce(weight.grad, "sum", group),
    ):
        with pytest.raises(RuntimeError, match=r"of shape \(70,\).*averaged over the ranks already: leave the coll"):
            average()
    optimizer.step()
    assert weight.eq(-1.0).all()


def test_a_collective_on_a_reduced_gradient_is_told_to_be_left_out(run):
    run(2, averaged_by_hand)


def written_in_part(group: Any, stage: int) -> Tensor:
    weight = nn.Parameter(torch.zeros(70, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroSGD([weight], process_group=group, stage=stage, grad_reduce_dtype=torch.float32)
    with optimizer.no_sync():
        for factor in (256.0, 1.0):  # 257 in fp32, and 256 in .grad
            (weight * factor).sum().backward()
    weight.grad.as_subclass(Tensor).data[:1] = 512.0
    return optimizer.full_grad(weight)


@STAGES
def test_what_was_not_written_keeps_its_sum_in_fp32(run, stage):
    for grad in run(2, written_in_part, stage):
        assert grad.tolist() == [512.0, *[257.0] * 69]


# ---- factors of one rank's own --------------------------------------------------------------------------------------


def multiplied_unequally(group: Any, stage: int, how: str) -> str:
    twins = Twins(group, stage)
    twins.loss(1.0).backward()
    twins.optimizer.clip_grad_norm_(1e9)
    factor: Any = 0.5 + twins.rank
    if how == "NaN on all":
        factor = math.nan
    twins.first.grad.mul_(torch.tensor(factor, device="cpu") if how == "tensor" else factor)
    message = "no error"
    try:
        twins.optimizer.full_grad(twins.first)
    except pyzero.CollectiveError:
        raise
    except RuntimeError as error:
        message = str(error)
    twins.drop("model")
    twins.backward(1.0)
    twins.step()
    twins.check()
    return message


def multiplied_by_a_tensor_written_since(group: Any, stage: int) -> Tensor:
    param = nn.Parameter(torch.ones(64))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    param.sum().backward()
    optimizer.clip_grad_norm_(1e9)  # reduced now
    factor = torch.ones(())
    for value in (0.5, 0.25):
        param.grad.mul_(factor.fill_(value))
    param.grad.div_(factor)
    return optimizer.full_grad(param)


@STAGES
def test_a_factor_that_was_written_since_is_read_again(run, stage):
    for grad in run(2, multiplied_by_a_tensor_written_since, stage):
        assert torch.equal(grad, torch.full((64,), 0.5))


@STAGES
@pytest.mark.parametrize("how", ["number", "tensor", "NaN on all"])
def test_reduced_gradients_multiplied_by_other_numbers_are_refused(run, stage, how):
    for message in run(2, multiplied_unequally, stage, how):
        assert message == "no error" if how == "NaN on all" else "got products [0.5, 1.5] by rank" in message
