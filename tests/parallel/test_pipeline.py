"""torch.distributed.pipelining with ZeRO: stages on the columns of a mesh, replicas on its rows."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from resume import assert_equal
from tolerances import ADAM, UNIT
from torch import Tensor, nn
from torch.distributed import pipelining

import pyzero
from pyzero.checkpoint.files import CheckpointError

WIDTH, ROWS, MICRO_BATCHES, STAGES, STEPS = 12, 16, 4, 2, 50
OPTIONS: dict[str, Any] = {"lr": 2.0**-7, "weight_decay": 0.125}
MAX_NORM = 2.0**-4
FP32 = UNIT[torch.float32]


def build() -> nn.Sequential:
    """Make four layers of different sizes."""
    torch.manual_seed(1)
    sizes = (WIDTH, 17, 7, 23, WIDTH)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:], strict=False)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, WIDTH, generator=generator)
    return inputs, inputs.flip(1).tanh()


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


_meshes: dict[int, Any] = {}


def groups(group: Any) -> tuple[Any, Any, int, int]:
    """Return (replicas of this rank's stage, its pipeline, replica, stage): one pipeline on 2 ranks, or two on 4."""
    size, rank = dist.get_world_size(group), dist.get_rank()
    replica, stage = divmod(rank, STAGES)
    if size not in _meshes:
        alone = dist.new_group([rank], use_local_synchronization=True)
        columns, rows = [alone, alone], [group]
        if size == 4:
            columns, rows = [[dist.new_group(m) for m in mesh] for mesh in ([[0, 2], [1, 3]], [[0, 1], [2, 3]])]
        _meshes[size] = columns[stage], rows[replica]
    return *_meshes[size], replica, stage


class Pipeline:
    """This rank's layers, optimizer and schedule."""

    def __init__(self, group: Any, schedule: str = "Schedule1F1B", scale_grads: bool = False, **options: Any) -> None:
        self.dp, self.pp, self.replica, self.column = groups(group)
        self.num_replicas = dist.get_world_size(self.dp)
        indices = {"ScheduleInterleavedZeroBubble": [0, 2], "ScheduleInterleaved1F1B": [0, 2]}.get(schedule, [0])
        indices = [index + self.column for index in indices]
        num_stages = STAGES * len(indices)
        self.model = build()
        parts = [list(part) for part in torch.arange(4).chunk(num_stages)]
        held = {int(layer) for index in indices for layer in parts[index]}
        modules = [self.model[int(parts[index][0]) : int(parts[index][-1]) + 1] for index in indices]
        for layer in set(range(4)) - held:
            self.model[layer] = nn.Identity()
        for param in self.model.parameters():
            param.model_parallel = True
        self.optimizer = pyzero.FusedZeroAdamW(
            self.model.parameters(),
            **{**OPTIONS, **options},
            process_group=self.dp,
            model_parallel_group=self.pp,
        )
        stages = [
            pipelining.PipelineStage(module, index, num_stages, torch.device("cpu"), group=self.pp)
            for module, index in zip(modules, indices, strict=True)
        ]
        self.has_first, self.has_last = any(s.is_first for s in stages), any(s.is_last for s in stages)
        factor = 1 if scale_grads else 1 / MICRO_BATCHES
        self.schedule = getattr(pipelining, schedule)(
            stages if len(stages) > 1 else stages[0],
            MICRO_BATCHES,
            loss_fn=lambda outputs, targets: self.optimizer.scale(loss_of(outputs, targets) * factor),
            scale_grads=scale_grads,
        )

    def backward(self, step: int) -> None:
        inputs, targets = (whole.tensor_split(self.num_replicas)[self.replica] for whole in batch(step))
        with self.optimizer.scaled_gradients():
            self.schedule.step(
                *((inputs,) if self.has_first else ()), target=targets if self.has_last else None, return_outputs=False
            )

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}


def train(group: Any, steps: int, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    pipeline, norms = Pipeline(group, **options), []
    for step in range(steps):
        pipeline.step(step)
        norms.append(float(pipeline.optimizer.grad_norm))
    return pipeline.weights(), norms


@functools.cache
def alone() -> tuple[dict[str, Tensor], list[float]]:
    """Train in one process with torch's AdamW and clip_grad_norm_."""
    model, norms = build(), []
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        loss_of(model(inputs), targets).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}, norms


