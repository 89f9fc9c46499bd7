"""What DeepSpeed's scripts send through a pipeline: shapes, tuples, all types of loss, and errors of one stage."""

from __future__ import annotations

import contextlib
import gc
import re
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyzero.deepspeed as deepspeed
from pyzero.deepspeed.pipe import LayerSpec, PipelineModule
from pyzero.deepspeed.pipe.engine import PipelineError
from pyzero.deepspeed.pipe.runner import Buffers

WIDTH, NUM_MICRO = 6, 3
SENDS_INTEGERS = torch.__version__ >= "2.13"
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": NUM_MICRO,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
}


class Layer(nn.Module):
    """A linear layer. before and after: Functions of its inputs and outputs."""

    def __init__(
        self, seed: int, before: Callable[[Any], Any] | None = None, after: Callable[[Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.before, self.after = before, after

    def forward(self, inputs: Any) -> Any:
        outputs = torch.tanh(self.linear(inputs if self.before is None else self.before(inputs)))
        return outputs if self.after is None else self.after(outputs)


def mse(outputs: Any, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, labels)


def batches(num: int, rows: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, WIDTH, generator=draw), torch.randn(rows, WIDTH, generator=draw)) for _ in range(num)]


def initialize(layers: list[Any], loss_fn: Any = mse, num_stages: int = 2, **config: Any) -> Any:
    module = PipelineModule(layers, num_stages=num_stages, loss_fn=loss_fn, partition_method="uniform")
    return deepspeed.initialize(model=module, config={**CONFIG, **config})[0]


def losses_of(engine: Any, data: list[Any], steps: int = 2) -> list[float]:
    iterator = iter(data)
    return [float(engine.train_batch(iterator)) for _ in range(steps)]


def bare(value: Any) -> Tensor:
    """Return the tensor in a tuple of one."""
    assert isinstance(value, tuple) and len(value) == 1
    inner = value[0]
    assert isinstance(inner, Tensor)
    return inner


def one(value: Tensor) -> Any:
    return (value,)


def with_mask(value: Tensor) -> Any:
    return value, value > 0


def kinds(name: str) -> tuple[list[Any], Any]:
    """Return four layers, and a loss function. The name says what is sent in their middle."""
    between: dict[str, tuple[Any, Any]] = {
        "plain": (None, None),
        "a tuple of one": (one, bare),
        "a transposed tensor": (lambda x: x.T, lambda x: x.T),
        "two views": (lambda x: (x[:, :3], x[:, 3:]), lambda pair: torch.cat(pair, 1)),
        "edited in place": (None, lambda x: x.mul_(1.0)),
    }
    after, before = between.get(name, (None, None))
    layers = [Layer(0), Layer(1, after=after), Layer(2, before=before), Layer(3)]
    if name == "a dict from the last layer":
        layers[3].after = lambda x: {"logits": x, "cache": None}
        return layers, lambda outputs, labels: mse(outputs["logits"], labels)
    return layers, mse


def train(group: Any, name: str) -> list[float]:
    engine = initialize(*kinds(name))
    data = batches(3 * NUM_MICRO)
    losses = losses_of(engine, data)
    return [*losses, float(engine.eval_batch(iter(data[2 * NUM_MICRO :])))]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "a tuple of one", marks=pytest.mark.skipif(not SENDS_INTEGERS, reason="this torch sends floats alone")
        ),
        "a transposed tensor",
        "two views",
        "edited in place",
        "a dict from the last layer",
    ],
)
def test_what_layers_give(ranks, name):
    wanted = ranks.run(4, train, "plain")[0]
    for found in ranks.run(4, train, name):
        assert found == pytest.approx(wanted)
    assert wanted[1] < wanted[0]


def integers(group: Any, after: Callable[[Tensor], Any]) -> str:
    engine = initialize([Layer(0), Layer(1, after=after), Layer(2, before=lambda pair: pair[0]), Layer(3)])
    with pytest.raises((TypeError, RuntimeError)) as caught:
        engine.train_batch(iter(batches(NUM_MICRO)))
    return str(caught.value)


@pytest.mark.skipif(SENDS_INTEGERS, reason="torch from 2.13 on sends integers")
@pytest.mark.parametrize("after", [one, with_mask])
def test_integers_between_stages_are_refused_on_all_of_them(ranks, after):
    told = ranks.run(4, integers, after)
    own = [said for said in told if re.search("floating-point tensors between .*got torch.(int8|bool)", said)]
    assert own and all("error on ranks" in said for said in told if said not in own)


