"""Gradient norms and clipping: every p, over ranks and model-parallel ranks, against torch on gathered gradients."""

import math
import random
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same
from models import DTYPES, build, loss_of, micro_batch, randn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import pyzero
from pyzero.gradients import grad_stats
from pyzero.gradients.local import deferred_clip

NORMS = (1.0, 2.0, 3.5, math.inf)


def gathered(optimizer: Any, params: Any) -> list[Tensor]:
    """Without the empty ones, of which torch's inf-norm is an error."""
    return [grad for grad in (optimizer.full_grad(param) for param in params) if grad is not None and grad.numel()]


def norms_on_rank(group: Any, dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[float, float]]:
    """(ours, torch's of the gathered gradients in fp64) for each p."""
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, loss_scale=8.0, **options)
    optimizer.backward(loss_of(model, micro_batch(0, group.rank() if "reduce_grads" not in options else 0)))
    grads = [grad.double() for grad in gathered(optimizer, model.parameters())]
    found = []
    for p in NORMS:
        wanted = get_total_norm(grads, p)
        found.append((float(optimizer.clip_grad_norm_(1e9, norm_type=p)), float(wanted)))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [(1, {}), (2, {"stage": 1}), (3, {"stage": 2, "bucket_cap_mb": 1e-3}), (2, {"reduce_grads": False})],
    ids=str,
)
def test_every_p(ranks, dtype, size, options):
    for found in ranks.run(size, norms_on_rank, dtype, options):
        for ours, wanted in found:
            assert ours == pytest.approx(wanted, rel=2**-22)  # summed in fp64, and rounded to fp32


def clipped_weights(group: Any, dtype: torch.dtype, p: float) -> list[Tensor]:
    """After steps on gradients of many magnitudes, alike on all ranks."""
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (1320, 7000, 4096, 258)]
    optimizer = pyzero.FusedZeroSGD(params, lr=1.0, process_group=group, loss_scale=None, reduce_grads=False)
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = (randn(*param.shape, seed=10 * step + index) * 10.0 ** (index - 2)).to(dtype)
        optimizer.clip_grad_norm_(0.5, p)
        optimizer.step()
    return [optimizer.full_master(param).clone() for param in params]


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_clipping_by_any_p_has_the_same_bits_on_any_number_of_ranks(ranks, dtype, p):
    whole, *others = [found for size in (1, 2, 3) for found in ranks.run(size, clipped_weights, dtype, p)]
    for found in others:
        for ours, wanted in zip(found, whole, strict=True):
            assert_same(ours, wanted, f"a {p}-norm in {dtype}")


def test_clipping_by_the_largest_value_is_torchs():
    ours, theirs = build(torch.float32), build(torch.float32)
    left, right = (
        cls(m.parameters(), lr=1e-2, eps=1e-3) for cls, m in ((pyzero.FusedZeroAdam, ours), (torch.optim.Adam, theirs))
    )
    for step in range(5):
        for model, optimizer in ((ours, left), (theirs, right)):
            optimizer.zero_grad()
            loss_of(model, micro_batch(step, 0)).backward()
        norm = left.clip_grad_norm_(0.01, math.inf)
        wanted = torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.numel()], 0.01, math.inf)
        torch.testing.assert_close(norm, wanted, rtol=0 if step == 0 else 1e-5, atol=0)  # then the models drift apart
        left.step()
        right.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [0, -1.0, math.nan])
def test_no_other_p(p):
    optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="norm_type above 0"):
        optimizer.clip_grad_norm_(1.0, p)


def test_norm_before_and_after_clipping():
    param = nn.Parameter(torch.zeros(100))
    optimizer = pyzero.FusedZeroAdam([param], max_grad_norm=5.0)
    assert optimizer.grad_norm is None and optimizer.clipped_grad_norm is None
    (param * 2).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm == 20.0
    torch.testing.assert_close(optimizer.clipped_grad_norm, torch.tensor(5.0), rtol=1e-6, atol=0)
    assert torch.equal(param.grad, torch.full((100,), 2.0))  # the coefficient went into Adam
    before = optimizer.grad_norm
    param.grad.mul_(2)
    optimizer.step()
    assert (before, optimizer.grad_norm) == (20.0, 40.0)


