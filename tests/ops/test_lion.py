"""lion_ on every backend: the reference's bits, numbers by hand, fp64, what it must leave alone."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size, use_threads
from bits import DTYPES, assert_same, name, tame
from shard_case import SIZES, ShardCase, assert_all_same, check, check_lists, check_peers, run, run_shifted
from tolerances import UNIT
from torch import Tensor

from pyzero import ops

ALL = (*FUSED, REFERENCE)


@dataclass(frozen=True)
class Case(ShardCase):
    """One call of lion_."""

    op = ops.lion_
    state = ("master", "exp_avg")

    def options(self, device: str) -> dict[str, object]:
        return super().options(device) | {"beta1": 0.9, "beta2": 0.99}


@pytest.mark.parametrize("out", (None, *DTYPES), ids=name)
@pytest.mark.parametrize("grad", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, grad: torch.dtype, out: torch.dtype | None) -> None:
    with target.ready():
        for decay, maximize, on_device in itertools.product((0.0, 0.02), (False, True), (False, True)):
            check(Case(grad=grad, out=out, weight_decay=decay, maximize=maximize, on_device=on_device), target)


@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        check(Case(numel, torch.bfloat16, torch.float16, weight_decay=0.01), target)
        check(Case(numel, torch.float16, torch.bfloat16, is_wild=False), target)


@pytest.mark.parametrize("shift", (1, 3, 4))
@pytest.mark.parametrize("target", params(ALL))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        for numel, grad, out in itertools.product((3, 1037), DTYPES, (None, *DTYPES)):
            check(Case(numel, grad, out, shift=shift), target)


@pytest.mark.parametrize("target", params(FUSED))
def test_tensors_of_different_alignment(target: Target) -> None:
    case = Case(1500, torch.bfloat16, torch.float16)
    wanted = run(case, REFERENCE)
    with target.ready():
        for shifts in itertools.permutations((0, 1, 2, 4), 4):
            values = case.inputs()
            got = run_shifted(case, target, values, dict(zip(values, shifts, strict=True)))
            assert_all_same(got, wanted, f"{case} at {shifts}")


@pytest.mark.parametrize("target", params(ALL))
def test_numbers_and_tensors_give_the_same_bits(target: Target) -> None:
    with target.ready():
        for decay in (0.0, 0.02):
            case = Case(300, torch.bfloat16, torch.bfloat16, weight_decay=decay)
            got = run(dataclasses.replace(case, on_device=True), target)
            assert_all_same(got, run(case, target), str(case))


@pytest.mark.parametrize("flag", (0.0, 1.0, float("nan")))
@pytest.mark.parametrize("target", params(ALL))
def test_found_inf(target: Target, flag: float) -> None:
    with target.ready():
        for on_device, segments in itertools.product((False, True), (0, 4)):
            options = {"found_inf": flag, "on_device": on_device, "segments": segments, "idle": segments > 0}
            case = Case(1100, torch.float16, torch.float16, **options)
            if flag == 0:
                check(case, target)
            else:
                assert_all_same(run(case, target), case.inputs(), str(case), nan_is_nan=False)


@pytest.mark.parametrize("idle", (False, True))
@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, (1, 63, 64, 65, 1000, 2048, 5000, 32768 + 200)))
def test_segments(target: Target, numel: int, idle: bool) -> None:
    """Against the call without segments where they are active, and the inputs where not."""
    case = Case(numel, torch.bfloat16, torch.float16, weight_decay=0.01, segments=5, idle=idle, is_wild=False)
    with target.ready():
        got = run(case, target)
    before, whole = case.inputs(), run(dataclasses.replace(case, segments=0, idle=False), REFERENCE)
    acts = torch.ones(numel, dtype=torch.bool)
    if idle:
        acts = case.active()[case.segment_ids().long()].repeat_interleave(64)[:numel] != 0
    wanted = {each: torch.where(acts, whole[each], before[each]) for each in before}
    assert_all_same(got, wanted, str(case), nan_is_nan=False)


@pytest.mark.parametrize("target", params(ALL))
def test_param_out_is_the_rounded_master(target: Target) -> None:
    with target.ready():
        for out in DTYPES:
            got = run(Case(900, out=out), target)
            assert_same(got["param_out"], got["master"].to(out), name(out))


@pytest.mark.parametrize("numel", (1, 300, 5000, 64 * 400 + 3))
@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_gradients_that_lie_apart(target: Target, numel: int) -> None:
    with target.ready():
        check_lists(Case, numel, target)


@pytest.mark.parametrize("out", DTYPES, ids=name)
@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_weights_for_peers(target: Target, out: torch.dtype) -> None:
    with target.ready():
        check_peers(Case, out, target)


def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(70_001, torch.bfloat16, torch.bfloat16)
    wanted = run(case, REFERENCE)
    for num_threads in (1, 2, 3, 7):
        use_threads(monkeypatch, num_threads)
        assert_all_same(run(case, FUSED[0]), wanted, f"{case} with {num_threads} threads")


# ---- by hand and in fp64 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", (False, True))
@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(target: Target, maximize: bool) -> None:
    """Powers of two, so that all is exact. g = 4 * grad = (8, -8, 0, 4); u = sign(m / 2 + g / 2); p = p * (1 - 1/16).

    m / 2 + g / 2 = (5, -3, 0, 0): u = (1, -1, 0, 0). m = 3/4 m + g / 4 = (3.5, -0.5, 0, -2). Downhill, lr = 1/4.
    """
    state = {
        "master": torch.full((4,), 16.0),
        "exp_avg": torch.tensor([2.0, 2.0, 0.0, -4.0]),
        "grad": torch.tensor([2.0, -2.0, 0.0, 1.0]) * (-1 if maximize else 1),
    }
    with target.ready():
        tensors = {each: value.to(target.device) for each, value in state.items()}
        ops.lion_(
            **tensors, lr=0.25, beta1=0.5, beta2=0.75, weight_decay=0.25, maximize=maximize, grad_scale=4.0,
            backend=target.backend,
        )  # fmt: skip
    assert tensors["master"].tolist() == [14.75, 15.25, 15.0, 15.0]
    assert tensors["exp_avg"].tolist() == [3.5, -0.5, 0.0, -2.0]


@pytest.mark.parametrize("target", params(ALL))
def test_zero_and_nan(target: Target) -> None:
    """Zeros of either sign do not move a weight, nor turn its sign; a NaN that no flag guards is not hidden."""
    zeros = [0.0, -0.0, 0.0, -0.0, math.nan, math.inf]
    with target.ready():
        master = torch.tensor([-0.0, -0.0, 1.0, 1.0, 1.0, 1.0], device=target.device)
        exp_avg = torch.tensor([0.0, -0.0, -0.0, -0.0, 1.0, -1.0], device=target.device)
        grad = torch.tensor(zeros, device=target.device)
        ops.lion_(
            master, exp_avg, grad, lr=0.5, beta1=0.5, beta2=0.5, weight_decay=0.0, backend=target.backend
        )  # fmt: skip
    wanted = torch.tensor([-0.0, -0.0, 1.0, 1.0, math.nan, 0.5])
    assert_same(master, wanted, "master")


@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
@pytest.mark.parametrize("target", params(ALL))
def test_against_fp64(target: Target, weight_decay: float) -> None:
    """Step by step from where the last one ended, against the paper's lines in fp64.

    Roundings of at most u of each operand: the blend errs by 4 u of its terms' size (two constants, two products, a
    sum), and its sign is only owed outside of that; the master by 4 u, exp_avg by 5.
    """
    unit, lr, beta1, beta2 = UNIT[torch.float32], 1e-2, 0.9, 0.99
    state = [tame(3000, torch.float32, 0), torch.zeros(3000)]
    undecided = 0
    for step in range(20):
        grad = tame(3000, torch.float32, step + 1)
        p, m, g = (tensor.double() for tensor in (*state, grad))
        blend = beta1 * m + (1 - beta1) * g
        size = beta1 * m.abs() + (1 - beta1) * g.abs()
        direction = blend.sign()
        wanted_m = beta2 * m + (1 - beta2) * g

        with target.ready():
            tensors = [tensor.to(target.device) for tensor in (*state, grad)]
            ops.lion_(
                *tensors, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, backend=target.backend
            )  # fmt: skip
        state = [tensor.cpu() for tensor in tensors[:2]]

        decided = blend.abs() > 5 * unit * size
        undecided += int((~decided).sum())
        moved = p * (1 - lr * weight_decay) - lr * direction
        assert ((state[0].double() - moved).abs() <= 4 * unit * (p.abs() + lr))[decided].all()
        assert ((state[1].double() - wanted_m).abs() <= 5 * unit * (beta2 * m.abs() + (1 - beta2) * g.abs())).all()
    assert undecided < 10


def test_the_reference_computes_in_fp64() -> None:
    state = [tame(50, torch.float32, seed).double() for seed in range(3)]
    p, m, g = (tensor.clone() for tensor in state)
    ops.lion_(*state, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.3, backend="reference")
    blend: Tensor = 0.9 * m + (1 - 0.9) * g
    assert torch.equal(state[0], p * (1 - 0.1 * 0.3) - 0.1 * blend.sign())
    assert torch.equal(state[1], 0.99 * m + (1 - 0.99) * g)
