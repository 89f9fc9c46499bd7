"""adam_ on every backend: the reference's bits, its bounds, what it must leave alone."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size
from bits import DTYPES, Guarded, assert_same, name, tame, wild
from torch import Tensor

from pyzero import ops

FP32_LR = 0.0010000000474974513  # what a tensor can hold, so that number and tensor mean the same
SIZES = (0, 1, 7, 63, 64, 65, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4097, 32767, 32768, 32769)
STATE = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Case:
    """One call of adam_."""

    numel: int = 700
    grad: torch.dtype = torch.float32
    out: torch.dtype | None = None
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    on_device: bool = False  # lr, step and grad_scale as tensors
    step: int = 3
    grad_scale: float = 0.37109375
    found_inf: float | None = None
    shift: int = 0  # elements off alignment
    segments: int = 0
    idle: bool = False  # some segments are not active
    is_wild: bool = True

    def inputs(self) -> dict[str, Tensor]:
        make = wild if self.is_wild else tame
        made = {each: make(self.numel, torch.float32, seed) for seed, each in enumerate(STATE)}
        made["exp_avg_sq"] = made["exp_avg_sq"].abs()
        made["grad"] = make(self.numel, self.grad, 3)
        if self.out is not None:
            made["param_out"] = make(self.numel, self.out, 4)
        return made

    def options(self, device: str) -> dict[str, object]:
        numbers = {"lr": FP32_LR, "step": float(self.step), "grad_scale": self.grad_scale}
        made: dict[str, object] = dict(numbers)
        if self.on_device:
            made = {each: torch.tensor(value, device=device) for each, value in numbers.items()}
        if self.found_inf is not None:
            made["found_inf"] = torch.tensor([self.found_inf], device=device)
        if self.segments:
            made["segment_ids"] = self.segment_ids().to(device)
            made["step"] = self.segment_steps().to(device)
        if self.idle:
            made["active"] = self.active().to(device)
        return made | {
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": self.weight_decay,
            "decoupled_weight_decay": self.decoupled,
            "maximize": self.maximize,
        }

    def segment_ids(self) -> Tensor:
        granules = -(-self.numel // 64)
        return (torch.arange(granules) // 3 * 7 % self.segments).to(torch.int32)

    def segment_steps(self) -> Tensor:
        return self.step + torch.arange(float(self.segments))

    def active(self) -> Tensor:
        return (torch.arange(self.segments) % 3 != 1).float()


def run(case: Case, target: Target, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors after the call, on the CPU; canaries and the gradient are checked here."""
    values = case.inputs() if values is None else values
    held = {each: Guarded(value, target.device, case.shift) for each, value in values.items()}
    tensors = {each: guard.tensor for each, guard in held.items()}
    ops.adam_(**tensors, **case.options(target.device), backend=target.backend)
    for each, guard in held.items():
        guard.check(f"{each} of {case}")
    assert_same(tensors["grad"], values["grad"], f"grad of {case}", nan_is_nan=False)
    return {each: tensor.cpu() for each, tensor in tensors.items()}


def check(case: Case, target: Target) -> None:
    got, wanted = run(case, target), run(case, REFERENCE)
    for each in wanted:
        assert_same(got[each], wanted[each], f"{each} of {case}")


DECAYS = ({}, {"weight_decay": 0.02}, {"weight_decay": 0.02, "decoupled": True})


@pytest.mark.parametrize("out", (None, *DTYPES), ids=name)
@pytest.mark.parametrize("grad", DTYPES, ids=name)
@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target, grad: torch.dtype, out: torch.dtype | None) -> None:
    with target.ready():
        for decay, maximize, on_device in itertools.product(DECAYS, (False, True), (False, True)):
            check(Case(grad=grad, out=out, maximize=maximize, on_device=on_device, **decay), target)


@pytest.mark.parametrize(("target", "numel"), params_by_size((*FUSED, REFERENCE), SIZES))
def test_sizes(target: Target, numel: int) -> None:
    with target.ready():
        check(Case(numel, torch.bfloat16, torch.float16, weight_decay=0.01), target)
        check(Case(numel, torch.float16, torch.bfloat16, weight_decay=0.01, decoupled=True, is_wild=False), target)


