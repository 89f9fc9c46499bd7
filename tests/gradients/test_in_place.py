"""One rank reads gradients where they are: the same bits as when they are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as collectives
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero
from pyzero import ops
from pyzero.optimizers.adam import AdamRule

HAS_GRAD_DTYPE = hasattr(Tensor, "grad_dtype")


def trained(
    reads_lists: bool, dtype: torch.dtype, group: Any = None, rank: int = 0, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    AdamRule.reads_lists = reads_lists
    try:
        model = build(dtype)
        params = list(model.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
        optimizer = pyzero.FusedZeroAdamW(
            groups, lr=1e-2, max_grad_norm=0.3, process_group=group, bucket_cap_mb=2e-3, reduce_grads=False, **options
        )
        for step in range(5):
            optimizer.backward(loss_of(model, micro_batch(step, rank)))
            change(params, step, rank)
            optimizer.step()
            optimizer.zero_grad()
        return params_of(model), [optimizer.full_state(param)["exp_avg_sq"] for param in params]
    finally:
        AdamRule.reads_lists = True


def change(params: list[Tensor], step: int, rank: int) -> None:
    """What gradients may look like."""
    grads = [param.grad for param in params]
    if step == 1:
        params[0].grad = None if rank == 0 else torch.zeros_like(grads[0])
    elif step == 2:  # an address that no vector instruction takes, and other strides
        params[0].grad = torch.zeros(grads[0].numel() + 1, dtype=grads[0].dtype)[1:].view_as(grads[0]).copy_(grads[0])
        params[1].grad = grads[1].t().contiguous().t() if grads[1].dim() == 2 else grads[1]
    elif step == 3:
        grads[2].view(-1)[-1] = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_packed(dtype):
    packed, in_place = (trained(reads_lists, dtype, loss_scale=64.0) for reads_lists in (False, True))
    assert_same(packed[0], in_place[0])
    assert_same(packed[1], in_place[1])


def on_two(group: Any, reads_lists: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients that somebody else has averaged: the same on both ranks, of which one may have none."""
    rank = group.rank()
    torch.manual_seed(0)
    AdamRule.reads_lists = reads_lists
    try:
        params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((200,), (64, 3), (7,), (130,))]
        optimizer = pyzero.FusedZeroAdamW(params, lr=1e-2, process_group=group, reduce_grads=False, max_grad_norm=1.0)
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = torch.randn(param.shape).bfloat16()
                if (index + step) % 4 == 0 and rank == 1:
                    param.grad = None
            optimizer.step()
        return params_of(nn.ParameterList(params)), [optimizer.full_master(param) for param in params]
    finally:
        AdamRule.reads_lists = True


def test_shards_of_averaged_gradients(ranks):
    packed, in_place = ranks.run(2, on_two, False), ranks.run(2, on_two, True)
    for one, other in zip(packed, in_place, strict=True):
        assert_same(one[0], other[0])
        assert_same(one[1], other[1])


@pytest.mark.parametrize("source", ["weight", "master", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_may_be_what_the_step_writes(dtype, source):
    """Of the parameter's own bucket, and of one that is updated before."""
    if dtype != torch.float32 and source != "weight" and not HAS_GRAD_DTYPE:
        pytest.skip("this torch has no grad_dtype")
    results = []
    for is_copied in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(100, dtype=dtype)) for _ in range(3)]
        optimizer = pyzero.FusedZeroAdamW(params, lr=1e-2, bucket_cap_mb=1e-5)
        for param in params:
            param.grad_dtype = None
            param.grad = torch.randn(100, dtype=dtype)
        optimizer.step()
        values = [optimizer.state[p][source] if source != "weight" else p.detach() for p in params]
        for param, value in zip(params, (values[0], values[0], values[1]), strict=True):
            param.grad = value.clone() if is_copied else value
        optimizer.step()
        results.append([value.clone() for p in params for value in (p.detach(), *optimizer.state[p].values())])
    assert_same(*results)


@pytest.mark.parametrize(
    ("optimizer", "is_copied"),
    [("FusedZeroAdamW", False), ("FusedZeroLion", False), ("FusedZeroSGD", False), ("ZeroLamb", True)],
)
def test_gradients_are_not_copied(monkeypatch, optimizer, is_copied):
    numels: list[int] = []
    pack = ops.pack_
    monkeypatch.setattr(ops, "pack_", lambda b, ts, **kw: numels.extend(t.numel() for t in ts) or pack(b, ts, **kw))
    large, small = nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(10))
    zero = getattr(pyzero, optimizer)([small, large], lr=1e-2)
    small.grad, large.grad = torch.ones_like(small), torch.ones_like(large)
    zero.step()
    assert sum(numels) >= 100_010 if is_copied else not numels
    numels.clear()
    large.grad = torch.ones(100_001)[1:]  # at an address that no vector instruction takes
    small.grad = torch.ones_like(small)
    zero.step()
    assert is_copied or numels == [100_000]


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch has no grad_dtype")
@pytest.mark.parametrize("optimizer", [pyzero.FusedZeroAdamW, pyzero.ZeroLamb], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_of_another_dtype_is_not_rounded(place, dtypes, optimizer):
    weights, grads = dtypes
    params = [nn.Parameter(torch.ones(5, dtype=weights)) for _ in range(2)]
    params[place].grad_dtype = None
    params[place].grad = torch.tensor([6e4, -3e-8, 1.0, 2.0, 3.0], dtype=torch.float64).to(grads)
    if grads == torch.float32:
        params[place].grad.mul_(2)  # the first is then an inf in fp16, the second a zero
    params[1 - place].grad = torch.ones_like(params[0])
    optimizer = optimizer(params, lr=1e-3, loss_scale=None)
    optimizer.step()
    for param in params:
        assert_same([optimizer.full_state(param)["exp_avg"]], [param.grad.float() * (1 - 0.9)])


def negated(group: Any) -> float:
    param = nn.Parameter(torch.zeros(1))
    optimizer = pyzero.FusedZeroAdamW([param], lr=0.1, process_group=group)
    torch.complex(torch.zeros(1), param).conj().mul(2j).real.sum().backward()  # 2 * param
    if group is None:
        assert param.grad.is_neg()
    optimizer.step()
    return param.item()


def test_a_gradient_that_is_a_negated_view(ranks):
    """A conjugate's imaginary part: its memory has the other sign."""
    assert [negated(None), *ranks.run(2, negated)] == pytest.approx([-0.1] * 3)


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grad, "sum", ctx.group), None