def norms_of_a_step(group: Any, stage: int, between: str) -> tuple[float, float, float]:
    """(the norm ahead of what clips, `grad_norm`, `clipped_grad_norm`) of a step that is clipped twice."""
    first, second = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(70))
    optimizer = pyzero.FusedZeroSGD([first, second], lr=1.0, process_group=group, stage=stage)
    ((first + second[:1]) * 2).sum().backward()
    norm = optimizer.clip_grad_norm_(0.0 if between == "nothing, to 0" else 4.0)
    if between == "norm":
        get_total_norm([first.grad])
    if between == "clear":
        first.grad = None
    if between == "set":
        optimizer.set_full_grad(first, torch.ones(100))
    if between == "torch":
        torch.nn.utils.clip_grad_norm_([first, second], 1.0)
    if between in ("clip", "norm", "clear"):
        again = optimizer.clip_grad_norm_(1.0)
        norm = again if between == "clear" else norm
    told = float(norm)
    norm.zero_()  # it is the caller's
    optimizer.step()
    return told, float(optimizer.grad_norm), float(optimizer.clipped_grad_norm)


@pytest.mark.parametrize("between", ["nothing", "nothing, to 0", "clip", "norm", "clear", "set", "torch"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_the_norm_of_a_step_is_of_before_clipping(ranks, size, stage, between):
    if between == "torch" and size == 1:
        pytest.skip("refused: torch's function edits what is still to be multiplied")
    set_to = math.hypot(10, 4.0 * 200 / math.hypot(20, 200))
    after = {"nothing": 4.0, "nothing, to 0": 0.0, "set": set_to}.get(between, 1.0)
    for wanted, norm, clipped in ranks.run(size, norms_of_a_step, stage, between):
        assert norm == pytest.approx(set_to if between == "set" else wanted, rel=1e-6)
        assert between != "clear" or wanted == pytest.approx(4.0 * 200 / math.hypot(20, 200), rel=1e-5)
        assert clipped == pytest.approx(after, rel=1e-5)


def norm_of_what_was_assigned(group: Any, stage: int) -> list[float]:
    """The norm of `first`, and that of `second` after a step; `second` was frozen when the first was asked for."""
    first, second = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(64), requires_grad=False)
    optimizer = pyzero.FusedZeroSGD([first, second], process_group=group, stage=stage)
    (first * 2).sum().backward()
    norms = [float(first.grad.norm())]
    second.requires_grad_().grad = torch.full((64,), 3.0)
    optimizer.step()
    return [*norms, float(second.grad.norm())]


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_what_was_assigned_after_a_norm_has_its_own(ranks, size, stage):
    for norms in ranks.run(size, norm_of_what_was_assigned, stage):
        assert norms == pytest.approx([20.0, 24.0], rel=1e-6)


@pytest.mark.parametrize("clips", [(1, 1, 1, 1), (1, 0, 1, 0)], ids=["each", "every other"])
def test_a_clip_is_not_of_gradients_that_come_unseen(clips):
    """As a replayed graph writes them: into the same tensors, whose versions stay."""
    ours, theirs = (nn.Parameter(torch.zeros(100)) for _ in range(2))
    optimizers = pyzero.FusedZeroSGD([ours], lr=1.0), torch.optim.SGD([theirs], lr=1.0)
    ours.grad, theirs.grad = torch.zeros(100), torch.zeros(100)
    for size, does_clip in zip((10.0, 0.5, None, 3.0), clips, strict=True):  # None: the gradient of the step before
        norms = []
        for param, clip in ((ours, optimizers[0].clip_grad_norm_), (theirs, lambda by: clip_grad_norm_([theirs], by))):
            if size is not None:
                param.grad.data.fill_(size / 10)
            norms.append(float(clip(1.0)) if does_clip else 0.0)
        for optimizer in optimizers:
            optimizer.step()
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        assert optimizers[0].grad_norm == pytest.approx(
            float(theirs.grad.norm()) if not does_clip else norms[1], rel=1e-5
        )


def test_a_clip_stays_with_the_gradients_that_are_left():
    params = [nn.Parameter(torch.zeros(100)) for _ in range(2)]
    optimizer = pyzero.FusedZeroSGD(params, lr=1.0)
    (sum(params) * 2).sum().backward()
    optimizer.clip_grad_norm_(2.0**0.5)  # then 0.1 each
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    assert params[0].unique().item() == pytest.approx(-0.1, rel=1e-5)
    assert params[1].unique().item() == pytest.approx(-0.2, rel=1e-5)


def test_the_largest_value_by_name():
    param = nn.Parameter(torch.zeros(100))
    optimizer = pyzero.FusedZeroAdam([param])
    (param * 2).sum().backward()
    assert optimizer.clip_grad_norm_(1.0, norm_type="inf") == 2.0


def test_tied_parameters_count_once():
    model = build(torch.float32)  # its head is its embedding
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    loss_of(model, micro_batch(0, 0)).backward()
    norm = get_total_norm([param.grad for param in model.parameters()])
    torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_squares_beyond_fp32_are_no_overflow(ranks, size):
    for applied, norm, moved in ranks.run(size, huge):
        assert applied and norm == pytest.approx(math.sqrt(70) * 1e25) and moved


def huge(group: Any) -> tuple[bool, float, bool]:
    param = nn.Parameter(torch.ones(70))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.1, process_group=group, max_grad_norm=1.0)
    (param * 1e25).sum().backward()
    optimizer.step()
    return optimizer.was_step_applied, float(optimizer.grad_norm), bool((param < 1).all())


