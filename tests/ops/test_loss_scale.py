"""loss_scale_update_ on every backend: torch's rule, the peers' with hysteresis, limits."""

import dataclasses
import itertools
import random
from fractions import Fraction

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params
from bits import Guarded, assert_same

from pyzero import LossScale, ops
from pyzero.ops.backend import LossScalePolicy
from pyzero.ops.loss_scale import loss_scale_state

ALL = (*FUSED, REFERENCE)
FLAGS = (1, 0, 1, 1, 0, 0, 0, 0, 1, 0)


def scales(
    target: Target, flags: tuple[int, ...], init: float, hysteresis: int = 1, growth_delay: int = 0, **policy: float
) -> list[float]:
    state = Guarded(loss_scale_state(init, hysteresis, "cpu", growth_delay), target.device)
    policy |= {"hysteresis": hysteresis, "growth_delay": growth_delay}
    seen = []
    for flag in flags:
        found_inf = torch.tensor([float(flag)], device=target.device)
        ops.loss_scale_update_(state.tensor, found_inf, **policy, backend=target.backend)
        assert found_inf.item() == flag
        seen.append(state.tensor[0].item())
    state.check("state")
    return seen


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        pytest.param({}, [8, 8, 4, 2, 2, 2, 2, 4, 2, 2], id="torch"),
        pytest.param({"hysteresis": 2}, [16, 16, 8, 4, 4, 4, 4, 8, 8, 8], id="megatron"),
        pytest.param(
            {"hysteresis": 2, "consecutive_hysteresis": True}, [16, 16, 16, 8, 8, 8, 8, 16, 16, 16], id="apex"
        ),
        pytest.param({"hysteresis": 2, "growth_delay": 1}, [16, 16, 8, 4, 4, 4, 4, 4, 2, 2], id="deepspeed"),
        pytest.param(
            {"hysteresis": 2, "growth_delay": 1, "consecutive_hysteresis": True},
            [16, 16, 16, 8, 8, 8, 8, 8, 8, 8],
            id="deepspeed-consecutive",
        ),
    ],
)
@pytest.mark.parametrize("target", params(ALL))
def test_peers(target: Target, policy: dict[str, int], wanted: list[int]) -> None:
    """The scale after each step, as the peers' own code gives it for FLAGS (1: overflow)."""
    with target.ready():
        assert scales(target, FLAGS, 16.0, growth_interval=4, **policy) == wanted


def by_grad_scaler(flags: tuple[int, ...], init: float, growth: float, backoff: float, interval: int) -> list[float]:
    scale, tracker, seen = torch.tensor([init]), torch.zeros(1, dtype=torch.int32), []
    for flag in flags:
        torch._amp_update_scale_(scale, tracker, torch.tensor([float(flag)]), growth, backoff, interval)
        seen.append(scale.item())
    return seen


@pytest.mark.parametrize(("growth", "backoff", "interval"), [(2.0, 0.5, 1), (2.0, 0.5, 7), (1.75, 0.375, 3)])
@pytest.mark.parametrize("target", params(ALL))
def test_equals_torch_grad_scaler(target: Target, growth: float, backoff: float, interval: int) -> None:
    """Also where doubling overflows: the scale then stays. Factors are rounded to fp32 first; torch's are not."""
    rng = random.Random(interval)
    with target.ready():
        for rate, init in itertools.product((0.02, 0.5), (65536.0, 2.0**126)):
            flags = tuple(int(rng.random() < rate) for _ in range(60))
            got = scales(target, flags, init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
            assert got == by_grad_scaler(flags, init, growth, backoff, interval)


@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target) -> None:
    rng = random.Random(0)
    with target.ready():
        for hysteresis, consecutive in itertools.product((1, 2, 5), (False, True)):
            rule = {"hysteresis": hysteresis, "growth_delay": hysteresis - 1, "consecutive_hysteresis": consecutive}
            rule |= {"growth_factor": 1.9, "backoff_factor": 0.7, "growth_interval": 3}
            rule |= {"min_scale": 0.9, "max_scale": 1000.3}
            states = [loss_scale_state(64.0, hysteresis, device, hysteresis - 1) for device in (target.device, "cpu")]
            for step in range(60):
                flag = torch.tensor([rng.choice((0.0, 0.0, 0.0, 1.0, 3.0, float("nan")))])
                ops.loss_scale_update_(states[0], flag.to(target.device), **rule, backend=target.backend)
                ops.loss_scale_update_(states[1], flag, **rule, backend="reference")
                assert_same(states[0], states[1], f"step {step} of {rule}")


@pytest.mark.parametrize("target", params(ALL))
def test_limits(target: Target) -> None:
    with target.ready():
        assert scales(target, (1, 1, 1, 1), 16.0, min_scale=3.0) == [8.0, 4.0, 3.0, 3.0]
        assert scales(target, (0, 0, 0, 0), 16.0, max_scale=100.0, growth_interval=1) == [32.0, 64.0, 100.0, 100.0]


@pytest.mark.parametrize("target", params(ALL))
def test_numbers_that_fp32_does_not_hold(target: Target) -> None:
    with target.ready():
        assert scales(target, (0, 0), 16.0, max_scale=1e300, growth_interval=1) == [32.0, 64.0]
        assert scales(target, (0, 1), 16.0, growth_interval=10**30) == [16.0, 8.0]
        assert scales(target, (0, 0), 16.0, growth_factor=Fraction(3, 2), growth_interval=1) == [24.0, 36.0]


@pytest.mark.parametrize("target", params(ALL))
def test_counters(target: Target) -> None:
    with target.ready():
        state = loss_scale_state(16.0, 1, target.device)
        seen = []
        for flag in (0, 1, 1, 0, 1):
            ops.loss_scale_update_(state, torch.tensor([float(flag)], device=target.device), backend=target.backend)
            seen.append(state[[1, 3, 4]].tolist())
    assert seen == [[1, 0, 0], [0, 1, 1], [0, 2, 2], [1, 2, 0], [0, 3, 1]]


def test_the_optimizers_policy_is_the_ops() -> None:
    fields = {field.name for field in dataclasses.fields(LossScale)} - {"init_scale"}
    assert fields == set(LossScalePolicy._fields)
    assert LossScale(min_scale=3.0, hysteresis=2).op_policy() == LossScalePolicy(min_scale=3.0, hysteresis=2)


def test_a_field_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="growth_intervall"):
        ops.loss_scale_update_(loss_scale_state(16.0, 1, "cpu"), torch.zeros(1), growth_intervall=3)