def summed_in_backward(group: Any, reduce_grads: bool) -> list[float]:
    param = nn.Parameter(torch.ones(70))
    optimizer = pyzero.FusedZeroAdamW([param], process_group=group, reduce_grads=reduce_grads, stage=1)
    (SumOverRanks.apply(param, group) * (group.rank() + 1)).sum().backward()
    if not reduce_grads or group.size() == 1:
        assert not param.grad.data_ptr()  # a wrapper that has no memory
    optimizer.step()
    return (optimizer.full_state(param)["exp_avg"] / (1 - 0.9)).unique().tolist()


@pytest.mark.parametrize("reduce_grads", [True, False])
def test_a_gradient_that_a_functional_collective_gives(ranks, reduce_grads):
    for size, total in ((1, 1.0), (2, 3.0)):
        assert ranks.run(size, summed_in_backward, reduce_grads) == [[pytest.approx(total)]] * size


def clipped_twice(is_ours: bool, max_grad_norm: float | None) -> list[Tensor]:
    """Cleared between two clips; and assigned between two steps."""
    params = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))]
    params[0].grad = torch.arange(24.0).view(6, 4).t()  # strides of its own: it is copied
    params[1].grad, params[2].grad = torch.ones(5), torch.ones(3)
    if is_ours:
        optimizer = pyzero.FusedZeroAdamW(params, max_grad_norm=max_grad_norm)
    else:
        optimizer = torch.optim.AdamW(params)

    def clip(norm: float) -> Tensor:
        return optimizer.clip_grad_norm_(norm) if is_ours else nn.utils.clip_grad_norm_(params, norm)

    def step() -> None:
        kept = [param.grad for param in params]
        if max_grad_norm is not None and not is_ours:  # ours leaves `.grad` as it is
            for param, grad in zip(params, kept, strict=True):
                param.grad = None if grad is None else grad.clone()
            clip(max_grad_norm)
        optimizer.step()
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad

    norms = [clip(1.0)]
    params[2].grad = None
    norms += [clip(0.8)] if max_grad_norm is None else []
    step()
    params[1].grad = torch.ones(5) * 0.3
    norms += [clip(0.8)] if max_grad_norm is None else []
    step()
    return [*norms, *(optimizer.state[param]["exp_avg"].view_as(param) for param in params[:2])]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_clip_holds_for_the_others_where_one_gradient_is_cleared_or_replaced(max_grad_norm):
    torch.testing.assert_close(clipped_twice(True, max_grad_norm), clipped_twice(False, max_grad_norm))


@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("how", ["in place", "clone", "sum"])
@pytest.mark.parametrize("then", ["step", "clip", "backward"])
def test_an_edit_of_what_was_clipped_is_refused(how, then, has_stepped):
    """The coefficient lies beside `.grad`, and would multiply too much or too little."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroAdamW([param])
    if has_stepped:
        param.grad = torch.ones(4)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    before = param.detach().clone()
    optimizer.zero_grad()
    param.grad = torch.ones(4)
    optimizer.clip_grad_norm_(1.0)
    if how == "in place":
        param.grad.mul_(2)
    else:
        param.grad = param.grad.clone() if how == "clone" else param.grad + 1
    calls = {
        "step": optimizer.step,
        "clip": lambda: optimizer.clip_grad_norm_(1.0),
        "backward": lambda: param.sum().backward(),
    }
    with pytest.raises(RuntimeError, match="edited or assigned"):
        calls[then]()
    assert torch.equal(param, before)
    optimizer.zero_grad()
    param.sum().backward()
    optimizer.step()
    assert (param < before).all()


def test_the_reference_does_not_edit_what_it_reads():
    """A write to `.grad` between clip and step is an error, whoever made it."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroAdamW([param], backend="reference")
    param.grad = torch.ones(4)
    assert optimizer.clip_grad_norm_(1.0) == 2
    optimizer.step()
    assert torch.allclose(optimizer.state[param]["exp_avg"], torch.full((4,), 0.05))
