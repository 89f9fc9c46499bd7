"""A small real model for the tests of the optimizer, and the helpers that they share."""

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_MICRO_BATCHES = 12  # divisible by 1, 2, 3 and 4 ranks


class Net(nn.Module):
    """Sizes that need padding, an odd embedding, a tied weight, an empty and a 0-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 22)
        self.hidden = nn.Linear(22, 67)
        self.norm = nn.LayerNorm(67)
        self.back = nn.Linear(67, 22)
        self.head = nn.Linear(22, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, 4) tokens -> (batch, 4, 13) logits."""
        x = self.embedding(tokens)
        x = x + self.back(torch.relu(self.norm(self.hidden(x)))) * self.gain
        return self.head(x) + self.empty.sum()


class Failing(torch.autograd.Function):
    """A function whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("as planned")


def build(dtype: torch.dtype) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def randint(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random integers from 0 to high - 1, the same on every device."""
    drawn = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


def randn(*shape: int, seed: int) -> Tensor:
    """Normal values, the same on every device."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


def micro_batch(step: int, index: int) -> Tensor:
    return randint(13, (2, 5), seed=1000 * step + index)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).float()
    return nn.functional.cross_entropy(logits.reshape(-1, 13), batch[:, 1:].reshape(-1))


def params_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"parameter {index} differs by {(a.float() - b.float()).abs().max()}"
