"""A small model, its batches, and its training on one process, with which ranks that share it are compared."""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyzero

LR = 0.01
NUM_STEPS = 12
BATCH = 8


class Block(nn.Module):
    """A block whose 9 rows are uneven over 2 and 4 ranks. Over 4 ranks, the last has none of 6 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.mid = nn.Linear(12, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.mid(torch.tanh(self.up(self.norm(x))))))


class Model(nn.Module):
    """Two blocks between two layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(6, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() if x.dtype.itemsize < 4 else model(x)).sub(1).square().mean()


class Run(NamedTuple):
    """The results of a training run."""

    losses: Tensor
    norms: Tensor  # of gradients, before clipping
    weights: list[Tensor]


@cache
def alone(dtype: torch.dtype, max_norm: float | None, num_steps: int = NUM_STEPS) -> Run:
    """torch.optim.AdamW on one process."""
    model = Model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(num_steps):
        loss = loss_of(model, batch(step, dtype))
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")))
        optimizer.step()
        losses.append(loss.detach())
    return Run(torch.stack(losses), torch.stack(norms), [p.detach() for p in model.parameters()])


def assert_follows(run: Run, max_norm: float | None, num_steps: int = NUM_STEPS) -> None:
    """Assert that `run` is near to the run on one process."""
    assert_near(run, alone(torch.float64, max_norm, num_steps), alone(torch.float32, max_norm, num_steps))


def assert_near(run: Run, exact: Run, torchs: Run) -> None:
    """Assert that `run` is about as near to the run in fp64 as torch's run in fp32 is.

    Adam divides small gradients by small moments, so that the effect of rounding depends on the problem: torch's own
    error measures it. Another order of summation is another sample of the same errors. The largest of some hundred
    errors differs between two samples by less than a factor of 4. An error that torch's run happens not to make is a
    few units of the largest value.
    """
    for ours, theirs, wanted in zip(_parts(run), _parts(torchs), _parts(exact), strict=True):
        unit = 2.0**-24 * float(wanted.abs().max())
        limit = 4 * float((theirs.double() - wanted).abs().max()) + 8 * unit
        error = float((ours.double() - wanted).abs().max())
        assert error <= limit, f"{error:.3g} above {limit:.3g}"


def _parts(run: Run) -> list[Tensor]:
    return [run.losses, run.norms, torch.cat([weight.reshape(-1) for weight in run.weights])]


def fsdp(model: Any, group: Any, **options: Any) -> Any:
    """fully_shard on the blocks and the rest."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu") if not isinstance(group, DeviceMesh) else group
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, or a copy of a plain tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(
    model: Any, optimizer: Any, group: Any, steps: range = range(NUM_STEPS), share: tuple[int, int] = (0, 0)
) -> Run:
    """share: (index of the part of a batch, number of parts); default: this rank and the group's size."""
    import torch.distributed as dist

    index, count = share if share[1] else (dist.get_rank(group), dist.get_world_size(group))
    dtype = next(model.parameters()).dtype
    losses, norms = [], []
    for step in steps:
        loss = loss_of(model, batch(step, dtype).chunk(count)[index])
        optimizer.zero_grad()
        optimizer.backward(loss)
        optimizer.step()
        mean = loss.detach() / dist.get_world_size(group)
        dist.all_reduce(mean, group=group)
        losses.append(mean)
        norms.append(optimizer.grad_norm)
    return Run(torch.stack(losses), torch.stack(norms), [whole(p) for p in model.parameters()])


def square() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def split(model: Any, mesh: Any, sequence: bool = False) -> Any:
    """Make weights Shard(0), Shard(1) and Replicate; others stay plain. `sequence`: norm gradients are partial sums."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {"up": ColwiseParallel(), "mid": RowwiseParallel()}
    if sequence:
        norm_in = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),))
        plan["up"] = ColwiseParallel(input_layouts=Shard(0))
        for block in model.blocks:
            parallelize_module(block.norm, mesh, norm_in)
            parallelize_module(block.norm, mesh, SequenceParallel(sequence_dim=0, use_local_output=True))
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def build(group: Any, kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model on a mesh, and its optimizer."""
    model = Model(dtype)
    model.first.weight.requires_grad_(False)
    options: dict[str, Any] = {"process_group": group}
    if kind == "fully_shard":
        fsdp(model, group)
    elif kind in ("tensor", "both"):
        mesh = square()
        split(model, mesh["tp"])
        if kind == "both":
            fsdp(model, mesh["dp"])
        options = {}
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, bucket_cap_mb=1e-3, **options)
    return model, optimizer


def contents(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """All weights and state by name, as whole tensors."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param)
        found.update({f"{name}.{key}": value for key, value in optimizer.full_state(param).items()})
        if param.requires_grad:
            found[f"{name}.full_master"] = optimizer.full_master(param)
    return found


class Mpu:
    """DeepSpeed's mpu object for 2 x 2 ranks."""

    def __init__(self) -> None:
        self.data = [dist.new_group(members) for members in ([0, 2], [1, 3])][dist.get_rank() % 2]
        self.model = [dist.new_group(members) for members in ([0, 1], [2, 3])][dist.get_rank() // 2]

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_tensor_model_parallel_group(self) -> Any:
        return self.model
