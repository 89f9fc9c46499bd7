"""Backwards of one optimizer on two threads, and inside one another."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch
from torch import Tensor, nn

import pyzero
from pyzero.loss_scale import scaled_backward

SCALE = pyzero.LossScale(init_scale=2.0**12)
PATIENCE_S = 20.0
HOW = {
    "backward": lambda optimizer, loss: optimizer.backward(loss),
    "scale": lambda optimizer, loss: optimizer.scale(loss).backward(),
}


class Backward:
    """A backward on a thread of its own, which stops before its first gradient until `end`."""

    def __init__(self, weight: Tensor, run: Callable[[Tensor], None]) -> None:
        self._may_go_on, runs = threading.Event(), threading.Event()
        product = weight.float() * 1.0
        product.register_hook(lambda grad: (runs.set(), self._may_go_on.wait(PATIENCE_S), None)[2])
        self._thread = threading.Thread(target=run, args=(product.sum(),))
        self._thread.start()
        assert runs.wait(PATIENCE_S)

    def end(self) -> None:
        self._may_go_on.set()
        self._thread.join()


def weight_and_optimizer() -> tuple[nn.Parameter, pyzero.FusedZeroAdam]:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    return weight, pyzero.FusedZeroAdam([weight], loss_scale=SCALE)


def test_two_backwards_take_turns():
    weight, optimizer = weight_and_optimizer()
    first = Backward(weight, optimizer.backward)
    second = threading.Thread(target=optimizer.backward, args=((weight.float() * 3.0).sum(),))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    first.end()
    second.join()
    assert torch.equal(optimizer.full_grad(weight), torch.full((4,), 4.0))


@pytest.mark.parametrize(("first", "second"), [("scale", "scale"), ("scale", "backward"), ("backward", "scale")])
def test_a_second_one_is_refused_where_it_cannot_wait(first, second):
    weight, optimizer = weight_and_optimizer()
    running = Backward(weight, lambda loss: HOW[first](optimizer, loss))
    try:
        with pytest.raises(RuntimeError, match="on another thread"):
            HOW[second](optimizer, weight.float().sum())
    finally:
        running.end()
    assert torch.equal(optimizer.full_grad(weight), torch.ones(4))
    HOW[second](optimizer, weight.float().sum())
    assert torch.equal(optimizer.full_grad(weight), torch.full((4,), 2.0))


@pytest.mark.parametrize(("first", "second"), [("scale", "scale"), ("backward", "scale"), ("scale", "backward")])
def test_a_second_one_that_begins_at_the_same_moment_is_refused(first, second, monkeypatch):
    weight, optimizer = weight_and_optimizer()
    begins, may_go_on, marks = threading.Event(), threading.Event(), scaled_backward.mark_backward_scaled

    def mark_slowly(*args: Any, **kwargs: Any) -> None:
        if not begins.is_set():
            begins.set()
            assert may_go_on.wait(PATIENCE_S)
        marks(*args, **kwargs)

    monkeypatch.setattr(scaled_backward, "mark_backward_scaled", mark_slowly)
    refused: list[RuntimeError] = []

    def begin_second() -> None:
        try:
            HOW[second](optimizer, weight.float().sum())
        except RuntimeError as error:
            refused.append(error)

    def hold(grad: Tensor) -> None:
        other.join(PATIENCE_S)

    other, product = threading.Thread(target=begin_second), weight.float() * 1.0
    product.register_hook(hold)
    running = threading.Thread(target=HOW[first], args=(optimizer, product.sum()))
    running.start()
    assert begins.wait(PATIENCE_S)
    other.start()
    other.join(0.2)
    may_go_on.set()
    running.join(2 * PATIENCE_S)
    assert torch.equal(optimizer.full_grad(weight), torch.ones(4))
    assert len(refused) == 1 and "on another thread" in str(refused[0])


class Inner(torch.autograd.Function):
    """Runs another backward of the optimizer in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, optimizer: pyzero.FusedZeroAdam) -> Tensor:
        ctx.weight, ctx.optimizer = weight, optimizer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            ctx.optimizer.backward((ctx.weight.float() * 3.0).sum())
        return grad, None, None


@pytest.mark.parametrize("loss_scale", [None, SCALE], ids=["plain", "scaled"])
def test_one_inside_another_has_its_scale(loss_scale):
    outer, inner = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = pyzero.FusedZeroAdam([outer, inner], loss_scale=loss_scale)
    optimizer.backward((Inner.apply(outer * 2.0, inner, optimizer)).sum())
    assert torch.equal(optimizer.full_grad(outer), torch.full((4,), 2.0))
    assert torch.equal(optimizer.full_grad(inner), torch.full((4,), 3.0))
    assert not optimizer.is_scaled_backward


def gradients(group: Any, loss_scale: Any, on_threads: bool) -> list[Tensor]:
    """Of two backwards of each rank."""
    model = build(torch.float16)
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group, loss_scale=loss_scale)
    losses = [loss_of(model, micro_batch(0, 2 * group.rank() + index)) for index in range(2)]
    if on_threads:
        threads = [threading.Thread(target=optimizer.backward, args=(loss,)) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for loss in losses:
            optimizer.backward(loss)
    return [optimizer.full_grad(param) for param in model.parameters()]


@pytest.mark.parametrize("loss_scale", [None, SCALE], ids=["plain", "scaled"])
def test_two_ranks_of_two_threads(ranks, loss_scale):
    together, in_turn = (ranks.run(2, gradients, loss_scale, on_threads) for on_threads in (True, False))
    for one, two in zip(together, in_turn, strict=True):
        assert_same(one, two)
