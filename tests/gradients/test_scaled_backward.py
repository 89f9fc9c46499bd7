"""optimizer.scale(loss).backward() is optimizer.backward(loss); fp16 gradients that nobody scaled are told of, once."""

import contextlib
import logging
import math
import re
from typing import Any

import numpy
import pytest
import torch
from models import Failing, assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyzero
from pyzero import ops
from pyzero.gradients.local import scale_tracker

SCALE = pyzero.LossScale(init_scale=2.0**12)


def train(group: Any, stage: int, by_hand: bool, num_micro: int) -> list[Tensor]:
    rank = group.rank()
    model = build(torch.float16)
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group, stage=stage, loss_scale=SCALE)
    for step in range(3):
        optimizer.zero_grad()
        for index in range(num_micro):
            loss = loss_of(model, micro_batch(step, 4 * rank + index)) / num_micro
            if by_hand:
                optimizer.scale(loss).backward()
            else:
                optimizer.backward(loss)
            assert not optimizer.is_scaled_backward
        optimizer.step()
    assert optimizer.skipped_steps == 0
    return params_of(model)


@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_by_hand_equals_backward(ranks, size, stage, num_micro):
    for mine, other in zip(
        ranks.run(size, train, stage, True, num_micro), ranks.run(size, train, stage, False, num_micro), strict=True
    ):
        assert_same(mine, other)


def test_without_a_scale_it_is_the_loss():
    optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(1))])
    loss = torch.ones(())
    assert optimizer.scale(loss) is loss


@pytest.mark.parametrize("scale", [SCALE, None], ids=["scaled", "plain"])
def test_the_loss_of_an_evaluation_is_scaled_too(scale):
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], loss_scale=scale)
    with torch.no_grad():
        loss = optimizer.scale(param.sum())
    assert loss == 3.0 * (1.0 if scale is None else scale.init_scale)
    optimizer.scale(param.sum()).backward()
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(3.0**0.5)


def fp16_weight() -> tuple[nn.Parameter, pyzero.FusedZeroAdam]:
    param = nn.Parameter(torch.ones(4, dtype=torch.float16))
    return param, pyzero.FusedZeroAdam([param], loss_scale=SCALE)


@pytest.mark.parametrize("then", ["backward", "loss"])
def test_a_scaled_backward_that_fails_leaves_no_trace(then):
    param, optimizer = fp16_weight()
    with pytest.raises(ValueError, match="as planned"):
        optimizer.scale(Failing.apply(param).float().sum()).backward()
    if then == "loss":
        optimizer.zero_grad()
        param.float().sum().backward()
    else:
        optimizer.backward(param.float().sum())
    assert torch.equal(optimizer.full_grad(param), torch.ones(4))


def loss_scaled_in_a_checkpoint(optimizer: pyzero.FusedZeroAdam, use_reentrant: bool) -> tuple[nn.Parameter, Tensor]:
    before, after = optimizer.param_groups[0]["params"]
    loss: Tensor = checkpoint(lambda x: optimizer.scale((x * after).sum()), before * 2.0, use_reentrant=use_reentrant)
    return before, loss


def two_weights() -> pyzero.FusedZeroAdam:
    return pyzero.FusedZeroAdam([nn.Parameter(torch.ones(4)) for _ in range(2)], loss_scale=SCALE)


def test_a_loss_scaled_inside_a_reentrant_checkpoint_is_refused():
    optimizer = two_weights()
    _, loss = loss_scaled_in_a_checkpoint(optimizer, True)
    with pytest.raises(RuntimeError, match="scale what the checkpoint returns"):
        loss.backward()
    assert not optimizer.is_scaled_backward


@pytest.mark.parametrize("is_held", [False, True])
def test_inside_others_and_in_scaled_gradients_it_counts(is_held):
    optimizer = two_weights()
    before, loss = loss_scaled_in_a_checkpoint(optimizer, is_held)
    with optimizer.scaled_gradients() if is_held else contextlib.nullcontext():
        loss.backward()
    assert torch.equal(optimizer.full_grad(before), torch.full((4,), 2.0))


