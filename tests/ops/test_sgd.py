"""sgd_ on every backend: the reference's bits, numbers by hand, torch's and fp64's, what it must leave alone."""

import dataclasses
import itertools
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
    """One call of sgd_."""

    op = ops.sgd_
    state = ("master", "momentum_buffer")

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    step: int = 3

    def numbers(self) -> dict[str, float]:
        return super().numbers() | ({"step": float(self.step)} if self.dampening else {})

    def options(self, device: str) -> dict[str, object]:
        made = super().options(device)
        if self.segments and self.dampening:
            made["step"] = self.segment_steps().to(device)
        return made | {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}

    def segment_steps(self) -> Tensor:
        """Some segments are at their first step."""
        return torch.arange(self.segments) % 2 * 4.0 + 1


def sgd_without_buffer(master: Tensor, grad: Tensor, **options: object) -> None:
    ops.sgd_(master, None, grad, **options)


@dataclass(frozen=True)
class Plain(Case):
    """One call without a momentum buffer."""

    op = sgd_without_buffer
    state = ("master",)

    momentum: float = 0.0


RULES = (
    Plain(),
    Plain(weight_decay=0.02),
    Case(),
    Case(weight_decay=0.02, nesterov=True),
    Case(weight_decay=0.02, dampening=0.3),
    Case(dampening=0.3, step=1),
    Case(dampening=0.3, step=1, nesterov=True),
)


def name_of_rule(case: Case) -> str:
    values = {"momentum": case.momentum, "decay": case.weight_decay, "dampening": case.dampening, "step": case.step}
    return ",".join(each + str(value) for each, value in values.items()) + ",nesterov" * case.nesterov


@pytest.mark.parametrize("out", (None, *DTYPES), ids=name)
@pytest.mark.parametrize("grad", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, grad: torch.dtype, out: torch.dtype | None) -> None:
    with target.ready():
        for rule, maximize, on_device in itertools.product(RULES, (False, True), (False, True)):
            check(dataclasses.replace(rule, grad=grad, out=out, maximize=maximize, on_device=on_device), target)


@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        check(Case(numel, torch.bfloat16, torch.float16, weight_decay=0.01), target)
        check(Case(numel, torch.float16, torch.bfloat16, is_wild=False, nesterov=True), target)
        check(Plain(numel, torch.bfloat16, torch.bfloat16, weight_decay=0.01), target)


@pytest.mark.parametrize("shift", (1, 3, 4))
@pytest.mark.parametrize("target", params(ALL))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        for make, numel, grad, out in itertools.product((Case, Plain), (3, 1037), DTYPES, (None, *DTYPES)):
            check(make(numel, grad, out, shift=shift), target)


@pytest.mark.parametrize("make", (Case, Plain))
@pytest.mark.parametrize("target", params(FUSED))
def test_tensors_of_different_alignment(target: Target, make: type[Case]) -> None:
    case = make(1500, torch.bfloat16, torch.float16)
    wanted = run(case, REFERENCE)
    with target.ready():
        values = case.inputs()
        for shifts in itertools.permutations((0, 1, 2, 4)[-len(values) :]):
            got = run_shifted(case, target, values, dict(zip(values, shifts, strict=True)))
            assert_all_same(got, wanted, f"{case} at {shifts}")


@pytest.mark.parametrize("target", params(ALL))
def test_numbers_and_tensors_give_the_same_bits(target: Target) -> None:
    with target.ready():
        for rule in RULES:
            case = dataclasses.replace(rule, numel=300, grad=torch.bfloat16, out=torch.bfloat16)
            got = run(dataclasses.replace(case, on_device=True), target)
            assert_all_same(got, run(case, target), str(case))


@pytest.mark.parametrize("flag", (0.0, 1.0, float("nan")))
@pytest.mark.parametrize("target", params(ALL))
def test_found_inf(target: Target, flag: float) -> None:
    with target.ready():
        for make, on_device, segments in itertools.product((Case, Plain), (False, True), (0, 4)):
            options = {"found_inf": flag, "on_device": on_device, "segments": segments, "idle": segments > 0}
            case = make(1100, torch.float16, torch.float16, **options)
            if flag == 0:
                check(case, target)
            else:
                assert_all_same(run(case, target), case.inputs(), str(case), nan_is_nan=False)