def model_parallel(group: Any) -> dict[str, Any]:
    """Four ranks, 2 x 2: ranks 0 and 2 hold one half of a split weight, 1 and 3 the other; the rest is replicated."""
    import torch.distributed as dist

    rank = group.rank()
    data_groups, model_groups = [[0, 2], [1, 3]], [[0, 1], [2, 3]]
    data = [dist.new_group(members) for members in data_groups][rank % 2]
    beside = [dist.new_group(members) for members in model_groups][rank // 2]
    split, replicated = nn.Parameter(torch.zeros(70)), nn.Parameter(torch.zeros(30))
    split.tensor_model_parallel = True
    optimizer = pyzero.FusedZeroAdam(
        [split, replicated], lr=0.1, process_group=data, model_parallel_group=beside, max_grad_norm=1e9
    )
    found = {}
    for step, bad in enumerate((False, True)):
        optimizer.zero_grad()
        factor = torch.tensor(float("nan") if bad and rank == 3 else 1.0)
        ((split * (1 + rank % 2)).sum() * factor + (replicated * 5).sum()).backward()
        found[step, 1.0] = float(optimizer.clip_grad_norm_(1e9, 1.0))
        found[step, math.inf] = float(optimizer.clip_grad_norm_(1e9, math.inf))
        optimizer.step()
        found[step, 2.0] = float(optimizer.grad_norm)
        found[step, "applied"] = optimizer.was_step_applied
    return found


def a_rate_of_its_own(group: Any) -> list[str]:
    """The four of `model_parallel`, of which rank 0 alone has another lr in the first step: what three steps end in."""
    import torch.distributed as dist

    timeout = timedelta(seconds=3)
    data = [dist.new_group(members, timeout) for members in ([0, 2], [1, 3])][group.rank() % 2]
    beside = [dist.new_group(members, timeout) for members in ([0, 1], [2, 3])][group.rank() // 2]
    split = nn.Parameter(torch.zeros(70))
    split.tensor_model_parallel = True
    optimizer = pyzero.FusedZeroAdam([split], lr=0.1, process_group=data, model_parallel_group=beside)
    ends = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.2 if group.rank() == step == 0 else 0.1
        try:
            (split * (1 + step)).sum().backward()
            optimizer.step()
            ends.append(f"norm {float(optimizer.grad_norm)}")
        except RuntimeError as error:  # CollectiveError too
            ends.append(type(error).__name__)
    return ends


def test_another_rate_is_told_to_ranks_of_other_parts(ranks):
    """No message meets a later one of theirs, and what follows is right: gradients add up."""
    norms = [f"norm {float(torch.tensor(grad * math.sqrt(2 * 70)))}" for grad in (1 + 2, 1 + 2 + 3)]
    for ends in ranks.run(4, a_rate_of_its_own):
        assert ends == ["RuntimeError", *norms]


def test_model_parallel_ranks_share_norm_and_verdict(ranks):
    results = ranks.run(4, model_parallel)
    squares = 70 * 1.0 + 70 * 4.0 + 30 * 25.0  # both halves, and the replicated one once
    for result in results:
        assert result[0, 2.0] == pytest.approx(math.sqrt(squares))
        assert result[0, 1.0] == pytest.approx(70 + 140 + 150)
        assert result[0, math.inf] == 5.0
        assert result[0, "applied"] and not result[1, "applied"]  # rank 3's NaN stops all four


@pytest.mark.parametrize("num_params", [0, 1, 47, 48, 49, 1000])
def test_flags_of_parameters_travel_as_bits(num_params):
    draw = random.Random(num_params)
    ranks = [[draw.random() < 0.3 for _ in range(num_params)] for _ in range(3)]
    words = np.array([grad_stats._packed(used) for used in ranks]).reshape(3, -1)
    assert words.shape[1] == -(-num_params // 48)
    assert grad_stats._union(words, num_params) == tuple(map(any, zip(*ranks, strict=True)))


def test_edits_travel_as_a_checksum():
    counts = ([], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1], [2, 1, 1])
    sums = [grad_stats._checksum(nums, products) for nums in counts for products in ([], [0.5] * len(nums))]
    assert sums[:4] == [0] * 4 and len({*sums[3:]}) == 9


def test_a_clip_before_the_capture_of_a_step_is_refused(monkeypatch):
    """A CUDA graph would read the coefficient where it lay. What it computes itself it may use."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroAdamW([param])
    gradients = optimizer._gradients
    for is_captured in (False, True):
        optimizer.zero_grad()
        param.sum().backward()
        gradients.check_capture()
        with monkeypatch.context() as patch:
            patch.setattr(deferred_clip, "_is_capturing", lambda tensor, is_captured=is_captured: is_captured)
            optimizer.clip_grad_norm_(1.0)
        with nullcontext() if is_captured else pytest.raises(RuntimeError, match="got it called before the capture"):
            gradients.check_capture()
    optimizer.step()
    optimizer.zero_grad()
    gradients.check_capture()


def norms_of_two_steps(group: Any, stage: int, loss_scale: Any) -> list[float]:
    """On one gradient, which was clipped before the first."""
    weight = nn.Parameter(torch.zeros(4))
    optimizer = pyzero.FusedZeroAdamW([weight], process_group=group, stage=stage, loss_scale=loss_scale)
    optimizer.backward((weight * 3.0).sum())
    optimizer.clip_grad_norm_(1.0)
    norms = []
    for _ in range(2):
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


@pytest.mark.parametrize("loss_scale", [None, 256.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_a_second_step_on_a_clipped_gradient_has_its_norm(ranks, size, stage, loss_scale):
    for norms in ranks.run(size, norms_of_two_steps, stage, loss_scale):
        assert norms == pytest.approx([6.0, 1.0])
