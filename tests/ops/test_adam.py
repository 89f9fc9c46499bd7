"""adam_ on every backend: the reference's bits, its bounds, what it must leave alone."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params, params_by_size, use_threads
from bits import DTYPES, assert_same, name
from shard_case import SIZES, ShardCase, assert_all_same, check, check_lists, check_peers, run, run_shifted
from torch import Tensor

from pyzero import ops


@dataclass(frozen=True)
class Case(ShardCase):
    """One call of adam_."""

    op = ops.adam_
    state = ("master", "exp_avg", "exp_avg_sq")

    decoupled: bool = False
    step: int = 3

    def inputs(self) -> dict[str, Tensor]:
        made = super().inputs()
        return made | {"exp_avg_sq": made["exp_avg_sq"].abs()}

    def numbers(self) -> dict[str, float]:
        return super().numbers() | {"step": float(self.step)}

    def options(self, device: str) -> dict[str, object]:
        made = super().options(device)
        if self.segments:
            made["step"] = self.segment_steps().to(device)
        return made | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled_weight_decay": self.decoupled}

    def segment_steps(self) -> Tensor:
        return self.step + torch.arange(float(self.segments))


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
        wanted = run(case, REFERENCE)
        for shifts in itertools.permutations((0, 1, 2, 4), 4):
            values = case.inputs()
            got = run_shifted(case, target, values, dict(zip(values, (*shifts, 3), strict=True)))
            assert_all_same(got, wanted, f"{case} at {shifts}")


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
            assert_all_same(got, run(case, target), str(case))


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
            assert_all_same(run(case, target), case.inputs(), str(case), nan_is_nan=False)


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
        alone_here = {each: value[mine] for each, value in got.items()}
        assert_all_same(alone_here, wanted, f"segment {segment} of {case}", nan_is_nan=False)


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
        use_threads(monkeypatch, num_threads)
        assert_all_same(run(case, FUSED[0]), wanted, f"{case} with {num_threads} threads")
