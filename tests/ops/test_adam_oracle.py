"""The reference of adam_ against what does not come from us: numbers by hand, torch's optimizers, fp64."""

import functools
import math

import pytest
import torch
from backends import FUSED, REFERENCE, Target, params
from tolerances import ADAM
from torch import Tensor

from pyzero import ops

Kind = tuple[bool, float, bool]  # decoupled, weight decay, maximize
STEPS = 1000
NUMEL = 2000
LR = 1e-3
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
def test_by_hand(target: Target) -> None:
    """Powers of two throughout, so that every intermediate is exact, worked out on paper.

    beta1 = beta2 = 1/2, step 2: bias corrections 3/4. g = 2 * 4 = 8. m = 2 + (8 - 2) / 2 = 5.
    v = 8 / 2 + (8 / 2) * 8 = 36, sqrt(v) = 6. step_size = 0.75 / 0.75 = 1, inv_sqrt_bc2 = 1 / sqrt(3/4) = 1.1547005.
    p = 4 - 1 * 5 / (6 * 1.1547005 + 1) = 4 - 5 / 7.928203 = 3.3693399
    """
    with target.ready():
        state = [torch.full((3,), value, device=target.device) for value in (4.0, 2.0, 8.0)]
        grad = torch.full((3,), 2.0, device=target.device)
        ops.adam_(
            *state, grad, lr=0.75, beta1=0.5, beta2=0.5, eps=1.0, weight_decay=0.0, step=2, grad_scale=4.0,
            backend=target.backend,
        )  # fmt: skip
        master, exp_avg, exp_avg_sq = (tensor.tolist() for tensor in state)
    assert exp_avg == [5.0] * 3
    assert exp_avg_sq == [36.0] * 3
    assert master == pytest.approx([3.3693399] * 3, rel=2.0**-23)


@pytest.mark.parametrize("target", params((*FUSED, REFERENCE)))
@pytest.mark.parametrize(
    ("decoupled", "maximize", "wanted"),
    [
        # coupled: g = 2 + 0.5 * 4 = 4; m = 4 / 2 = 2, v = 16 / 2 = 8; m^ = 4, v^ = 16: p = 4 - 0.25 * 4 / 4
        (False, False, (3.75, 2.0, 8.0)),
        # maximize: g = -2 + 0.5 * 4 = 0: no update
        (False, True, (4.0, 0.0, 0.0)),
        # decoupled: p = 4 * (1 - 0.25 * 0.5) = 3.5; g = 2, m = 1, v = 2; m^ = 2, v^ = 4: p = 3.5 - 0.25 * 2 / 2
        (True, False, (3.25, 1.0, 2.0)),
        (True, True, (3.75, -1.0, 2.0)),
    ],
)
def test_weight_decay_by_hand(
    target: Target, decoupled: bool, maximize: bool, wanted: tuple[float, float, float]
) -> None:
    with target.ready():
        state = [torch.full((5,), value, device=target.device) for value in (4.0, 0.0, 0.0)]
        grad = torch.full((5,), 2.0, device=target.device, dtype=torch.bfloat16)
        ops.adam_(
            *state, grad, lr=0.25, beta1=0.5, beta2=0.5, eps=1e-12, weight_decay=0.5, step=1,
            decoupled_weight_decay=decoupled, maximize=maximize, backend=target.backend,
        )  # fmt: skip
        for tensor, value in zip(state, wanted, strict=True):
            assert tensor.tolist() == pytest.approx([value] * 5, rel=2.0**-22)


# ---- against torch and fp64 ---------------------------------------------------------------------------------------


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)