def received_in_nested_contexts(group: Any, stage: int) -> Tensor:
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroSGD([param], lr=0.0, process_group=group, stage=stage, loss_scale=SCALE)
    received = torch.full((4,), optimizer.loss_scale)
    with optimizer.scaled_gradients():
        with optimizer.scaled_gradients():
            (param * 1.0).backward(received)
        (param * 1.0).backward(received)
    optimizer.step()
    return optimizer.full_grad(param).clone()


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_scaled_gradients_goes_on_after_one_inside_it(ranks, size, stage):
    for grad in ranks.run(size, received_in_nested_contexts, stage):
        assert torch.equal(grad, torch.full((4,), 2.0))


def norm_with_a_load(group: Any, stage: int, scale: float | None) -> tuple[float, float]:
    """Of gradients of two backwards, the first held back, with a state of another loss scale loaded between them."""
    model = build(torch.float16)
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group, stage=stage, loss_scale=SCALE)
    with optimizer.no_sync():
        optimizer.backward(loss_of(model, micro_batch(0, group.rank())))
    if scale is not None:
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0]["scaler"][0] = scale
        optimizer.load_state_dict(state_dict)
    optimizer.backward(loss_of(model, micro_batch(1, group.rank())))
    optimizer.step()
    return optimizer.grad_norm.item(), optimizer.loss_scale


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_keep_their_scale_where_another_one_is_loaded(ranks, stage):
    ((wanted, _), *_) = ranks.run(2, norm_with_a_load, stage, None)
    for norm, scale in ranks.run(2, norm_with_a_load, stage, 2.0**6):
        assert scale == 2.0**6
        assert norm == pytest.approx(wanted, rel=1e-4)  # small values round otherwise at another scale


def load_another_on_rank_1(group: Any) -> tuple[str, float]:
    optimizer = pyzero.FusedZeroAdam(build(torch.float16).parameters(), process_group=group, loss_scale=SCALE)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["scaler"][0] *= 1 + group.rank()
    with pytest.raises(ValueError, match="another loss scale on rank 1") as raised:
        optimizer.load_state_dict(state_dict)
    return str(raised.value), optimizer.loss_scale


def test_states_of_several_loss_scales_are_refused_on_all_ranks(ranks):
    first, second = ranks.run(2, load_another_on_rank_1)
    assert first == second
    assert first[1] == SCALE.init_scale


def test_the_same_scale_may_be_loaded_between_two_backwards_on_one_rank():
    param, optimizer = fp16_weight()
    optimizer.backward(param.float().sum())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.backward(param.float().sum())
    assert torch.equal(optimizer.full_grad(param), torch.full((4,), 2.0))


def test_another_scale_loaded_between_two_backwards_on_one_rank_is_refused():
    param, optimizer = fp16_weight()
    optimizer.backward(param.float().sum())
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["scaler"][0] *= 2
    optimizer.load_state_dict(state_dict)
    with pytest.raises(RuntimeError, match="scale"):
        optimizer.backward(param.float().sum())
    optimizer.zero_grad()
    optimizer.backward(param.float().sum())
    assert torch.equal(optimizer.full_grad(param), torch.ones(4))


def goes_on(saved_at: Any, loss_scale: Any) -> list[float]:
    """How far lr=1.0 moves a weight in each clean step after a load, and the scale then; an overflow comes between."""
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    before = pyzero.FusedZeroSGD([weight], lr=1.0, loss_scale=saved_at)
    optimizer = pyzero.FusedZeroSGD([weight], lr=1.0, loss_scale=loss_scale)
    optimizer.load_state_dict(before.state_dict())
    seen = []
    for factor in (1.0, math.inf, 1.0, 1.0):
        optimizer.zero_grad()
        was = weight.detach().clone()
        optimizer.backward((weight.float() * factor).sum())
        optimizer.step()
        seen += [(was - weight.detach())[0].item(), optimizer.loss_scale] if factor == 1.0 else []
    return seen


QUICK = {"growth_interval": 2, "max_scale": 128.0, "min_scale": 16.0}


