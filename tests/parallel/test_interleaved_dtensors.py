"""DTensors of which a rank has several boxes, as transformers cuts fused weights (gate and up in one) over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero
from pyzero.checkpoint.files import CheckpointError
from pyzero.sharding.local_param import local_of

ROWS, WIDTH = 8, 3


class Fused(nn.Module):
    """A weight whose two halves are split over two ranks each, and one that is split as usual."""

    def __init__(self, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor
        from torch.distributed.tensor.placement_types import _StridedShard

        super().__init__()
        cuts = {"fused": _StridedShard(0, split_factor=2), "plain": Shard(0)}
        for name, cut in cuts.items():
            self.register_parameter(name, nn.Parameter(distribute_tensor(values(0), mesh, [cut])))


def values(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def use(group: Any, num_parts: int, folder: Path) -> dict[str, str]:
    """Write and read whole tensors. Return what a save, a load and state_dict() say."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (4 // num_parts, num_parts), mesh_dim_names=("dp", "tp"))
    model = Fused(mesh["tp"])
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.0, process_group=mesh["dp"])
    for param in model.parameters():
        (param * param).sum().backward()
        optimizer.set_full_grad(param, values(1))
        assert torch.equal(optimizer.full_grad(param), values(1))
    optimizer.step()
    for param in model.parameters():
        optimizer.set_full_state(param, {"master": values(2), "exp_avg": values(3)})
        assert torch.equal(param.full_tensor(), values(2))
        assert torch.equal(optimizer.full_state(param)["exp_avg"], values(3))
    saved = optimizer.full_state_dict()
    optimizer.set_full_state(model.fused, {"master": values(4), "exp_avg": values(4)})
    optimizer.load_state_dict(saved)
    assert torch.equal(model.fused.full_tensor(), values(2))
    assert torch.equal(optimizer.full_state(model.fused)["exp_avg"], values(3))
    assert torch.equal(local_of(model.fused), values(2)[held(mesh["tp"].get_local_rank(), num_parts)])
    said = {}
    for name, do in {
        "save": lambda: pyzero.save_checkpoint(folder / "new", model=model, optimizer=optimizer, step=1),
        "load": lambda: pyzero.load_checkpoint(folder / "whole", model=model, optimizer=optimizer),
        "state_dict": lambda: optimizer.state_dict() and "",
    }.items():
        try:
            said[name] = str(do())
        except (CheckpointError, ValueError) as error:
            said[name] = str(error)
    assert torch.equal(model.fused.full_tensor(), values(2))
    return said


def held(rank: int, num_parts: int) -> list[int]:
    halves = torch.arange(ROWS).chunk(2)
    return [int(row) for half in halves for row in half.chunk(num_parts)[rank]]


@pytest.mark.parametrize("num_parts", [2, 4])
def test_whole_tensors_are_cut_as_the_weight_and_checkpoints_refuse_it(ranks, tmp_path, num_parts):
    whole = nn.Module()
    for name in ("fused", "plain"):
        whole.register_parameter(name, nn.Parameter(values(0)))
    optimizer = pyzero.FusedZeroAdamW(whole.parameters())
    pyzero.save_checkpoint(tmp_path / "whole", model=whole, optimizer=optimizer, step=1)
    for said in ranks.run(4, use, num_parts, tmp_path):
        for name in ("save", "load"):
            assert "fused fits no checkpoint: expected DTensors of which each rank has one box" in said[name]
        assert said["state_dict"] == "" if num_parts == 4 else "each rank has one box" in said["state_dict"]
