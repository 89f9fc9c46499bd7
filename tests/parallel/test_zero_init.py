"""zero.Init: a model whose weights are sharded while it is built, and what scripts do with it before initialize()."""

import contextlib
import copy
import io
import socket
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from meter import Meter, gloo_lets_go
from torch import nn

import pyzero
from pyzero.deepspeed import zero

MIB = 2**20


def config_of(dtype: str, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": case.LR, "weight_decay": 1e-2}},
        "zero_optimization": {"stage": stage},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }


class Attention(nn.Module):
    """A module that writes its own weights and its children's in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(5, 6))
        nn.init.orthogonal_(self.scale)
        self.scale.data[0].zero_()
        self.whole_in_init = type(self.scale) is nn.Parameter
        self.out = nn.Linear(6, 6)
        nn.init.xavier_uniform_(self.out.weight)
        self.out.bias.data[1:3] = 0.5
        self.register_buffer("table", torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((x @ self.scale.t()) @ self.scale + self.table.sum())


class Model(nn.Module):
    """A model with uneven rows over two ranks, copied modules, tied weights, a frozen weight, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.blocks.append(copy.deepcopy(self.blocks[0]))
        self.encoder = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0)
        self.last = nn.Linear(6, 6, bias=False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.last.weight
        self.first.bias.requires_grad_(False)
        self.count = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.5)
            module.weight.data[0] *= module.weight.norm()  # reads, in apply(), as well

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.tied(self.last(self.encoder(x[None])[0])).mean(1, keepdim=True)


def build(context: Any) -> Any:
    torch.manual_seed(dist.get_rank())  # rank 0's count
    with context:
        model = Model()
    nn.init.trunc_normal_(model.tied.weight, std=0.3)
    with zero.GatheredParameters([model.first.weight, model.first.bias], modifier_rank=0):
        if dist.get_rank() == 0:
            model.first.weight.data.add_(model.first.weight.mean())
    model.load_state_dict({"last.weight": torch.full((6, 6), 0.25)}, strict=False)
    model.last.weight.data[2].normal_()
    return model


def train(model: Any, dtype: str, stage: int, steps: int = 5) -> list[torch.Tensor]:
    engine = pyzero.initialize(model=model, config=config_of(dtype, stage))[0]
    masters = list(engine.get_fp32_state_dict().values())
    for step in range(steps):
        x = case.batch(step).chunk(engine.dp_world_size)[engine.dp_rank]
        engine.backward(engine(x).float().sub(1).square().mean())
        engine.step()
    return [*masters, *engine.get_fp32_state_dict().values()]


def same_bits(group: Any, dtype: str, stage: int) -> int:
    whole = train(build(contextlib.nullcontext()), dtype, stage)
    model = build(zero.Init(config_dict_or_path=config_of("fp32", 3) if stage == 3 else None))
    rows = sum(len(p.rows.local) for p in model.parameters() if hasattr(p, "rows"))
    assert rows < sum(len(p) for p in model.parameters()) * 0.4
    assert model.blocks[0].whole_in_init and model.tied.weight is model.last.weight
    sharded = train(model, dtype, stage)
    assert all(torch.equal(a, b) for a, b in zip(sharded, whole, strict=True))
    return len(sharded)


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 3), ("bf16", 3), ("fp32", 2)])
def test_a_model_of_init_trains_as_one_built_whole(ranks, dtype, stage):
    assert ranks.run(4, same_bits, dtype, stage) == [2 * 30] * 4


def memory(group: Any) -> dict[str, float]:
    """Return MiB of memory for 16 layers of one MiB each, on two ranks."""
    from torch.distributed.device_mesh import DeviceMesh

    config = {**config_of("fp32", 3), "optimizer": None}
    with gloo_lets_go(), Meter() as meter:
        with zero.Init(data_parallel_group=group):
            model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(16)))
        found = {"building": meter.most / MIB, "built": meter.now / MIB}
        engine = pyzero.initialize(model=model, config=config, mesh=DeviceMesh.from_group(group, "cpu"))[0]
        torch.zeros(())  # the meter looks
        found |= {"initializing": meter.most / MIB, "initialized": meter.now / MIB}
        assert engine.module[0].weight.to_local().shape == (256, 512)
    return found


