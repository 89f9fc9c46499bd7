"""step_scalars_ on every backend: numbers by hand, the reference's bits, torch's clip coefficient, what stays."""

import itertools
import math
import random

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params
from bits import Guarded, assert_same
from torch import Tensor

from pyzero import ops

ALL = (*FUSED, REFERENCE)


def run(
    target: Target, rows: list[tuple[float, float]], num_params: int, on_device: bool = False, **options: float | None
) -> tuple[Tensor, Tensor]:
    """(4,) scalars and (num_params,) step counts, which were 0, 1, 2, ...; every third parameter has no gradient."""
    out = Guarded(torch.full((4,), 7.0), target.device)
    steps = Guarded(torch.arange(num_params, dtype=torch.float32), target.device)
    used = (torch.arange(num_params) % 3 != 2).float().to(target.device)
    stats = torch.tensor([(*row, math.nan) for row in rows], dtype=torch.float64, device=target.device)
    if on_device:
        options |= {n: torch.tensor(options[n], device=target.device) for n in ("unscale", "factor") if n in options}
    ops.step_scalars_(out.tensor, stats, steps=steps.tensor, used=used, **options, backend=target.backend)
    for name, guarded in (("out", out), ("steps", steps)):
        guarded.check(name)
    return out.tensor.cpu(), steps.tensor.cpu()


@pytest.mark.parametrize("target", params(ALL))
def test_by_hand(target: Target) -> None:
    with target.ready():
        out, steps = run(target, [(0.0, 9.0), (0.0, 16.0)], 5, max_norm=2.5)  # norm 5, half of it
        assert out[:2].tolist() == [0.0, 5.0] and out[2] == out[3] == pytest.approx(0.5)
        assert steps.tolist() == [1, 2, 2, 4, 5]
        out, _ = run(target, [(0.0, 64.0)], 1, max_norm=100.0, unscale=0.25, factor=0.5)  # norm 1: not clipped
        assert out.tolist() == [0.0, 1.0, 1.0, 0.125]
        out, _ = run(target, [(0.0, 64.0)], 1, max_norm=2.0, factor=-0.5)  # norm 4, half of it, the other way
        assert out[1] == 4.0 and out[2] == pytest.approx(0.5) and out[3] == pytest.approx(-0.25)
        out, _ = run(target, [(0.0, 64.0)], 0)
        assert out.tolist() == [0.0, 8.0, 1.0, 1.0]


@pytest.mark.parametrize("flag", (1.0, 2.0**-7, math.nan))
@pytest.mark.parametrize("target", params(ALL))
def test_an_overflow_on_any_rank_counts_no_step(target: Target, flag: float) -> None:
    with target.ready():
        for at in range(3):
            rows = [(flag if row == at else 0.0, math.inf if row == at else 4.0) for row in range(3)]
            out, steps = run(target, rows, 300, max_norm=1.0)
            assert out[0] == 1.0 and steps.equal(torch.arange(300.0))


@pytest.mark.parametrize("target", params(FUSED))
def test_bits(target: Target) -> None:
    rng = random.Random(0)
    with target.ready():
        for num_rows, max_norm, on_device in itertools.product((1, 2, 8), (None, 1.0, 0.3), (False, True)):
            for num_params in (0, 1, 255, 256, 257, 1000):
                rows = [(0.0, rng.random() * 10.0 ** rng.randint(-9, 9)) for _ in range(num_rows)]
                options = {
                    "max_norm": max_norm,
                    "unscale": rng.choice((1.0, 2.0**-16, 0.3)),
                    "factor": rng.uniform(-1, 1),
                }
                got = run(target, rows, num_params, on_device, **options)
                wanted = run(REFERENCE, rows, num_params, **options)
                for name, ours, theirs in zip(("out", "steps"), got, wanted, strict=True):
                    assert_same(ours, theirs, f"{name} of {rows} with {options}")


@pytest.mark.parametrize("sumsq", (0.0, math.inf, math.nan, 1e300))
@pytest.mark.parametrize("target", params(ALL))
def test_clips_as_torch(target: Target, sumsq: float) -> None:
    with target.ready():
        for max_norm in (0.0, 0.7, math.inf):
            out, _ = run(target, [(0.0, sumsq)], 1, max_norm=max_norm)
            wanted = torch.clamp(max_norm / (out[1] + 1e-6), max=1.0)
            assert_same(out[2], wanted, f"a norm of {out[1]} clipped to {max_norm}")


@pytest.mark.parametrize("target", params(ALL))
def test_the_default_dtype_and_device_do_not_matter(target: Target) -> None:
    rows, options = [(0.0, 2.0), (0.0, 5.0)], {"max_norm": 0.3, "unscale": 0.7, "factor": -0.1}
    with target.ready():
        wanted, _ = run(target, rows, 5, **options)
        out, steps, used = (torch.zeros(n, device=target.device) for n in (4, 5, 5))
        stats = torch.tensor([(*row, 0.0) for row in rows], dtype=torch.float64, device=target.device)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                ops.step_scalars_(out, stats, steps=steps, used=used, **options, backend=target.backend)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(out.cpu(), wanted, "with another default")
