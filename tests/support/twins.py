"""Twins: a model on several ranks beside torch's Adam in one process, and the parameters of tests that use it.

A gradient is a small integer times a power of two. So are its sums and means over up to 3 ranks, which are thus exact.
As betas are 0.5, exp_avg is half of the first gradient, and any other gradient would show in it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero

ADAM = {"lr": 0.125, "betas": (0.5, 0.5), "eps": 1.0}
SHAPES = ((64,), (3, 67), (5,))
LATEST_S = 20  # for an error that is found by counting instead of a timeout

STAGES = pytest.mark.parametrize("stage", [1, 2])
SIZES = pytest.mark.parametrize("size", [1, 2, 3])
SEVERAL = pytest.mark.parametrize("size", [2, 3])
# On one rank the stages do not differ.
UP_TO_TWO = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
UP_TO_THREE = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])


class Twins:
    """A model on this rank, and torch's Adam in the same process, which gets the mean of all ranks' gradients."""

    def __init__(self, group: Any, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.rank, self.size, self.stage = group.rank(), group.size(), stage
        self.model = nn.ParameterList(nn.Parameter(torch.full(shape, 2.0, dtype=dtype)) for shape in SHAPES)
        self.first, self.second, self.unused = self.model
        self.optimizer = pyzero.FusedZeroAdam(
            self.model.parameters(), **ADAM, process_group=group, stage=stage, **{"loss_scale": None, **options}
        )
        self.theirs = nn.ParameterList(nn.Parameter(torch.full(shape, 2.0)) for shape in SHAPES)
        self.adam = torch.optim.Adam(self.theirs.parameters(), **ADAM, foreach=False)

    def mean(self, factor: float) -> float:
        """The mean of factor * (1 + rank) over ranks."""
        return factor * (1 + self.size) / 2

    def loss(self, factor: float, index: int = 0) -> Tensor:
        """A loss whose gradient in each element is factor * (1 + rank)."""
        return (self.model[index].float() * (factor * (1 + self.rank))).sum()

    def expect(self, mean: float, index: int = 0) -> None:
        """Add `mean` to the gradient of torch's side."""
        (self.theirs[index] * mean).sum().backward()

    def backward(self, factor: float, index: int = 0) -> None:
        self.loss(factor, index).backward()
        self.expect(self.mean(factor), index)

    def step(self) -> None:
        self.optimizer.step()
        self.adam.step()

    def drop(self, how: str) -> None:
        """Drop all gradients, on both sides."""
        for optimizer, model in ((self.optimizer, self.model), (self.adam, self.theirs)):
            if how == "p.grad = None":
                for param in model:
                    param.grad = None
            else:
                {"optimizer": optimizer, "model": model}[how.split(",")[0]].zero_grad("zeros" not in how)

    def check(self) -> None:
        """Assert that state and weights equal torch's. This is a collective."""
        ours = [self.optimizer.full_state(param) for param in self.model]
        for index, (state, param, other) in enumerate(zip(ours, self.model, self.theirs, strict=True)):
            wanted = self.adam.state.get(other) or {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(other)}
            assert state["step"] == wanted["step"], f"parameter {index}"
            torch.testing.assert_close(state["exp_avg"], wanted["exp_avg"], rtol=1e-6, atol=0)
            torch.testing.assert_close(state["master"], other.detach(), rtol=1e-6, atol=0)
            assert torch.equal(param, state["master"].to(param.dtype))

    def no_sync(self, sync: bool) -> AbstractContextManager[None]:
        return nullcontext() if sync else self.optimizer.no_sync()


DROPS = ("optimizer", "optimizer, zeros", "model", "model, zeros", "p.grad = None")
READS: dict[str, Callable[[Twins], Any]] = {
    "clip": lambda t: t.optimizer.clip_grad_norm_(1e9),
    "full_grad": lambda t: t.optimizer.full_grad(t.first),
}