def test_buffers_that_nobody_can_write_are_left_alone():
    module = nn.Module()
    module.register_buffer("plain", torch.ones(3))
    module.register_buffer("expanded", torch.ones(1).expand(3))
    with torch.inference_mode():
        module.register_buffer("inferred", torch.ones(3))
    kept = Buffers(module)
    module.plain.add_(1.0)
    kept.restore()
    assert all(torch.equal(buffer, torch.ones(3)) for buffer in module.buffers())


def other_shapes(group: Any, num_stages: int) -> list[float]:
    """Return losses of batches with different shapes. Then a batch of two shapes fails, and the next one succeeds."""
    engine = initialize([Layer(seed) for seed in range(4)], num_stages=num_stages)
    losses = []
    for rows in (2, 1, 5, 2):
        losses.append(float(engine.eval_batch(iter(batches(NUM_MICRO, rows, seed=rows)))))
        losses += losses_of(engine, batches(NUM_MICRO, rows, seed=rows), steps=1)
    if num_stages > 1:
        is_first = engine.is_first_stage()
        error, message = (ValueError, r"\(1, 6\).*drop_last") if is_first else (PipelineError, "data of ranks")
        with pytest.raises(error, match=message):
            engine.train_batch(iter([*batches(NUM_MICRO - 1), *batches(1, rows=1)]))
    return losses + losses_of(engine, batches(NUM_MICRO), steps=1)


def test_a_batch_of_another_shape(ranks):
    wanted = ranks.run(4, other_shapes, 1)[0]
    for found in ranks.run(4, other_shapes, 2):
        assert found == pytest.approx(wanted)


def lists(group: Any) -> list[list[str]]:
    """torch's loaders turn a sample's tuples into lists."""
    seen: list[list[str]] = [[], []]

    def both(kind: int, pair: Any) -> Any:
        seen[kind].append(type(pair).__name__)
        return pair[0] + pair[1]

    engine = initialize(
        [Layer(0, before=lambda pair: both(0, pair)), *(Layer(seed) for seed in range(1, 4))],
        lambda outputs, labels: mse(outputs, both(1, labels)),
    )
    data = [([x, x], [y, y]) for x, y in batches(NUM_MICRO)]
    losses_of(engine, data, steps=1)
    return seen


def test_lists_of_a_loader_arrive_as_tuples(ranks):
    for rank, (inputs, labels) in enumerate(ranks.run(4, lists)):
        assert set(inputs if rank < 2 else labels) == {"tuple"}


def edits(group: Any) -> bool:
    engine = initialize([Layer(0, before=lambda x: x.mul_(0.5)), *(Layer(seed) for seed in range(1, 4))])
    data = batches(NUM_MICRO)
    losses_of(engine, data, steps=1)
    return all(torch.equal(x, y) for (x, _), (y, _) in zip(data, batches(NUM_MICRO), strict=True))


def test_a_layer_edits_no_data_of_the_caller(ranks):
    assert ranks.run(4, edits) == [True] * 4


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return ((outputs - labels) * self.weight).square().mean()


def loss_with_weights(group: Any, folder: str, num_stages: int, saves: bool) -> list[Any]:
    engine = initialize([Layer(seed) for seed in range(4)], Weighted(), num_stages)
    if saves:
        losses_of(engine, batches(2 * NUM_MICRO))
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    return [p.detach().tolist() for name, p in engine.module.named_parameters() if name == "loss_fn.weight"]


def test_a_loss_with_weights_is_the_last_stages(ranks, tmp_path):
    saved = ranks.run(4, loss_with_weights, str(tmp_path), 2, True)
    assert saved[:2] == [[], []] and saved[2] == saved[3] != [[1.0] * WIDTH]
    assert ranks.run(4, loss_with_weights, str(tmp_path), 1, False) == [saved[2]] * 4


class Own(Exception):
    """An error of a layer."""