@pytest.mark.parametrize("idle", (False, True))
@pytest.mark.parametrize("dampening", (0.0, 0.3))
@pytest.mark.parametrize(("target", "numel"), params_by_size(ALL, (1, 63, 64, 65, 1000, 2048, 5000, 32768 + 200)))
def test_segments(target: Target, numel: int, dampening: float, idle: bool) -> None:
    """Each segment as one call at its step without segments where it is active, and the inputs where not."""
    hyper = {"weight_decay": 0.01, "dampening": dampening, "is_wild": False}
    case = Case(numel, torch.bfloat16, torch.float16, segments=5, idle=idle, **hyper)
    with target.ready():
        got = run(case, target)
    segment = case.segment_ids().long().repeat_interleave(64)[:numel]
    wanted = case.inputs()
    for index, step in enumerate(case.segment_steps().tolist()):
        if not idle or case.active()[index]:
            alone = run(dataclasses.replace(case, segments=0, idle=False, step=int(step)), REFERENCE)
            wanted = {each: torch.where(segment == index, alone[each], wanted[each]) for each in wanted}
    assert_all_same(got, wanted, str(case), nan_is_nan=False)


@pytest.mark.parametrize("target", params(ALL))
def test_param_out_is_the_rounded_master(target: Target) -> None:
    with target.ready():
        for make, out in itertools.product((Case, Plain), DTYPES):
            got = run(make(900, out=out), target)
            assert_same(got["param_out"], got["master"].to(out), name(out))


@dataclass(frozen=True)
class Dampened(Case):
    """At the first step, or with segments some at theirs."""

    dampening: float = 0.3
    step: int = 1


@pytest.mark.parametrize("make", (Case, Dampened, Plain))
@pytest.mark.parametrize("numel", (1, 300, 5000, 64 * 400 + 3))
@pytest.mark.parametrize("target", params(ALL))
def test_gradients_that_lie_apart(target: Target, numel: int, make: type[Case]) -> None:
    with target.ready():
        check_lists(make, numel, target)


@pytest.mark.parametrize("make", (Case, Plain))
@pytest.mark.parametrize("out", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(ALL))
def test_weights_for_peers(target: Target, out: torch.dtype, make: type[Case]) -> None:
    with target.ready():
        check_peers(make, out, target)


def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case(70_001, torch.bfloat16, torch.bfloat16), Plain(70_001, torch.float16)):
        wanted = run(case, REFERENCE)
        for num_threads in (1, 2, 3, 7):
            use_threads(monkeypatch, num_threads)
            assert_all_same(run(case, FUSED[0]), wanted, f"{case} with {num_threads} threads")