def tolerance(wanted: dict[str, Tensor]) -> float:
    """Return the tolerance between two runs in fp32."""
    magnitude = max(float(value.abs().max()) for value in wanted.values())
    decay = 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
    return 2**0.5 * ADAM[torch.float32].master(STEPS, magnitude, OPTIONS["lr"], 0.999, decay)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_follows_one_process(ranks, size, stage):
    wanted, wanted_norms = alone()
    assert max(wanted_norms) > 2 * MAX_NORM  # it clips
    found: dict[str, Tensor] = {}
    for weights, norms in ranks.run(size, functools.partial(train, stage=stage, max_grad_norm=MAX_NORM), STEPS):
        found |= weights
        # A gradient is a sum over rows, here in another order. Its norm has at most the largest error of its elements.
        assert norms[0] == pytest.approx(wanted_norms[0], rel=ROWS * FP32)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance(wanted)), name


@pytest.mark.parametrize(
    "options",
    [
        {"scale_grads": True},
        {"loss_scale": 2.0**10},
        {"schedule": "ScheduleGPipe"},
        {"schedule": "ScheduleInterleaved1F1B"},
        {"schedule": "ScheduleInterleavedZeroBubble"},
    ],
    ids=lambda options: next(iter(options.items()))[-1],
)
def test_bits_do_not_depend_on_how(ranks, options):
    """Powers of two scale exactly. Every schedule adds a stage's micro-batches in the same order."""
    size = 2 if "ZeroBubble" in options.get("schedule", "") else 4  # see test_split_backward
    assert plain(ranks, size, {}) == plain(ranks, size, options)


_plain: dict[Any, Any] = {}


def plain(ranks: Any, size: int, options: dict[str, Any]) -> Any:
    key = size, *options.items()
    if key not in _plain:
        merged: dict[str, Any] = {}
        for weights, norms in ranks.run(size, functools.partial(train, max_grad_norm=MAX_NORM, **options), 4):
            merged |= {name: value.tolist() for name, value in weights.items()}
            merged.setdefault("norms", norms)
        _plain[key] = merged
    return _plain[key]


def bad_gradient(group: Any) -> list[Any]:
    """Take one step per rank, with an inf on that rank."""
    pipeline, found = Pipeline(group, loss_scale=pyzero.LossScale(init_scale=2.0**10)), []
    victim = next(pipeline.model.parameters())
    for step in range(dist.get_world_size(group)):
        before = pipeline.weights()
        handle = victim.register_hook(lambda grad: grad * float("inf")) if dist.get_rank(group) == step else None
        pipeline.step(step)
        if handle is not None:
            handle.remove()
        skipped = not pipeline.optimizer.was_step_applied
        is_same = all(torch.equal(value, before[name]) for name, value in pipeline.weights().items())
        found.append((skipped, is_same, pipeline.optimizer.loss_scale))
    pipeline.step(step + 1)
    return [*found, pipeline.optimizer.was_step_applied]


def test_one_ranks_inf_skips_everywhere(ranks):
    for result in ranks.run(4, bad_gradient):
        assert result == [(True, True, 2.0**9), (True, True, 2.0**8), (True, True, 2.0**7), (True, True, 2.0**6), True]


def clipped(group: Any) -> tuple[float, float, dict[str, Tensor]]:
    pipeline = Pipeline(group, loss_scale=2.0**10)
    pipeline.backward(0)
    norms = [float(pipeline.optimizer.clip_grad_norm_(MAX_NORM, norm_type)) for norm_type in (3.0, 2.0)]
    grads = {name: pipeline.optimizer.full_grad(p) for name, p in pipeline.model.named_parameters()}
    return *norms, grads


def test_clips_as_torch(ranks):
    model = build()
    inputs, targets = batch(0)
    loss_of(model(inputs), targets).backward()
    wanted = [float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, norm_type)) for norm_type in (3.0, 2.0)]
    grads: dict[str, Tensor] = {}
    for cube, square, mine in ranks.run(4, clipped):
        assert [cube, square] == pytest.approx(wanted, rel=ROWS * FP32)
        grads |= mine
    for name, param in model.named_parameters():
        assert torch.allclose(grads[name], param.grad, rtol=0, atol=ROWS * FP32 * float(param.grad.abs().max())), name


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return whole masters and moments by name."""
    return {
        f"{name}.{key}": value
        for name, param in model.named_parameters()
        for key, value in {"master": optimizer.full_master(param), **optimizer.full_state(param)}.items()
    }


def save(group: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state at step 3, where it is saved, and three steps later."""
    pipeline = Pipeline(group, loss_scale=2.0**10)
    for step in range(3):
        pipeline.step(step)
    pyzero.save_checkpoint(folder, model=pipeline.model, optimizer=pipeline.optimizer, step=3, rank=dist.get_rank())
    saved = state_of(pipeline.model, pipeline.optimizer)
    for step in range(3, 6):
        pipeline.step(step)
    return saved, state_of(pipeline.model, pipeline.optimizer)


