"""Checkpoints of a weight on two pipeline stages: its copies are saved once, under one name, or the save is refused."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyzero

WIDTH = 4


class Ends(nn.Module):
    """The first and the last layer of a model, which share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.head.weight = self.embedding.weight


def stage_of(rank: int, way: str) -> tuple[nn.Module, Tensor]:
    """Return one stage of two, and its copy of the weight. way: What the last stage does with the first's layer."""
    model = Ends()
    weight = model.embedding.weight
    if rank == 0:
        model.head = nn.Identity()  # type: ignore[assignment]
    elif way == "drops it":
        model.embedding = nn.Identity()  # type: ignore[assignment]
    for param in model.parameters():
        param.model_parallel = rank == 0 or param is not weight  # type: ignore[attr-defined]
    return model, weight


def values(param: Tensor) -> Tensor:
    return torch.linspace(-1, 1, param.numel()).view(param.shape)


def train(model: nn.Module, optimizer: Any, tied: Any) -> list[Tensor]:
    for param in model.parameters():
        (param * values(param)).sum().backward()
    optimizer.sum_tied_grads(tied)
    optimizer.step()
    optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def save_and_load(group: Any, way: str, folder: Path) -> str:
    rank = group.rank()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    runs = []
    for _ in range(2):
        model, weight = stage_of(rank, way)
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=alone, model_parallel_group=group)
        runs.append((model, optimizer, [(weight, group)]))
    train(*runs[0])
    try:
        pyzero.save_checkpoint(folder, model=runs[0][0], optimizer=runs[0][1], step=1)
    except (ValueError, pyzero.CheckpointError) as error:
        return str(error)
    wanted = train(*runs[0])
    pyzero.load_checkpoint(folder, model=runs[1][0], optimizer=runs[1][1])
    assert all(map(torch.equal, train(*runs[1]), wanted))
    return ""


def test_copies_are_saved_once_under_one_name(ranks, tmp_path):
    assert ranks.run(2, save_and_load, "keeps it", tmp_path) == ["", ""]
    whole = Ends()
    optimizer = pyzero.FusedZeroAdamW(whole.parameters())
    with torch.no_grad():
        whole.head.weight.zero_()
    pyzero.load_checkpoint(tmp_path, model=whole, optimizer=optimizer)
    assert whole.head.weight is whole.embedding.weight and whole.head.weight.any()


def test_a_copy_under_a_name_of_its_own_is_refused(ranks, tmp_path):
    for said in ranks.run(2, save_and_load, "drops it", tmp_path):
        assert "got head.weight without on rank 1 of model_parallel_group, and nowhere else" in said
