"""pyzero.deepspeed.pipe: DeepSpeed's pipeline scripts on torch's schedules, against the same layers in one process."""

import functools
import itertools
import time
from collections.abc import Iterator
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
import pyzero.deepspeed as deepspeed
from pyzero.deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from pyzero.deepspeed.pipe.engine import PipelineError
from pyzero.deepspeed.pipe.layers import balance, partition
from pyzero.deepspeed.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology

WIDTH, WORDS, MICRO_ROWS, ACCUMULATION, STEPS = 12, 11, 2, 3, 50
RATE, DECAY = 2.0**-7, 0.125
SENDS_INTEGERS = torch.__version__ >= "2.13"  # before, all sent tensors have gradients
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": MICRO_ROWS,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": 0.25,
    "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": DECAY}},
    "zero_optimization": {"stage": 1},
}


class Blend(nn.Module):
    """Maps a tuple to a tuple. The mask in it has no gradient. A buffer counts calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Any) -> Any:
        x, mask = inputs
        self.calls += 1
        return x + torch.tanh(self.linear(x)) * mask.unsqueeze(-1), mask


def embed(module: nn.Module, tokens: Any) -> Any:
    x = module(tokens)
    return x, (tokens % 3 > 0).to(torch.int64 if SENDS_INTEGERS else x.dtype)


def logits(module: Any, inputs: Any) -> Tensor:
    x, mask = inputs
    return x @ module.weight.T + (0 if SENDS_INTEGERS else 0 * mask.sum())


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float().flatten(0, 1), labels.flatten())


def specs(num_blocks: int = 4) -> list[Any]:
    """Return layers with a tied embedding at both ends."""
    tied = functools.partial(TiedLayerSpec, "embedding", nn.Embedding, WORDS, WIDTH)
    return [tied(forward_fn=embed), *(LayerSpec(Blend, WIDTH) for _ in range(num_blocks)), tied(forward_fn=logits)]


class Alone(nn.Module):
    """The same layers in one process, with the same names."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1234)
        self.tied_modules = nn.ModuleDict({"embedding": nn.Embedding(WORDS, WIDTH)})
        for index in range(1, num_blocks + 1):
            torch.manual_seed(1234 + index)
            self.add_module(str(index), Blend(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        embedding = self.tied_modules["embedding"]
        value = embed(embedding, tokens)
        for name, module in self.named_children():
            value = value if name == "tied_modules" else module(value)
        return logits(embedding, value)


def micro_batches(replica: int, num_replicas: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one replica's share of the micro-batches, which are the same for any number of replicas."""
    step = first
    while True:
        for index in range(ACCUMULATION):
            for at in range(replica * 4 // num_replicas, (replica + 1) * 4 // num_replicas):
                number = (step * ACCUMULATION + index) * 4 + at
                tokens = torch.randint(WORDS, (MICRO_ROWS, 6), generator=torch.Generator().manual_seed(number))
                yield tokens[:, :-1], tokens[:, 1:]
        step += 1


def initialize(num_stages: int, num_blocks: int = 4, **options: Any) -> Any:
    """Make an engine over all ranks. A step has 12 micro-batches, divided over the replicas."""
    replicas = dist.get_world_size() // num_stages if dist.is_initialized() else 1
    module = PipelineModule(
        specs(num_blocks),
        num_stages=num_stages,
        loss_fn=loss_of,
        seed_layers=True,
        partition_method="uniform",
        **options.pop("module", {}),
    )
    config = {**CONFIG, "gradient_accumulation_steps": ACCUMULATION * 4 // replicas, **options}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine


def data_of(engine: Any, first: int = 0) -> Any:
    if not (engine.is_first_stage() or engine.is_last_stage()):
        return None
    return micro_batches(engine.dp_rank, engine.dp_world_size, first)


def weights_of(engine: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def train(group: Any, num_stages: int, **options: Any) -> tuple[dict[str, Tensor], list[float], list[float], list[int]]:
    engine = initialize(num_stages, **options)
    data, losses, norms = data_of(engine), [], []
    for _ in range(STEPS):
        losses.append(float(engine.train_batch(data)))
        norms.append(engine.get_global_grad_norm())
    calls = [int(module.calls) for module in engine.module.modules() if isinstance(module, Blend)]
    return weights_of(engine), losses, norms, calls


@functools.cache
def alone() -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Train with torch's AdamW and clip_grad_norm_, one batch per step."""
    model, data, losses, norms = Alone(), micro_batches(0, 1), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        tokens, labels = (torch.cat(part) for part in zip(*(next(data) for _ in range(12)), strict=True))
        loss = loss_of(model(tokens), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CONFIG["gradient_clipping"])))
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}, losses, norms


@pytest.mark.parametrize(
    ("num_stages", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"zero_optimization": {"stage": 2}}),
        (2, {"module": {"activation_checkpoint_interval": 2}}),
        (4, {}),
    ],
    ids=str,
)
def test_follows_one_process(ranks, num_stages, options):
    wanted, wanted_losses, wanted_norms = alone()
    assert max(wanted_norms) > 2 * CONFIG["gradient_clipping"] and wanted_losses[-1] < 0.9 * wanted_losses[0]
    magnitude = max(float(value.abs().max()) for value in wanted.values())
    off = 2**0.5 * ADAM[torch.float32].master(STEPS, magnitude, RATE, 0.999, 1 - RATE * DECAY)
    num_terms = 12 * MICRO_ROWS * 5
    embeddings = []
    for found, losses, norms, calls in ranks.run(4, functools.partial(train, **options), num_stages):
        assert losses[0] == pytest.approx(wanted_losses[0], rel=num_terms * UNIT[torch.float32])
        assert norms[0] == pytest.approx(wanted_norms[0], rel=num_terms * UNIT[torch.float32])
        assert losses == pytest.approx(wanted_losses, rel=1e-4)  # a hundredth of what a step changes
        for name, value in found.items():
            assert torch.allclose(value, wanted[name], rtol=0, atol=off), name
        num_micro = STEPS * ACCUMULATION * 4 // (4 // num_stages)
        assert calls == [num_micro * (2 if "module" in options else 1)] * len(calls)
        embeddings += [value for name, value in found.items() if "embedding" in name]
    assert len(embeddings) == (4 if num_stages < 4 else 2) and all(torch.equal(e, embeddings[0]) for e in embeddings)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def state_of(engine: Any) -> dict[str, Tensor]:
    """Return masters and moments by name."""
    return {
        f"{name}.{key}": value
        for name, param in engine.module.named_parameters()
        for key, value in {"m": engine.optimizer.full_master(param), **engine.optimizer.full_state(param)}.items()
    }


def save(group: Any, folder: Path) -> dict[str, Tensor]:
    engine = initialize(2, bf16={"enabled": True})
    data = data_of(engine)
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(folder, client_state={"rank": dist.get_rank()})
    with pytest.raises(PipelineError, match="save_checkpoint"):
        engine.save_16bit_model(folder)
    return state_of(engine)


def resume(group: Any, folder: Path, num_stages: int) -> tuple[dict[str, Tensor], int, float]:
    engine = initialize(num_stages, bf16={"enabled": True})
    _, client = engine.load_checkpoint(folder)
    found = state_of(engine)
    assert client is not None and client["rank"] == dist.get_rank()
    return found, engine.global_steps, float(engine.eval_batch(data_of(engine, first=3)))


def test_checkpoints_resume_on_other_stages(ranks, tmp_path):
    saved: dict[str, Tensor] = functools.reduce(lambda a, b: a | b, ranks.run(4, save, tmp_path), {})
    losses = []
    for num_stages in (2, 4, 1):
        for found, steps, loss in ranks.run(4, resume, tmp_path, num_stages):
            assert_equal(found, {name: saved[name] for name in found})
            assert steps == 3
            losses.append(loss)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2.0**-8)  # a step of bf16
    model = Alone().bfloat16()
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    assert pyzero.load_checkpoint(tmp_path / "global_step3", model=model, optimizer=optimizer)["step"] == 3
    for name, param in model.named_parameters():
        assert torch.equal(optimizer.full_master(param), saved[f"{name}.m"])