# ---- by hand, against torch and in fp64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", (False, True))
@pytest.mark.parametrize(
    ("options", "weights", "buffer"),
    [
        ({}, [13.0, 16.0, 14.0], [12.0, 0.0, 8.0]),
        ({"nesterov": True}, [11.5, 18.0, 13.0], [12.0, 0.0, 8.0]),
        ({"dampening": 0.5, "step": 2}, [14.5, 15.0, 15.0], [6.0, 4.0, 4.0]),
        ({"dampening": 0.5, "step": 1}, [13.0, 16.0, 14.0], [12.0, 0.0, 8.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(
    target: Target, options: dict[str, object], weights: list[float], buffer: list[float], maximize: bool
) -> None:
    """Powers of two, so that all is exact. g = 4 * grad + p / 4 = (12, -8, 8), m = (0, 16, 0), lr = 1/4.

    The buffer becomes m / 2 + g = (12, 0, 8), with Nesterov the step is g + buffer / 2 = (18, -8, 12); dampened,
    m / 2 + g / 2 = (6, 4, 4), but not at the first step.
    """
    grad = torch.tensor([2.0, -3.0, 1.0]) * (-1 if maximize else 1)
    state = {"master": torch.full((3,), 16.0), "momentum_buffer": torch.tensor([0.0, 16.0, 0.0]), "grad": grad}
    with target.ready():
        tensors = {each: value.to(target.device) for each, value in state.items()}
        hyper = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.25, "grad_scale": 4.0, "maximize": maximize}
        ops.sgd_(**tensors, **hyper, **options, backend=target.backend)
    assert tensors["momentum_buffer"].tolist() == buffer
    assert tensors["master"].tolist() == weights


@pytest.mark.parametrize("target", params(ALL))
def test_by_hand_without_a_buffer(target: Target) -> None:
    """16 - (4 * (2, -3, 0) + 16 / 4) / 4."""
    with target.ready():
        master = torch.full((3,), 16.0, device=target.device)
        grad = torch.tensor([2.0, -3.0, 0.0], device=target.device)
        hyper = {"lr": 0.25, "weight_decay": 0.25, "grad_scale": 4.0}
        ops.sgd_(master, None, grad, dampening=0.5, **hyper, backend=target.backend)
    assert master.tolist() == [13.0, 18.0, 15.0]


@pytest.mark.parametrize("has_buffer", (False, True))
@pytest.mark.parametrize("target", params(ALL))
def test_without_weight_decay_an_infinite_weight_stays(target: Target, has_buffer: bool) -> None:
    """As torch's, which adds nothing then: 0 times inf is NaN."""
    with target.ready():
        master = torch.tensor([torch.inf, -torch.inf, 1.0], device=target.device)
        buffer = torch.zeros_like(master) if has_buffer else None
        ops.sgd_(master, buffer, torch.full_like(master, 2.0), lr=0.25, backend=target.backend)
    assert master.tolist() == [torch.inf, -torch.inf, 0.5]
    assert buffer is None or buffer.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.step > 1], ids=name_of_rule)
@pytest.mark.parametrize("target", params(ALL))
def test_against_torch_in_fp64(target: Target, rule: Case) -> None:
    """Step by step from where the last one ended, against torch.optim.SGD in fp64, whose buffer begins as ours.

    Roundings of at most u of each operand. g errs by 3 u of its terms' size (weight decay's constant, a product, a
    sum), the buffer by 6 (a constant, a product and a sum more), the step by 9 (the same again with Nesterov), and the
    master by u of itself and 12 of what is subtracted (lr, a product, a sum).
    """
    unit, lr = UNIT[torch.float32], 1e-2
    hyper = {"lr": lr, "momentum": rule.momentum, "dampening": rule.dampening, "nesterov": rule.nesterov}
    hyper["weight_decay"] = rule.weight_decay
    has_buffer = not isinstance(rule, Plain)
    master, buffer = tame(3000, torch.float32, 0), torch.zeros(3000)
    for step in range(1, 6):
        grad = tame(3000, torch.float32, step)
        oracle = torch.nn.Parameter(master.double())
        optimizer = torch.optim.SGD([oracle], **hyper, foreach=False)
        if has_buffer and step > 1:
            optimizer.state[oracle]["momentum_buffer"] = buffer.double()
        size_g = grad.double().abs() + rule.weight_decay * master.double().abs()
        size_m = rule.momentum * buffer.double().abs() + size_g
        size = size_g + rule.momentum * size_m if rule.nesterov else size_m
        oracle.grad = grad.double()
        optimizer.step()

        with target.ready():
            tensors = [tensor.to(target.device) for tensor in (master, buffer, grad)]
            given = (tensors[0], tensors[1] if has_buffer else None, tensors[2])
            ops.sgd_(*given, **hyper, step=step if rule.dampening else None, backend=target.backend)
        before, (master, buffer) = master.double(), [tensor.cpu() for tensor in tensors[:2]]

        error = (master.double() - oracle.detach()).abs()
        assert (error <= unit * (before.abs() + 12 * lr * size)).all()
        if has_buffer:
            wanted = optimizer.state[oracle]["momentum_buffer"]
            assert ((buffer.double() - wanted).abs() <= 6 * unit * size_m).all()


def test_the_reference_computes_in_fp64() -> None:
    state = [tame(50, torch.float32, seed).double() for seed in range(3)]
    p, m, g = (tensor.clone() for tensor in state)
    ops.sgd_(*state, lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True, backend="reference")
    g = g + 0.3 * p
    m = 0.9 * m + g
    assert torch.equal(state[1], m)
    assert torch.equal(state[0], p - 0.1 * (g + 0.9 * m))
