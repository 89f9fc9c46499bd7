"""A model and a training run whose numbers do not depend on the number of ranks, to save and to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyzero

SHAPES = ((17, 9), (70,), (), (0,), (3, 64), (5, 5, 2))
GROUPS = ({"weight_decay": 0.125}, {"lr": 2.0**-6})
OPTIMIZERS = {"adamw": pyzero.FusedZeroAdamW, "lion": pyzero.FusedZeroLion}
SAVED_AT, STEPS, OVERFLOW_AT = 3, 6, 1


class Model(nn.Module):
    """Parameters of many shapes, one of them in another memory order, and a buffer."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        values[-1] = values[-1].permute(2, 0, 1)
        self.weights = nn.ParameterList(map(nn.Parameter, values))
        self.register_buffer("calls", torch.tensor(seed))


def build(dtype: torch.dtype, seed: int) -> Model:
    """A model whose weights depend on the seed."""
    return Model(dtype, seed)


def make(kind: str, model: Model, group: Any, **options: Any) -> Any:
    """The model's optimizer, with two groups."""
    params = list(model.parameters())
    groups = [{"params": params[i::2], **hyper} for i, hyper in enumerate(GROUPS)]
    scale = pyzero.LossScale(init_scale=16.0, growth_interval=2)
    return OPTIMIZERS[kind](groups, lr=2.0**-5, process_group=group, loss_scale=scale, max_grad_norm=8.0, **options)


def step(optimizer: Any, model: Model, number: int, rank: int, size: int) -> None:
    """One step. The mean over ranks is exactly the same for any `size`: rank 0 has size times it, the others have 0."""
    optimizer.zero_grad()
    model.calls += 1
    loss = torch.zeros(())
    for index, param in enumerate(model.parameters()):
        if (index + number) % 4 == 0:
            continue  # unused
        generator = torch.Generator().manual_seed(100 * number + index)
        grad = torch.randint(-4, 5, param.shape, generator=generator).float() * (size if rank == 0 else 0)
        if number == OVERFLOW_AT and index == 1:
            grad[3] = float("inf")
        loss = loss + (param.float() * grad).nan_to_num(0.0, float("inf")).sum()
    optimizer.backward(loss)
    optimizer.step()


def counters(optimizer: Any) -> list[float]:
    """The numbers of the loss scale."""
    return [optimizer.loss_scale, optimizer.skipped_steps]


def assert_equal(got: Any, wanted: Any) -> None:
    """Assert that two trees have the same bits."""
    if isinstance(wanted, Tensor):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_equal(got[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert got == wanted


def train(optimizer: Any, model: Model, numbers: range, group: Any) -> None:
    for number in numbers:
        step(optimizer, model, number, group.rank(), group.size())


def outcome(optimizer: Any, model: Model) -> list[Any]:
    weights = [tensor.detach().clone() for tensor in model.state_dict().values()]
    return [counters(optimizer), optimizer.full_state_dict(), weights]


def uninterrupted(group: Any, kind: str, dtype: torch.dtype) -> list[Any]:
    model = build(dtype, 0)
    optimizer = make(kind, model, group)
    train(optimizer, model, range(STEPS), group)
    return outcome(optimizer, model)


def saved(group: Any, kind: str, dtype: torch.dtype, stage: int, path: Path, wait: bool = True) -> None:
    model = build(dtype, 0)
    optimizer = make(kind, model, group, stage=stage, bucket_cap_mb=4e-4)
    train(optimizer, model, range(SAVED_AT), group)
    if wait:
        pyzero.save_checkpoint(path, model=model, optimizer=optimizer, step=SAVED_AT, seed=torch.tensor(group.rank()))
        return
    future = pyzero.async_save_checkpoint(path, model=model, optimizer=optimizer, step=SAVED_AT, seed=group.rank())
    train(optimizer, model, range(SAVED_AT, STEPS), group)  # writes after the call are not saved
    assert future.result().name == f"step_{SAVED_AT}"