def alone(group: Any) -> None:
    """In a pipeline of one stage, no rank waits for another."""
    for loss_fn, error, message in (
        (lambda outputs, labels: (mse(outputs, labels), outputs), TypeError, "from loss_fn, got tuple"),
        (lambda outputs, labels: outputs - labels, ValueError, r"from loss_fn, got a tensor of shape \(2, 6\)"),
        (None, ValueError, "from the last layer"),
    ):
        engine = initialize([Layer(0)], loss_fn, num_stages=1)
        with pytest.raises(error, match=f"expected a tensor of one element as the loss {message}"):
            engine.train_batch(iter(batches(NUM_MICRO)))


def test_a_loss_of_several_elements_is_refused(ranks):
    ranks.run(4, alone)


def caught(group: Any, how: str) -> list[bool]:
    """Return whether the locals of frames are still alive after the error is caught."""
    held = []

    def keep() -> Tensor:
        kept = torch.ones(4)
        held.append(weakref.ref(kept))
        return kept

    def fail(value: Any) -> Any:
        kept = keep()  # noqa: F841
        if dist.get_rank() == 2:
            raise KeyError("as planned")
        return value

    def run() -> None:
        kept = keep()  # noqa: F841
        data = map(fail, batches(NUM_MICRO)) if how == "data" else iter(batches(NUM_MICRO))
        with contextlib.suppress(KeyError, RuntimeError):
            (engine.eval_batch if how == "evaluation" else engine.train_batch)(data)
            raise AssertionError

    engine = initialize([Layer(0), Layer(1), Layer(2, after=None if how == "data" else fail), Layer(3)])
    gc.collect()
    gc.disable()
    try:
        run()
        return [ref() is not None for ref in held]
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["data", "training", "evaluation"])
def test_an_error_that_is_caught_keeps_nothing_alive(ranks, how):
    for alive in ranks.run(4, caught, how):
        assert alive and not any(alive)


def failing_constructor(group: Any) -> str:
    class Failing(Layer):
        def __init__(self) -> None:
            if dist.get_rank() == 3:
                raise Own("no memory")
            super().__init__(3)

    try:
        initialize([Layer(0), Layer(1), Layer(2), LayerSpec(Failing)])
    except (Own, PipelineError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_stage_that_cannot_be_built_fails_on_all_ranks(ranks):
    *others, own = ranks.run(4, failing_constructor)
    assert own == "Own: no memory"
    assert others == ["PipelineError: a PipelineModule failed on rank 3: Own: no memory"] * 3


def num_groups(group: Any) -> tuple[list[int], timedelta]:
    counts = []
    for _ in range(3):
        module = PipelineModule([Layer(0), Layer(1)], num_stages=2, partition_method="uniform")
        counts.append(len(dist.distributed_c10d._world.pg_map))
    backend = module.grid.get_pipe_parallel_group()._get_backend(torch.device("cpu"))
    return counts, backend.options._timeout


def test_modules_of_one_topology_share_process_groups(ranks):
    for counts, timeout in ranks.run(4, num_groups):
        assert counts[1] == counts[2] == counts[0]
        assert timeout == timedelta(seconds=60)  # the default group's


def monitored(group: Any, folder: str) -> float:
    section = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = initialize([Layer(0), Layer(1)], csv_monitor=section)
    losses_of(engine, batches(NUM_MICRO), steps=1)
    return float(engine.eval_batch(iter(batches(NUM_MICRO))))


def test_an_evaluation_is_written_to_the_monitors(ranks, tmp_path):
    loss = ranks.run(4, monitored, str(tmp_path))[0]
    lines = (tmp_path / "job" / "Train_Samples_eval_loss.csv").read_text().split()
    assert lines[0] == "step,eval_loss" and lines[1].startswith("12,")
    assert float(lines[1].partition(",")[2]) == pytest.approx(loss)


def names(group: Any, num_stages: int) -> tuple[int, bool, float, float]:
    engine = initialize([Layer(seed) for seed in range(4)], num_stages=num_stages)
    assert engine.agg_train_loss is None
    loss = float(engine.train_batch(iter(batches(NUM_MICRO))))
    return engine.micro_batches, engine.is_pipe_parallel, float(engine.agg_train_loss), loss


@pytest.mark.parametrize("num_stages", [1, 2])
def test_names_of_a_pipeline(ranks, num_stages):
    for num_micro, is_parallel, kept, loss in ranks.run(4, names, num_stages):
        assert (num_micro, is_parallel, kept) == (NUM_MICRO, num_stages > 1, loss)