def test_no_rank_holds_more_than_its_part_and_a_module(ranks):
    for found in ranks.run(2, memory):
        assert found["built"] == pytest.approx(8, rel=0.01) == found["initialized"]
        assert found["building"] == found["initializing"] == pytest.approx(9, rel=0.01)  # the last one whole, and cut


class Broken(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        raise KeyError("as scripts do")


class Mpu:
    def __init__(self, group: Any) -> None:
        self.group = group

    def get_data_parallel_group(self) -> Any:
        return self.group


def edges(group: Any) -> None:
    own_init, own_apply = nn.Linear.__init__, nn.Module.apply
    with pytest.raises(KeyError), zero.Init():
        layer = nn.Linear(3, 3)
        Broken()
    assert nn.Linear.__init__ is own_init and nn.Module.apply is own_apply
    assert "__init_subclass__" not in nn.Module.__dict__ and nn.Linear(3, 3).weight.data.sum() != 0
    with zero.Init(remote_device="cpu", mpu=Mpu(group)):
        with zero.Init(dtype=torch.bfloat16):
            inner = nn.Linear(3, 3)
        with zero.Init(enabled=False), zero.Init(config_dict_or_path={"zero_optimization": {"stage": 2}}):
            outer = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="PipelineModule in zero.Init, wanted modules that all ranks build alike"):
            pyzero.deepspeed.PipelineModule([nn.Linear(3, 3)], num_stages=1)
    assert inner.weight.dtype == inner.weight.rows.local.dtype == torch.bfloat16 and outer.weight.dtype == torch.float32
    assert "Sharded" in repr(outer.weight) + f"{outer.weight}" and nn.Linear(3, 3).weight.shape == outer.weight.shape

    for use in (
        lambda: layer(torch.ones(3)),
        lambda: layer.weight * 2,
        lambda: torch.save(layer.state_dict(), io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match="that zero.Init has sharded, wanted .* whole"):
            use()
    read = layer.weight.data.clone()
    with zero.GatheredParameters(layer.weight):
        assert torch.equal(layer.weight, read) and type(layer.weight) is nn.Parameter
        with zero.GatheredParameters([layer.weight], modifier_rank=3):
            with torch.no_grad():
                layer.weight.fill_(dist.get_rank())
        assert (layer.weight == 3).all()
    assert torch.equal(layer.weight.data.cpu(), layer.weight.data) and torch.equal(layer.weight.detach() + 0, read)
    with pytest.raises(KeyError), zero.GatheredParameters(layer.weight, modifier_rank=0):
        layer.weight.data.zero_()
        raise KeyError
    assert torch.equal(layer.half().weight.data + 0, read.half())
    assert layer.weight.rows.local.dtype == torch.float16 and layer.weight.requires_grad

    built = nn.Linear(3, 3)
    zero.Init(module=built)
    assert built.weight.ds_numel == 9 and len(built.weight.rows.local) == (dist.get_rank() < 3)


def test_edges_of_init(ranks):
    ranks.run(4, edges)


def test_alone_a_model_is_whole():
    with zero.Init():
        assert type(nn.Linear(2, 2).weight) is nn.Parameter


def test_an_engine_leaves_the_group_that_init_joined(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with zero.Init():
        model = nn.Linear(2, 2)
    first, second = (pyzero.initialize(model=model, config=config_of("fp32", 2))[0] for _ in range(2))
    first.destroy()
    first.destroy()
    assert dist.is_initialized()  # the second one needs it
    second.destroy()
    assert not dist.is_initialized()


def test_an_engine_leaves_a_group_of_the_scripts_alone(monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        engine, *_ = pyzero.initialize(model=nn.Linear(2, 2), config=config_of("fp32", 2))
        engine.destroy()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