@functools.cache
def gradients(steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Noise around a value that drifts; magnitudes differ from element to element. Rounded to fp32 for every dtype."""
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-4, 0, NUMEL)
    noise = torch.randn(steps, NUMEL, generator=generator)
    drift = torch.sin(torch.arange(steps) / 50)[:, None]
    return list((size * (noise + drift)).to(dtype))


def by_torch(decoupled: bool, weight_decay: float, maximize: bool, steps: int, dtype: torch.dtype) -> list[Tensor]:
    weight = torch.nn.Parameter(start(dtype))
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = cls([weight], lr=LR, weight_decay=weight_decay, maximize=maximize, foreach=False)
    for grad in gradients(steps, dtype):
        weight.grad = grad
        optimizer.step()
    state = optimizer.state[weight]
    return [weight.detach(), state["exp_avg"], state["exp_avg_sq"]]


def by_us(
    target: Target, decoupled: bool, weight_decay: float, maximize: bool, steps: int, dtype: torch.dtype
) -> list[Tensor]:
    state = [start(dtype).to(target.device), *(torch.zeros(NUMEL, dtype=dtype, device=target.device) for _ in "mv")]
    for step, grad in enumerate(gradients(steps, dtype), start=1):
        ops.adam_(
            *state, grad.to(target.device), lr=LR, **HYPER, weight_decay=weight_decay, step=step,
            decoupled_weight_decay=decoupled, maximize=maximize, backend=target.backend,
        )  # fmt: skip
    return [tensor.cpu() for tensor in state]


def assert_close(
    got: list[Tensor], wanted: list[Tensor], steps: int, kind: Kind, dtype: torch.dtype, ways: float
) -> None:
    """`ways`: sqrt(2) where both sides round in `dtype`, 1 where one is much more exact."""
    decoupled, weight_decay, _ = kind
    row = ADAM[dtype]
    magnitude = max(start(dtype).abs().max().item(), wanted[0].abs().max().item())
    largest = max(grad.abs().max().item() for grad in gradients(steps, torch.float32))
    largest += 0.0 if decoupled else weight_decay * magnitude
    decay = 1 - LR * weight_decay if decoupled else 1.0
    limits = (
        row.master(steps, magnitude, LR, HYPER["beta2"], decay),
        row.exp_avg(largest),
        row.exp_avg_sq(largest, HYPER["beta2"]),
    )
    for each, ours, theirs, limit in zip(("master", "exp_avg", "exp_avg_sq"), got, wanted, limits, strict=True):
        error = (ours.double() - theirs.double()).abs().max().item()
        assert error <= ways * limit, f"{each}: off by {error:.3g} after {steps} steps, at most {ways * limit:.3g}"


KINDS = [(False, 0.0, False), (False, 0.1, False), (True, 0.1, False), (True, 0.1, True)]
KIND_IDS = ["adam", "adam-decay", "adamw", "adamw-maximize"]


@pytest.mark.parametrize("steps", (1, STEPS))
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_reference_against_torch_in_fp32(kind: Kind, steps: int) -> None:
    got = by_us(REFERENCE, *kind, steps, torch.float32)
    assert_close(got, by_torch(*kind, steps, torch.float32), steps, kind, torch.float32, math.sqrt(2))


@pytest.mark.parametrize("steps", (1, STEPS))
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_reference_against_torch_in_fp64(kind: Kind, steps: int) -> None:
    got = by_us(REFERENCE, *kind, steps, torch.float64)
    assert_close(got, by_torch(*kind, steps, torch.float64), steps, kind, torch.float64, math.sqrt(2))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("target", params(tuple(t for t in (*FUSED, REFERENCE) if not t.is_emulated)))
def test_against_fp64(target: Target, kind: Kind) -> None:
    with target.ready():
        got = by_us(target, *kind, STEPS, torch.float32)
    assert_close(got, by_torch(*kind, STEPS, torch.float64), STEPS, kind, torch.float32, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fp64_takes_a_list_of_gradients(dtype: torch.dtype) -> None:
    """The same as one gradient of zeros between them, where the moments are 0."""
    grads = [torch.randn(6).to(dtype), torch.randn(2, 3).to(dtype)]
    flat = torch.zeros(70, dtype=dtype)
    flat[:6], flat[64:] = grads[0], grads[1].ravel()
    results = []
    for given in ({"grad": flat}, {"grad": grads, "grad_offsets": [0, 64]}):
        state = [torch.zeros(70, dtype=torch.float64) for _ in range(3)]
        ops.adam_(*state, **given, lr=LR, weight_decay=0.0, step=1, **HYPER, backend="reference")  # type: ignore[arg-type]
        results.append(state)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right) and left.count_nonzero() == 12