@pytest.mark.parametrize("shift", (1, 3, 4))
@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_unaligned(target: Target, shift: int) -> None:
    with target.ready():
        for numel, grad, out in itertools.product((3, 1037), DTYPES, (None, *DTYPES)):
            check(Case(numel, grad, out, shift=shift), target)


@pytest.mark.parametrize("target", params(FUSED))
def test_tensors_of_different_alignment(target: Target) -> None:
    case = Case(1500, torch.bfloat16, torch.float16)
    with target.ready():
        for shifts in itertools.permutations((0, 1, 2, 4), 4):
            values = case.inputs()
            wanted = {each: value.clone() for each, value in values.items()}
            held = {
                each: Guarded(value, target.device, shift)
                for (each, value), shift in zip(values.items(), (*shifts, 3), strict=True)
            }
            moved = {each: guard.tensor for each, guard in held.items()}
            ops.adam_(**moved, **case.options(target.device), backend=target.backend)
            ops.adam_(**wanted, **case.options("cpu"), backend="reference")
            for each, guard in held.items():
                guard.check(f"{each} at {shifts}")
                assert_same(guard.tensor, wanted[each], f"{each} at {shifts}")


@pytest.mark.parametrize("step", (1, 2, 10, 999, 65535, 2**24))
@pytest.mark.parametrize("target", params(FUSED))
def test_steps(target: Target, step: int) -> None:
    with target.ready():
        for on_device in (False, True):
            check(Case(130, step=step, on_device=on_device), target)


@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_numbers_and_tensors_give_the_same_bits(target: Target) -> None:
    with target.ready():
        for decay, step in itertools.product(DECAYS, (1, 5, 4321)):
            case = Case(300, torch.bfloat16, torch.bfloat16, step=step, **decay)
            got = run(dataclasses.replace(case, on_device=True), target)
            for each, wanted in run(case, target).items():
                assert_same(got[each], wanted, f"{each} of {case}")


@pytest.mark.parametrize("flag", (0.0, 1.0, 2.0, float("nan"), float("inf")))
@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_found_inf(target: Target, flag: float) -> None:
    with target.ready():
        for on_device, segments in itertools.product((False, True), (0, 4)):
            case = Case(
                1100,
                torch.float16,
                torch.float16,
                found_inf=flag,
                on_device=on_device,
                segments=segments,
                idle=segments > 0,
            )
            if flag == 0:
                check(case, target)
                continue
            got = run(case, target)
            for each, wanted in case.inputs().items():
                assert_same(got[each], wanted, f"{each} of {case}", nan_is_nan=False)


@pytest.mark.parametrize("idle", (False, True))
@pytest.mark.parametrize(
    ("target", "numel"), params_by_size((*FUSED, REFERENCE), (1, 63, 64, 65, 1000, 2048, 5000, 32768 + 200))
)
def test_segments(target: Target, numel: int, idle: bool) -> None:
    """Against one call per segment with a number for a step, too: the reference's own segments are checked by that."""
    case = Case(numel, torch.bfloat16, torch.float16, weight_decay=0.01, segments=5, idle=idle, is_wild=False)
    with target.ready():
        got = run(case, target)
        check(case, target)

    before = case.inputs()
    segment_of = case.segment_ids().long().repeat_interleave(64)[:numel]
    for segment in range(case.segments):
        mine = segment_of == segment
        alone = Case(
            int(mine.sum()), torch.bfloat16, torch.float16, weight_decay=0.01, step=case.step + segment, is_wild=False
        )
        wanted = {each: value[mine] for each, value in before.items()}
        if not idle or case.active()[segment]:
            wanted = run(alone, REFERENCE, wanted)
        for each in wanted:
            assert_same(got[each][mine], wanted[each], f"{each} of segment {segment} of {case}", nan_is_nan=False)


@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_param_out_is_the_rounded_master(target: Target) -> None:
    with target.ready():
        for out in DTYPES:
            got = run(Case(900, out=out), target)
            assert_same(got["param_out"], got["master"].to(out), name(out))


def test_every_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(70_001, torch.bfloat16, torch.bfloat16)
    wanted = run(case, REFERENCE)
    for num_threads in (1, 2, 3, 7):
        monkeypatch.setenv("PYZERO_NUM_THREADS", str(num_threads))
        got = run(case, FUSED[0])
        for each in wanted:
            assert_same(got[each], wanted[each], f"{each} with {num_threads} threads")
