"""torch.amp.GradScaler over FusedZeroAdam: its orders of calls, on one rank and on several, against torch's AdamW."""

import itertools
from typing import Any

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from tolerances import ADAM
from torch import Tensor, nn

import pyzero

SCALE = 1024.0
LR = 1e-2
NUM_STEPS = 6
BAD_STEP = 3


def gradscaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)


def run(model: nn.Module, optimizer: Any, order: str, batches: Any, bad: bool) -> list[float]:
    """Returns the scale after each step."""
    scaler = gradscaler()
    scales = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for batch in batches(step):
            loss = scaler.scale(loss_of(model, batch))
            (loss * float("inf") if bad and step == BAD_STEP else loss).backward()
        if order == "unscale, clip":
            scaler.unscale_(optimizer)
            clip(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def clip(model: nn.Module, optimizer: Any) -> Tensor:
    if isinstance(optimizer, torch.optim.AdamW):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    return optimizer.clip_grad_norm_(0.3)


def by_torch(order: str, num_ranks: int, bad: bool) -> tuple[list[Tensor], list[float]]:
    """One process; the mean over ranks is taken as the exact transport takes it, in rank order."""
    model = build(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler, scales = gradscaler(), []
    for step in range(NUM_STEPS):
        losses = [scaler.scale(loss_of(model, micro_batch(step, rank))) for rank in range(num_ranks)]
        if bad and step == BAD_STEP:
            losses[-1] = losses[-1] * float("inf")
        by_rank = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        for param, *grads in zip(model.parameters(), *by_rank, strict=True):
            param.grad = sum(grads[1:], grads[0]) * (1.0 / num_ranks)
        if order == "unscale, clip":
            scaler.unscale_(optimizer)
            clip(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return params_of(model), scales


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Both in fp32 from the same gradients."""
    largest = max(float(param.abs().max()) for param in theirs if param.numel())
    atol = 2**0.5 * ADAM[torch.float32].master(NUM_STEPS, largest, LR, beta2=0.999, decay=1 - LR * 1e-2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def on_rank(group: Any, order: str, options: dict[str, Any], bad_rank: int | None) -> dict[str, Any]:
    rank = group.rank()
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, process_group=group, **options)
    scales = run(model, optimizer, order, lambda step: [micro_batch(step, rank)], bad=rank == bad_rank)
    return {"params": params_of(model), "scales": scales, "skipped": optimizer.skipped_steps}


@pytest.mark.parametrize("order", ["step", "unscale, clip"])
@pytest.mark.parametrize(
    ("size", "stage", "bad_rank"),
    [(1, 2, None), (1, 2, 0), *itertools.product((2, 3), (1, 2), (None, 0, 1))],
)
def test_agrees_with_torch_on_every_rank(ranks, order, size, stage, bad_rank):
    wanted, wanted_scales = by_torch(order, size, bad_rank is not None)
    results = ranks.run(size, on_rank, order, {"stage": stage}, bad_rank)
    for result in results:
        assert result["scales"] == wanted_scales
        assert result["skipped"] == (bad_rank is not None)
        assert_same(result["params"], results[0]["params"])
        assert_close(result["params"], wanted)


def clipped_on_rank(group: Any, dtype: torch.dtype) -> dict[str, Any]:
    rank = group.rank()
    model = build(dtype)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, process_group=group)
    scales = run(model, optimizer, "unscale, clip", lambda step: [micro_batch(step, rank)], bad=rank == 1)
    return {"scales": scales, "norm": float(optimizer.grad_norm)}


def test_fp16_weights(ranks):
    """torch's own unscale_ refuses fp16 gradients where it sees them."""
    first, second = ranks.run(2, clipped_on_rank, torch.float16)
    assert first == second
    assert first["scales"] == [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]
    wide = ranks.run(2, clipped_on_rank, torch.float32)[0]
    assert first["norm"] == pytest.approx(wide["norm"], rel=2**-8)  # unscaled; weights and gradients round at 2^-11


def clipped_while_scaled(group: Any, stage: int, unscales: bool) -> list[float]:
    param = nn.Parameter(torch.zeros(100))
    optimizer = pyzero.FusedZeroSGD([param], process_group=group, stage=stage)
    scaler = gradscaler()
    scaler.scale((param * 2).sum()).backward()
    norm = optimizer.clip_grad_norm_(4.0 * SCALE)
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return [float(norm), float(optimizer.grad_norm), float(optimizer.clipped_grad_norm)]


@pytest.mark.parametrize(("size", "stage", "unscales"), [*itertools.product([1, 2], (1, 2), (True, False))])
def test_the_norm_of_a_step_is_unscaled_if_the_clip_came_first(ranks, size, stage, unscales):
    for norms in ranks.run(size, clipped_while_scaled, stage, unscales):
        assert norms == pytest.approx([20.0 * SCALE, 20.0, 4.0], rel=1e-6)


def spoilt_after_unscale(group: Any, stage: int) -> bool:
    param = nn.Parameter(torch.zeros(100))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    scaler = gradscaler()
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    optimizer.set_full_grad(param, torch.full((100,), float("inf")))
    scaler.step(optimizer)
    return optimizer.was_step_applied or bool(param.any())


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_an_inf_that_comes_after_unscale_skips_the_step(ranks, size, stage):
    assert ranks.run(size, spoilt_after_unscale, stage) == [False] * size


def two_optimizers(group: Any) -> list[list[float]]:
    """One scaler over two optimizers, one of them with an overflow on rank 1: that one skips, the scale falls."""
    rank = group.rank()
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [pyzero.FusedZeroAdam([p], lr=0.1, process_group=group) for p in params]
    scaler = gradscaler()
    loss = scaler.scale(params[0].sum() + params[1].sum())
    (loss + params[1].sum() * (float("inf") if rank == 1 else 0.0)).backward()
    scaler.unscale_(optimizers[1])
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return [params[0].tolist(), params[1].tolist(), [scaler.get_scale()]]


def test_two_optimizers_and_one_scaler(ranks):
    for moved, stayed, scale in ranks.run(2, two_optimizers):
        assert moved == pytest.approx([0.9] * 5) and stayed == [1.0] * 5 and scale == [SCALE / 2]


def by_ddp(group: Any, order: str) -> list[Any]:
    """reduce_grads=False under DDP, with torch's own clip_grad_norm_, beside torch's AdamW."""
    rank, results = group.rank(), []
    for ours in (True, False):
        ddp = nn.parallel.DistributedDataParallel(build(torch.float32), process_group=group)
        if ours:
            optimizer = pyzero.FusedZeroAdamW(ddp.parameters(), lr=LR, process_group=group, reduce_grads=False)
        else:
            optimizer = torch.optim.AdamW(ddp.parameters(), lr=LR, fused=True)
        scaler = gradscaler()
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(ddp, micro_batch(step, rank)))
            (loss * float("inf") if step == BAD_STEP and rank == 1 else loss).backward()
            if order == "unscale, clip":
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
        results.append((params_of(ddp.module), scaler.get_scale()))
    return results


@pytest.mark.parametrize("order", ["step", "unscale, clip"])
def test_gradients_that_ddp_reduced(ranks, order):
    for (ours, our_scale), (theirs, their_scale) in ranks.run(2, by_ddp, order):
        assert our_scale == their_scale
        assert_close(ours, theirs)


def test_others_see_the_parameters():
    """Only GradScaler is shown the stand-in."""
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param])
    assert optimizer.param_groups[0]["params"] == [param]
    assert "FusedZeroAdam" in repr(optimizer)


