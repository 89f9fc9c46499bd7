"""Messages of many ranks go through the first one: the rows of a ring, and its errors."""

from typing import Any

import pytest
import torch
from own_groups import OwnGroups
from ranks import Ranks
from torch import Tensor

import pyzero
from pyzero.comm import group as group_module
from pyzero.comm import work
from pyzero.comm.group import Group
from pyzero.comm.root_gather import RootGather
from pyzero.comm.work import CollectiveError

SHORT_S = 3.0


def gathered(group: Any, numel: int, most_in_ring: int) -> tuple[Tensor, int]:
    """The rows of three messages, and how many went through the first rank."""
    ours, calls = Group(group), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module, "_MOST_IN_RING", most_in_ring)
        patch.setattr(group_module, "RootGather", lambda *args: calls.append(1) or RootGather(*args))
        rows = [ours.gather_rows(torch.full((numel,), 10.0 * message + ours.rank)) for message in range(3)]
    return torch.stack(rows), len(calls)


@pytest.mark.parametrize("numel", [1, 3000])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_are_those_of_a_ring(ranks: Ranks, size: int, numel: int):
    wanted = torch.tensor([[10.0 * message + rank for rank in range(size)] for message in range(3)])
    wanted = wanted[..., None].expand(3, size, numel)
    for most_in_ring, num_calls in ((size, 0), (size - 1, 3)):
        for rows, calls in ranks.run(size, gathered, numel, most_in_ring):
            assert torch.equal(rows, wanted) and calls == num_calls


def apart(group: Any, odd: int) -> str:
    """The error where one rank sends something else than the others."""
    ours = Group(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module, "_MOST_IN_RING", 1)
        patch.setattr(work, "_ASKS_AFTER_S", 0.5)
        try:
            if ours.rank == odd:
                ours.gather_shards(torch.zeros(5), "another collective")
            else:
                ours.gather_rows(torch.zeros(4), "the message")
        except CollectiveError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_rank_that_sends_something_else_is_named_on_all(ranks: Ranks, odd: int):
    for error in OwnGroups(ranks, SHORT_S)(3, apart, odd):
        assert "another collective" in error and "the message" in error, error


def trained(group: Any, stage: int, most_in_ring: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_module, "_MOST_IN_RING", most_in_ring)
        optimizer = pyzero.FusedZeroAdamW(
            model.parameters(), process_group=group, stage=stage, transport="exact", max_grad_norm=0.1
        )
        for step in range(4):
            x = torch.full((2, 8), 1.0 + group.rank() + step)
            optimizer.backward(model(x).sum() * (float("inf") if step == 1 else 1.0))
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.skipped_steps == 1
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("stage", [1, 2])
def test_training_is_that_with_a_ring(ranks: Ranks, stage: int):
    for ours, wanted in zip(ranks.run(3, trained, stage, 1), ranks.run(3, trained, stage, 8), strict=True):
        assert all(map(torch.equal, ours, wanted))