@pytest.mark.parametrize(
    ("saved_at", "loss_scale", "scales"),
    [
        (64.0, 1024.0, [1024.0] * 3),
        (1024.0, 64.0, [64.0] * 3),
        (pyzero.LossScale(64.0), 1024.0, [1024.0] * 3),
        (64.0, pyzero.LossScale(1024.0, growth_factor=1.0, backoff_factor=1.0, max_scale=128.0), [1024.0] * 3),
        (64.0, pyzero.LossScale(32.0, **QUICK), [64.0, 32.0, 64.0]),
        (1024.0, pyzero.LossScale(32.0, **QUICK), [128.0, 64.0, 128.0]),
        (1.0, pyzero.LossScale(32.0, **QUICK), [16.0, 16.0, 32.0]),
        (1.0, pyzero.LossScale(32.0, growth_factor=1.0, min_scale=16.0), [16.0] * 3),
    ],
)
def test_gradients_are_unscaled_by_the_scale_that_they_carry_after_another_was_loaded(saved_at, loss_scale, scales):
    """A fixed scale stays what it was built with; a dynamic one becomes the saved one, inside its bounds."""
    assert goes_on(saved_at, loss_scale) == [1.0, scales[0], 1.0, scales[1], 1.0, scales[2]]


def test_state_without_a_loss_scale_brings_only_its_skips():
    """Neither how many clean steps it has counted, nor how many overflows a policy of its own would still bear."""

    def scales(loads: bool) -> list[float]:
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        before = pyzero.FusedZeroSGD([weight], loss_scale=None)
        weight.grad = torch.full_like(weight, math.inf)
        before.step()
        optimizer = pyzero.FusedZeroSGD([weight], loss_scale=pyzero.LossScale(64.0, hysteresis=3, growth_interval=2))
        if loads:
            optimizer.load_state_dict(before.state_dict())
            assert optimizer.skipped_steps == 1
        seen = []
        for factor in (1.0, math.inf, math.inf, 1.0, 1.0, math.inf):
            optimizer.zero_grad()
            optimizer.backward((weight.float() * factor).sum())
            optimizer.step()
            seen.append(optimizer.loss_scale)
        return seen

    assert scales(loads=True) == scales(loads=False)


def test_a_first_scale_outside_its_bounds_unscales_by_what_it_becomes():
    for policy in (pyzero.LossScale(1024.0, **QUICK), pyzero.LossScale(1.0, **QUICK)):
        assert goes_on(8.0, policy)[::2] == [1.0] * 3
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        optimizer = pyzero.FusedZeroSGD([weight], lr=1.0, loss_scale=policy)
        for step in range(1, 5):
            optimizer.zero_grad()
            optimizer.backward(weight.float().sum())
            optimizer.step()
            assert (weight == -step).all()


def test_what_grad_scaler_steps_leaves_the_scale_alone():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = pyzero.FusedZeroSGD([weight], lr=1.0, loss_scale=pyzero.LossScale(1.0, **QUICK))
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    grad_scaler.scale((weight.float() * math.inf).sum()).backward()
    grad_scaler.step(optimizer)
    optimizer.zero_grad()
    assert optimizer.loss_scale == 1.0
    optimizer.backward(weight.float().sum())
    optimizer.step()
    assert (weight == -1).all()