def clipped_after_unscale(group: Any, stage: int, what: str) -> dict[str, Any]:
    """The recipe of torch's documentation, and what else may come between unscale_ and step."""
    rank = group.rank()
    params = [nn.Parameter(torch.zeros(70)), nn.Parameter(torch.zeros(3, 5))]
    optimizer = pyzero.FusedZeroAdam(params, lr=0.5, betas=(0.5, 0.5), process_group=group, stage=stage)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def backward(scaled: bool) -> None:
        loss = (params[0] * (1.0 + rank)).sum() + (params[1] * 3.0).sum()
        (scaler.scale(loss) if scaled else loss).backward()

    backward(True)
    scaler.unscale_(optimizer)
    found: dict[str, Any] = {}
    if what == "clip":
        found["norm"] = float(torch.nn.utils.clip_grad_norm_(params, 1.0))
    elif what == "read":
        found["norm"] = float(torch.stack([param.grad.norm() for param in params]).norm())
    elif what == "set":
        optimizer.set_full_grad(params[0], torch.full((70,), 2.0))
    elif what == "assign":
        params[0].grad = torch.full((70,), 2.0)
    elif what == "again":
        backward(False)
    elif what == "drop":
        nn.ParameterList(params).zero_grad()
        backward(False)
        optimizer.step()
    if what != "drop":
        scaler.step(optimizer)
        scaler.update()
    found["grad"] = float(optimizer.full_grad(params[0])[0])
    if what == "twice":
        optimizer.step()
    return {**found, "exp_avg": optimizer.full_state(params[0])["exp_avg"][0].item()}


@pytest.mark.parametrize("stage", [1, 2])
def test_what_comes_between_unscale_and_step_is_of_unscaled_gradients(ranks, stage):
    mean = 1.5  # over ranks, of the first parameter's gradient
    norm = (70 * mean**2 + 15 * 9.0) ** 0.5
    wanted = {
        "clip": (mean / (norm + 1e-6), norm),
        "read": (mean, norm),
        "set": (2.0, None),
        "assign": (2.0, None),
        "again": (2 * mean, None),
        "drop": (mean, None),
        "twice": (mean, None),
    }
    for what, (grad, total) in wanted.items():
        for found in ranks.run(2, clipped_after_unscale, stage, what):
            assert found["grad"] == pytest.approx(grad, rel=1e-6), what
            assert found["exp_avg"] == pytest.approx(grad * (0.75 if what == "twice" else 0.5), rel=1e-6), what
            if total is not None:
                assert found["norm"] == pytest.approx(total, rel=1e-6), what


def behind_a_step(group: Any, unscales: bool) -> float:
    param, scaler = nn.Parameter(torch.ones(3)), gradscaler()
    optimizer = pyzero.FusedZeroAdam([param], process_group=group)
    scaler.scale((param * 2).sum()).backward()
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    grad = optimizer.full_grad(param)
    assert grad is not None and optimizer.grad_norm == pytest.approx(2 * 3**0.5)
    return float(grad[0])


def test_grad_behind_a_step_is_as_the_docs_say(ranks):
    """On one rank `.grad` keeps the scale that nobody asked to be taken out: that would be a pass over all of them."""
    assert ranks.run(1, behind_a_step, False) == [2 * SCALE]
    assert ranks.run(1, behind_a_step, True) == [2.0]
    assert ranks.run(2, behind_a_step, False) == ranks.run(2, behind_a_step, True) == [2.0, 2.0]
