"""State of DTensor parameters in state dicts and checkpoints: whole tensors by name, on any mesh, bit for bit."""

from pathlib import Path
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from parallel_case import build, contents

import pyzero

STEPS = 3


def save(group: Any, kind: str, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    model, optimizer = build(group, kind, dtype)
    half = dist.get_world_size(group) // (2 if kind in ("tensor", "both") else 1)
    rank = dist.get_rank(group)
    share = (rank // 2, half) if kind in ("tensor", "both") else (rank, half)
    case.train(model, optimizer, group, range(STEPS), share)
    optimizer.zero_grad()
    with torch.no_grad():
        model(case.batch(0, dtype))  # fully_shard shows whole weights of the root behind it
    pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=STEPS, more=kind)
    return contents(model, optimizer)


def load(group: Any, kind: str, dtype: torch.dtype, folder: Path) -> dict[str, torch.Tensor]:
    model, optimizer = build(group, kind, dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    loaded = pyzero.load_checkpoint(folder, model=model, optimizer=optimizer)
    assert loaded["step"] == STEPS
    found = contents(model, optimizer)
    whole = optimizer.full_state_dict()
    case.loss_of(model, case.batch(9, dtype)).backward()
    optimizer.step()  # away from it
    optimizer.load_state_dict(whole)
    again = contents(model, optimizer)
    assert all(torch.equal(found[name], again[name]) for name in found)
    own = optimizer.state_dict()
    own["state"] = {n: {key: value.clone() for key, value in row.items()} for n, row in own["state"].items()}
    optimizer.zero_grad()
    case.loss_of(model, case.batch(9, dtype)).backward()
    optimizer.step()
    optimizer.load_state_dict(own)
    again = contents(model, optimizer)
    assert all(torch.equal(found[name], again[name]) for name in found)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PAIRS = {
    ("plain", 2): [("fully_shard", 4), ("both", 4)],
    ("fully_shard", 2): [("plain", 1)],
    ("fully_shard", 4): [("plain", 1), ("fully_shard", 2), ("tensor", 4)],
    ("tensor", 4): [("both", 4), ("plain", 2)],
    ("both", 4): [("fully_shard", 2), ("tensor", 4)],
}


@pytest.mark.parametrize(("kind", "size"), PAIRS)
def test_a_checkpoint_loads_on_another_mesh(ranks, tmp_path, kind, size):
    dtype = torch.float32 if kind in ("tensor", "fully_shard") else torch.bfloat16
    saved = ranks.run(size, save, kind, dtype, tmp_path)
    assert all(same(one, saved[0]) for one in saved)
    for other, other_size in PAIRS[kind, size]:
        for loaded in ranks.run(other_size, load, other, dtype, tmp_path):
            assert same(loaded, saved[0]), (other, other_size)