@pytest.mark.parametrize(
    ("how", "is_told"), [("plain", True), ("backward", False), ("scale", False), ("GradScaler", False), ("None", False)]
)
def test_a_plain_backward_of_fp16_weights_is_told_once(how, is_told, caplog):
    param, optimizer = fp16_weight()
    if how == "None":
        optimizer = pyzero.FusedZeroAdam([param], loss_scale=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with caplog.at_level(logging.WARNING, logger="pyzero"):
        for _ in range(2):
            optimizer.zero_grad()
            loss = param.float().sum()
            {
                "backward": lambda: optimizer.backward(loss),  # noqa: B023
                "scale": lambda: optimizer.scale(loss).backward(),  # noqa: B023
                "GradScaler": lambda: scaler.scale(loss).backward(),  # noqa: B023
            }.get(how, loss.backward)()
            if how == "GradScaler":
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
    told = [record for record in caplog.records if "plain backward" in record.message]
    assert len(told) == is_told


def test_bf16_and_fp32_weights_are_told_nothing(caplog):
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = pyzero.FusedZeroAdam([param], loss_scale="dynamic")
        param.float().sum().backward()
        optimizer.step()
    assert not [record for record in caplog.records if "plain backward" in record.message]


def test_zeros_of_zero_grad_are_not_looked_at(monkeypatch):
    """To read them is to wait for a GPU, in every step; what the caller has put there since is read."""
    seen = []
    have_values = scale_tracker.have_values
    monkeypatch.setattr(scale_tracker, "have_values", lambda grads: (seen.append(len(grads)), have_values(grads))[1])
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = pyzero.FusedZeroAdam(params, loss_scale="dynamic")
    for _ in range(3):
        optimizer.backward(sum(param.sum() for param in params))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert seen == [0, 0]  # none was there at first
    params[1].grad.add_(1.0)
    with pytest.raises(RuntimeError, match="same loss scale"):
        optimizer.backward(sum(param.sum() for param in params))
    assert seen[2] == 1


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("init_scale", math.inf, "2**-126 <= init_scale < 2**128"),
        ("init_scale", 1e39, "2**-126 <= init_scale < 2**128"),  # inf in fp32
        ("init_scale", 3.40282363e38, "2**-126 <= init_scale < 2**128"),  # the same, and below 2**128
        ("init_scale", 0.0, "2**-126 <= init_scale < 2**128"),
        ("init_scale", 1e-40, "2**-126 <= init_scale < 2**128"),  # its inverse is inf in fp32
        ("growth_factor", math.nan, "1 <= growth_factor < inf"),
        ("growth_factor", math.inf, "1 <= growth_factor < inf"),
        ("backoff_factor", 1.5, "0 < backoff_factor <= 1"),
        ("growth_interval", 0, "growth_interval >= 1"),
        ("min_scale", 0.0, "2**-126 <= min_scale < 2**128"),
        ("min_scale", 1e-60, "2**-126 <= min_scale < 2**128"),
        ("min_scale", 1e39, "2**-126 <= min_scale < 2**128"),
        ("max_scale", 2.0**-20, "min_scale <= max_scale"),
        ("hysteresis", 0, "hysteresis >= 1"),
        ("growth_delay", -1, "growth_delay >= 0"),
        ("growth_interval", 2.5, "growth_interval as a whole number"),
        ("growth_interval", math.inf, "growth_interval as a whole number"),
        ("hysteresis", 1.5, "hysteresis as a whole number"),
        ("growth_delay", 0.5, "growth_delay as a whole number"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(field, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"expected {wanted}, got LossScale(") + rf".*{field}=.*; correct"):
        pyzero.LossScale(**{field: value})
    if field == "init_scale":
        with pytest.raises(ValueError, match=re.escape(f"expected {wanted}")):
            pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))], loss_scale=value)


@pytest.mark.parametrize("field", ["init_scale", "growth_factor", "growth_interval", "max_scale"])
def test_a_policy_of_other_than_numbers_is_refused(field):
    with pytest.raises(TypeError, match=f"expected {field} as a number, got (the text )?'2'; pass"):
        pyzero.LossScale(**{field: "2"})


def test_a_whole_number_may_be_a_float():
    param = nn.Parameter(torch.ones(3))
    policy = pyzero.LossScale(8.0, growth_interval=1e0, hysteresis=numpy.float32(1))
    optimizer = pyzero.FusedZeroAdam([param], loss_scale=policy)
    optimizer.backward(param.sum())
    optimizer.step()
    assert optimizer.loss_scale == 16.0


def test_a_step_reads_the_inverse_of_the_scale_at_one_address(monkeypatch):
    """As a CUDA graph of the step does, whatever backwards come between."""
    whole, addresses = ops.step_scalars_, []

    def step_scalars(*args: Any, unscale: Any, **options: Any) -> None:
        addresses.append((unscale.data_ptr(), 1.0 / float(unscale)))
        whole(*args, unscale=unscale, **options)

    monkeypatch.setattr(ops, "step_scalars_", step_scalars)
    param = nn.Parameter(torch.ones(3, dtype=torch.float16))
    scale = pyzero.LossScale(init_scale=8.0, growth_interval=1)
    optimizer = pyzero.FusedZeroSGD([param], lr=0.0, loss_scale=scale)
    for _ in range(3):
        optimizer.backward(param.float().sum())
        optimizer.step()
        optimizer.zero_grad()
    assert len({address for address, _ in addresses}) == 1
    assert [value for _, value in addresses] == [8.0, 16.0, 32.0]
