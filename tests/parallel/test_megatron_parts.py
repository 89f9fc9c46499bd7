"""Checkpoints of plain weights that are split by hand, as Megatron's layers are.

Parts on several ranks share one name.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_case import Mpu
from torch import Tensor, nn

import pyzero

ROWS, WIDTH = 5, 4  # uneven over 2 ranks
SAVED_AT, STEPS = 3, 5


class Split(nn.Module):
    """This rank's rows of a trained and of a frozen weight, and a weight and a buffer that all ranks have."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        rows = [int(row) for row in torch.arange(ROWS).tensor_split(size)[rank]]
        self.up = nn.Parameter(draw(ROWS, WIDTH)[rows].to(dtype))
        self.frozen = nn.Parameter(draw(ROWS, WIDTH)[rows].to(dtype), requires_grad=False)
        self.norm = nn.Parameter(draw(WIDTH).to(dtype))
        self.register_buffer("count", torch.tensor(float(seed)))
        if size > 1:
            self.up.tensor_model_parallel = self.frozen.tensor_model_parallel = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of this rank's rows, and an output that all ranks compute alike."""
        return (self.up + self.frozen) @ x, self.norm * x


def groups(group: Any, size: int) -> tuple[Any, Any]:
    """Return (replicas, model-parallel ranks) for `size` parts."""
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size(group)
    if world < dist.get_world_size():
        assert size in (1, world)
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return (alone, group) if size == world else (group, None)
    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("dp", "tp"))
    return mesh.get_group("dp"), mesh.get_group("tp")


def build(group: Any, size: int, dtype: torch.dtype, seed: int = 0, kind: Any = Split) -> tuple[Any, Any, int]:
    data, parts = groups(group, size)
    model = kind(0 if parts is None else dist.get_rank(parts), size, dtype, seed)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.1, process_group=data, model_parallel_group=parts)
    return model, optimizer, dist.get_rank(data)


def train(model: Any, optimizer: Any, replica: int, steps: range) -> None:
    for step in steps:
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(10 * step + replica)).to(model.up.dtype)
        optimizer.zero_grad()
        optimizer.backward(sum(part.float().square().sum() for part in model(x)))
        optimizer.step()
    optimizer.zero_grad()


def contents(model: Any, optimizer: Any) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        found.update({f"{name}.{key}": value for key, value in optimizer.full_state(param).items()})
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(group: Any, size: int, dtype: torch.dtype, folder: Path) -> list[dict[str, Tensor]]:
    model, optimizer, replica = build(group, size, dtype)
    train(model, optimizer, replica, range(SAVED_AT))
    pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=SAVED_AT)
    saved = contents(model, optimizer)
    train(model, optimizer, replica, range(SAVED_AT, STEPS))
    return [saved, contents(model, optimizer)]


def load(group: Any, size: int, dtype: torch.dtype, folder: Path, strict: bool = True) -> Any:
    model, optimizer, replica = build(group, size, dtype, seed=1)
    before = contents(model, optimizer)
    try:
        pyzero.load_checkpoint(folder, model=model, optimizer=optimizer, strict=strict)
    except pyzero.CheckpointError as error:
        assert same(contents(model, optimizer), before)
        return str(error)
    saved = contents(model, optimizer)
    train(model, optimizer, replica, range(SAVED_AT, STEPS))
    return [saved, contents(model, optimizer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_rank_gets_its_part_again(ranks, tmp_path, dtype):
    wanted = ranks.run(4, save, 2, dtype, tmp_path)
    assert not torch.equal(wanted[0][0]["frozen"][:2], wanted[1][0]["frozen"])
    for found, saved in zip(ranks.run(4, load, 2, dtype, tmp_path), wanted, strict=True):
        assert same(found[0], saved[0]) and same(found[1], saved[1])
    for found, saved in zip(ranks.run(2, load, 2, dtype, tmp_path), wanted[:2], strict=True):  # one replica
        assert same(found[0], saved[0])


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_parts_is_refused(ranks, tmp_path, strict):
    ranks.run(4, save, 2, torch.float32, tmp_path / "parts")
    ranks.run(1, save, 1, torch.float32, tmp_path / "whole")
    for world, size in ((4, 4), (1, 1)):
        for message in ranks.run(world, load, size, torch.float32, tmp_path / "parts", strict):
            assert f"expected a model_parallel_group of 2 ranks, as when {tmp_path / 'parts'}" in message
            assert f", got {size}" in message and "model_parallel_group of" in message
    for message in ranks.run(4, load, 2, torch.float32, tmp_path / "whole", strict):
        assert "expected a checkpoint of weights in 2 parts, got one of whole weights" in message
    with pytest.raises(ValueError, match="got parts of 2 model-parallel ranks"):
        from pyzero.checkpoint.convert import export

        export(tmp_path / "parts", tmp_path / "model.safetensors")


def with_mpu(group: Any, folder: Path) -> list[dict[str, Tensor]]:
    mpu, found = Mpu(), []
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    for seed in (0, 1):
        model = Split(dist.get_rank(mpu.model), 2, torch.float32, seed)
        engine = pyzero.initialize(model=model, config=config, mpu=mpu)[0]
        if seed:
            engine.load_checkpoint(folder)
        else:
            train(model, engine.optimizer, dist.get_rank(mpu.data), range(SAVED_AT))
            engine.save_checkpoint(folder)
        found.append(contents(model, engine.optimizer))
    return found


def test_the_engine_saves_parts_with_mpu(ranks, tmp_path):
    for saved, loaded in ranks.run(4, with_mpu, tmp_path):
        assert same(saved, loaded)