# ---- the engine -----------------------------------------------------------------------------------------------------


def fp16_overflow(group: Any) -> tuple[list[bool], float, list[float]]:
    """One rank of the last stage has an inf in the second of three steps."""
    scale = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    engine = initialize(2, fp16=scale, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    data, applied, rates = data_of(engine), [], []
    for step in range(3):
        victim = next(engine.module.parameters()) if step == 1 and dist.get_rank() == 3 else None
        handle = None if victim is None else victim.register_hook(lambda grad: grad * float("inf"))
        engine.train_batch(data)
        if handle is not None:
            handle.remove()
        applied.append(engine.was_step_applied())
        rates += engine.get_lr()
    return applied, engine.cur_scale, rates


def test_fp16_skips_on_all_stages(ranks):
    results = ranks.run(4, fp16_overflow)
    assert all(result == results[0] for result in results)
    applied, scale, rates = results[0]
    assert applied == [True, False, True] and scale == 2.0**7 and rates[0] == rates[1] < rates[2]


def engine_names(group: Any) -> None:
    engine = initialize(2)
    stage, replica = divmod(dist.get_rank(), 2)  # DeepSpeed's order of ranks
    assert (engine.stage_id, engine.grid.get_data_parallel_rank(), engine.dp_rank) == (stage, replica, replica)
    assert (engine.is_first_stage(), engine.is_last_stage()) == (stage == 0, stage == 1)
    assert engine.train_batch_size() == 24 and engine.gradient_accumulation_steps() == 6
    assert engine.module.partitions() == [0, 3, 6] and engine.grid.stage_to_global(1) == 2 + replica
    grid = engine.grid
    assert (grid.get_model_parallel_rank(), grid.get_model_parallel_world_size()) == (stage, 2)  # as DeepSpeed's
    assert (grid.get_slice_parallel_rank(), grid.get_tensor_model_parallel_world_size()) == (0, 1)
    assert grid.get_data_parallel_group_ranks() == [2 * stage, 2 * stage + 1] and grid.is_last_stage == (stage == 1)
    assert grid.topology().get_rank_repr(dist.get_rank(), omit_axes=[]) == f"pipe_0{stage}-data_0{replica}"
    for name in ("forward", "backward", "step"):
        with pytest.raises(PipelineError, match=r"train_batch\(\)"):
            getattr(engine, name)()
    with pytest.raises(ValueError, match="set_dataloader"):
        engine.train_batch()
    with pytest.raises(ValueError, match="return_logits"):
        engine.eval_batch(None, return_logits=True)
    engine.set_batch_fn(lambda batch: (batch["x"], batch["y"]))
    engine.set_dataloader([{"x": x, "y": y} for (x, y), _ in zip(data_of(engine), range(9), strict=False)])
    engine.train_batch()
    engine.set_train_batch_size(8)  # two micro-batches: 1F1B still
    engine.train_batch()
    engine.set_train_batch_size(4)  # one, fewer than stages: GPipe
    assert engine.train_batch() > 0
    with pytest.raises(StopIteration):
        engine.train_batch()
    assert engine.global_steps == 3 and engine.global_samples == 24 + 8 + 4 and engine.micro_steps == 9
    assert engine.eval_batch(iter([{"x": x, "y": y} for (x, y), _ in zip(data_of(engine), range(2), strict=False)])) > 0


def test_engine(ranks):
    ranks.run(4, engine_names)


def ends(group: Any, num_stages: int, how: str) -> tuple[str, float]:
    """The data of one replica end on its first and last stage.

    Return how that batch ends, and the loss of the next one.
    """
    engine = initialize(num_stages)
    data = list(itertools.islice(data_of(engine) or (), 24))
    is_short = data and engine.dp_rank == 0
    short: Any = iter(data[:3]) if is_short else iter(data)
    if is_short and how == "error":
        short = (data[at] if at < 2 else {"no": "pair"} for at in range(20))
    try:
        engine.train_batch(short)
        said = "nothing"
    except (StopIteration, RuntimeError, ValueError) as error:
        said = type(error).__name__
    return said, float(engine.train_batch(iter(data)))


@pytest.mark.parametrize("how", ["end", "error"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_data_that_end_on_some_ranks_end_on_all(ranks, num_stages, how):
    results = ranks.run(4, ends, num_stages, how)
    own = "StopIteration" if how == "end" else "ValueError"
    told = "StopIteration" if how == "end" else "PipelineError"
    assert {said for said, _ in results} == {own, told}
    assert len({loss for _, loss in results}) == 1 and results[0][1] > 0


def refusals(group: Any) -> None:
    for message, build in (
        ("num_stages or topology", lambda: PipelineModule(specs())),
        ("a topology of the 4 ranks", lambda: PipelineModule(specs(), num_stages=3)),
        ("dynamic_shape", lambda: PipelineModule(specs(), num_stages=2, dynamic_shape=True)),
        ("{'model': 2}", lambda: PipelineModule(specs(), topology=PipeModelDataParallelTopology(1, 2, 2))),
        ("a layer for each stage", lambda: PipelineModule([nn.Tanh(), nn.Tanh()], num_stages=4)),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    bare = [nn.Tanh(), *(nn.Linear(2, 2) for _ in range(3))]
    own, told = (ValueError, "expected trained"), (PipelineError, "rank 0: ValueError: expected trained")
    error, message = own if dist.get_rank() == 0 else told
    with pytest.raises(error, match=f"{message} parameters .* got none in layers 0 to 0 of stage 0"):
        PipelineModule(bare, num_stages=4, partition_method="uniform")
    module = PipelineModule(specs(), num_stages=2)
    lone = pyzero.FusedZeroAdamW(module.parameters(), process_group=module.mpu().get_data_parallel_group())
    model = PipelineModule(specs(), num_stages=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for options, name in (({"mesh": mesh}, "mesh"), ({"mpu": object()}, "mpu")):
        with pytest.raises(ValueError, match=f"got {name} with a PipelineModule.*leave it out"):
            pyzero.initialize(model=model, config=CONFIG, **options)
    with pytest.raises(ValueError, match="get_pipe_parallel_group"):
        deepspeed.initialize(model=module, optimizer=lone, config={"train_batch_size": 8})
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layer 0 on stage 0 and in layer 2 on stage 1; build both as TiedLayerSpec"):
        PipelineModule([shared, nn.Tanh(), shared], num_stages=2, partition_method="type:Linear")


def test_refusals(ranks):
    ranks.run(4, refusals)
    with pytest.raises(TypeError, match="a class of"):
        LayerSpec(torch.tanh)  # type: ignore[arg-type]


def older_torch(group: Any) -> None:
    class ScheduleGPipe:
        def __init__(self, stage: Any, n_microbatches: int, loss_fn: Any = None) -> None:
            raise AssertionError

    engine = initialize(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelining, "ScheduleGPipe", ScheduleGPipe)
        with pytest.raises(RuntimeError, match="take scale_grads .*install torch 2.11 or newer, or take num_stages=1"):
            engine.train_batch(data_of(engine))


def test_a_torch_whose_pipelines_scale_gradients_is_refused(ranks):
    ranks.run(4, older_torch)


# ---- where layers go ------------------------------------------------------------------------------------------------


def test_partition():
    layers = [
        LayerSpec(nn.Embedding, 100, 10),
        nn.Tanh(),
        nn.Linear(10, 10),
        torch.tanh,
        LayerSpec(nn.Linear, 10, 10),
        nn.Linear(10, 10),
    ]
    state = torch.get_rng_state()
    assert partition(layers, 4, "uniform") == [0, 2, 4, 5, 6]
    assert partition(layers, 2, "parameters") == [0, 1, 6]
    assert partition(layers, 3, "type:linear") == [0, 3, 5, 6]
    assert torch.equal(torch.get_rng_state(), state)
    for method in ("profile", "type:", "type:Conv"):
        with pytest.raises(ValueError, match="partition_method"):
            partition(layers, 2, method)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_balance_is_as_light_as_can_be(num_parts):
    from itertools import combinations

    weights = [5, 0, 3, 9, 1, 1, 4]
    bounds = balance(weights, num_parts)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and len(bounds) == num_parts + 1

    def heaviest(cuts: Any) -> int:
        return max(sum(weights[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))

    every = (heaviest([0, *cuts, len(weights)]) for cuts in combinations(range(1, len(weights)), num_parts - 1))
    assert heaviest(bounds) == min(every)


def test_topology():
    topology = PipeDataParallelTopology(num_pp=2, num_dp=3)
    assert [topology.get_coord(rank) for rank in (0, 2, 4)] == [(0, 0), (0, 2), (1, 1)]
    assert topology.get_rank(pipe=1, data=2) == 5
    assert topology.get_axis_comm_lists("pipe") == [[0, 3], [1, 4], [2, 5]]
    assert topology.get_axis_list("data", 1) == [1, 4]
    assert (topology.get_dim("pipe"), topology.get_dim("model"), topology.world_size()) == (2, 0, 6)


# ---- errors ---------------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """A layer that fails in the calls with these numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.calls, self.fails_in = nn.Linear(width, width), 0, ()
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls in self.fails_in:
            raise KeyError("as planned")
        self.mean = self.mean / 2 + x.detach().mean(0) / 2
        return torch.tanh(self.norm(self.linear(x)))


def layer_fails(
    group: Any, stage: int, call: int, how: str, num_stages: int = 4, ties: bool = False, **sections: Any
) -> tuple[list[str], float, list[float]]:
    """A layer fails on one stage, or the loss. Return this rank's messages, seconds, and losses of other batches.

    call: Which of the layer's calls in the batch fails. If 100 is added, a whole batch runs before.
    """
    torch.manual_seed(0)
    layers: list[Any] = [LayerSpec(Failing, WIDTH) for _ in range(4)]
    if ties:
        layers[0] = layers[3] = TiedLayerSpec("ends", nn.Linear, WIDTH, WIDTH)
    model = PipelineModule(
        layers, num_stages=num_stages, loss_fn=lambda y, x: fail_in_loss(y, x), partition_method="uniform"
    )
    config = {**CONFIG, **sections}
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    is_victim = engine.stage_id == stage and engine.dp_rank == 0
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(MICRO_ROWS, WIDTH, generator=generator) for _ in range(4 * ACCUMULATION)]
    losses = []

    def fail_in_loss(y: Tensor, x: Tensor) -> Tensor:
        if how == "loss" and is_victim and not said:
            raise KeyError("as planned")
        return (y - x).square().mean()

    said: list[str] = ["none yet"]
    data = iter([(one, one) for one in x])
    data = data if engine.is_first_stage() or engine.is_last_stage() else None
    run = engine.eval_batch if how == "eval" else engine.train_batch
    if call > 100:  # once shapes are known
        losses.append(float(run(data)))
    said.clear()
    layer = next(module for module in engine.module.modules() if isinstance(module, Failing))
    layer.fails_in = (layer.calls + call % 100,) if is_victim and how != "loss" else ()
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    begin = time.monotonic()
    try:
        run(data)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    took = time.monotonic() - begin
    after = engine.module.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []
    losses.append(float(run(data)))
    return said, took, losses


@pytest.mark.parametrize(
    ("stage", "call", "how"),
    [
        *((stage, call, "train") for stage in (0, 1, 3) for call in (1, 3, 102)),
        *((stage, call, "eval") for stage in (0, 3) for call in (1, 102)),
        *((3, call, "loss") for call in (1, 101)),
    ],
)
def test_a_layer_that_fails_is_told_of_on_all_stages(ranks, stage, call, how):
    results = ranks.run(4, layer_fails, stage, call, how)
    for at, ((said,), took, _) in enumerate(results):
        told = "PipelineError: got an error in the layers of another rank" if how == "eval" else f"on ranks [{stage}]"
        assert "KeyError: 'as planned'" in said if at == stage else told in said
        assert took < 4.0
    assert len({tuple(losses) for _, _, losses in results}) == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_so_it_is_where_layers_are_tied(ranks, stage):
    results = ranks.run(4, functools.partial(layer_fails, num_stages=2, ties=True), stage, 1, "train")
    for at, ((said,), took, _) in enumerate(results):
        told = "expected every rank to finish sum_tied_grads"
        assert "KeyError: 'as planned'" in said if at == 2 * stage else told in said
        assert took < 4.0
    assert len({tuple(losses) for _, _, losses in results}) == 1


@pytest.mark.parametrize("call", [1, 102])
@pytest.mark.parametrize("stage", [1, 2])
def test_so_are_their_replicas(ranks, stage, call):
    sections = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, "initial_scale_power": 8}}
    results = ranks.run(4, functools.partial(layer_fails, num_stages=2, **sections), 1, call, "train")
    for at, ((said,), took, _) in enumerate(results):
        assert "KeyError: 'as planned'" in said if at == 2 else "expected every rank to finish step" in said
        assert took < 4.0
    assert len({tuple(losses) for _, _, losses in results}) == 1


class Numbered(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Each row is filled with its index."""

    def __len__(self) -> int:
        return 4 * MICRO_ROWS * ACCUMULATION

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((WIDTH,), float(index)), torch.zeros(WIDTH)


def first_rows(group: Any) -> list[float]:
    """Return the indices of the samples in the first batch."""
    seen: list[float] = []
    model = PipelineModule([nn.Linear(WIDTH, WIDTH)], num_stages=1, loss_fn=lambda y, x: (y - x).square().mean())
    engine, *_ = deepspeed.initialize(
        model=model, config=CONFIG, model_parameters=model.parameters(), training_data=Numbered()
    )
    engine.module.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:, 0].tolist()))
    engine.train_batch()
    return seen


def test_training_data_is_not_shuffled(ranks):
    for rank, seen in enumerate(ranks.run(4, first_rows)):
        assert seen == [float(4 * number + rank) for number in range(MICRO_ROWS * ACCUMULATION)]