def resume(group: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    pipeline = Pipeline(group, lr=1.0)
    loaded = pyzero.load_checkpoint(folder, model=pipeline.model, optimizer=pipeline.optimizer)
    assert loaded["step"] == 3 and pipeline.optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    found = state_of(pipeline.model, pipeline.optimizer)
    for step in range(3, 6):
        pipeline.step(step)
    return found, state_of(pipeline.model, pipeline.optimizer), loaded["rank"]


def merged(parts: Any) -> dict[str, Tensor]:
    return functools.reduce(lambda all_of, part: all_of | part, parts, {})


def test_checkpoint_resumes_on_other_meshes(ranks, tmp_path):
    saved, later = (merged(parts) for parts in zip(*ranks.run(4, save, tmp_path), strict=True))
    for size in (4, 2):
        found, after, own = zip(*ranks.run(size, resume, tmp_path), strict=True)
        assert_equal(merged(found), {name: saved[name] for name in merged(found)})
        assert merged(found).keys() == saved.keys()
        if size == 4:
            assert_equal(merged(after), later)
            assert own == (0, 1, 2, 3)
    model = build()
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), **OPTIONS)
    assert pyzero.load_checkpoint(tmp_path, model=model, optimizer=optimizer)["step"] == 3
    assert_equal(state_of(model, optimizer), {name: saved[name] for name in state_of(model, optimizer)})

    pyzero.save_checkpoint(tmp_path / "alone", model=model, optimizer=optimizer, step=3, rank=0)
    found, after, _ = zip(*ranks.run(4, resume, tmp_path / "alone"), strict=True)
    assert_equal(merged(found), saved)
    assert_equal(merged(after), later)


def save_with_names_that_clash(group: Any, folder: Path) -> list[str]:
    """Each stage calls its first layer "0".

    A checkpoint of the whole model has names that no stage has.
    """
    pipeline, messages = Pipeline(group), []
    held = nn.Sequential(*(layer for layer in pipeline.model if not isinstance(layer, nn.Identity)))
    other = build()
    other.add_module("more", nn.Linear(2, 2))
    if dist.get_rank() == 0:
        pyzero.save_checkpoint(folder, model=other, optimizer=alone_over(other), step=0)
    dist.barrier(group)
    for act in (
        lambda: pyzero.save_checkpoint(folder / "no", model=held, optimizer=pipeline.optimizer, step=1),
        lambda: pyzero.load_checkpoint(folder, model=pipeline.model, optimizer=pipeline.optimizer),
    ):
        with pytest.raises((ValueError, CheckpointError)) as caught:
            act()
        messages.append(str(caught.value))
    return messages


def alone_over(model: nn.Module) -> Any:
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return pyzero.FusedZeroAdamW(model.parameters(), process_group=group)


def test_names_tell_stages_apart(ranks, tmp_path):
    for clash, unexpected in ranks.run(4, save_with_names_that_clash, tmp_path):
        assert "got 0.0.weight on ranks 0 and 1 of model_parallel_group" in clash
        assert "unexpected: " in unexpected and "more.bias" in unexpected and "0.0.weight" not in unexpected


# ---- zero-bubble schedules ------------------------------------------------------------------------------------------


def split_backward(group: Any, stage: int) -> list[str]:
    """Assign and add to `.grad` without hooks, as torch's split backward does."""
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    weight = second.weight
    options = {"lr": 1.0, "stage": stage, "process_group": group}
    optimizer = pyzero.FusedZeroAdamW([first.weight, weight], loss_scale=8.0, **options)
    grad = torch.full((3, 3), 1.0 + dist.get_rank(group))
    weight.grad = grad.clone()
    weight.grad += grad
    whole = optimizer.full_grad(weight)
    assert whole is not None and torch.equal(whole, torch.full((3, 3), 3.0))  # the mean of 2 and 4
    messages = []
    optimizer.zero_grad()
    with pytest.raises(RuntimeError) as caught, optimizer.scaled_gradients():
        weight.grad = grad.clone()
    messages.append(str(caught.value))
    optimizer.zero_grad()
    optimizer.backward(first(torch.ones(1, 3)).sum())
    with pytest.raises(RuntimeError) as caught:  # a whole backward sets the gradients of all parameters
        weight.grad += grad
    return [*messages, str(caught.value)]


@pytest.mark.parametrize("stage", [1, 2])
def test_split_backward(ranks, stage):
    """If all micro-batches do it, gradients are summed.

    Mixed with whole backwards, or with a loss scale, it is refused.
    """
    for scaled, mixed in ranks.run(2, split_backward, stage):
        assert "zero-bubble schedules" in scaled and "got add_ of a .grad" in mixed
