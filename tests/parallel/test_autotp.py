"""The config's tensor_parallel: transformers' models, split by their own plan, train as in one process."""

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any

import parallel_case as case
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import pyzero
import pyzero.deepspeed as deepspeed
from pyzero.deepspeed import comm, utils
from pyzero.deepspeed.parallel import groups
from pyzero.sharding.local_param import is_dtensor, whole_of
from pyzero.sharding.mesh_grad import make_norms_plain

STEPS = 10
EXTRA = 3  # on another number of ranks
LR = 3e-3
EPS = 1e-5  # with 1e-8, a gradient that is 0 except for rounding would move its weight
MAX_NORM = 0.5
ROWS, LENGTH, VOCAB = 8, 12, 61  # which 2 does not divide


def make(kind: str, dtype: torch.dtype = torch.float32, num_kv_heads: int = 2) -> Any:
    """Make a Qwen2 (biases, fewer key heads than query heads) or a Qwen3 (norms per head, tied embeddings)."""
    import transformers

    cls, config = {
        "Qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
        "Qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    }[kind]
    torch.manual_seed(0)
    model = cls(
        config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=num_kv_heads, head_dim=8, max_position_embeddings=64,
            tie_word_embeddings=kind == "Qwen3",
        )
    )  # fmt: skip
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:  # biases of 0 and norms of 1 would hide errors
                param.add_(torch.linspace(-0.2, 0.3, param.numel()).to(param))
    return model.to(dtype)


def batch(micro: int) -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(micro))


@cache
def alone(kind: str, dtype: torch.dtype) -> case.Run:
    model = make(kind, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2, eps=EPS)
    losses, norms = [], []
    for step in range(STEPS + EXTRA):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for micro in range(2):
            tokens = batch(2 * step + micro)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / 2).backward()
            total += loss.detach() / 2
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        losses.append(total)
    return case.Run(torch.stack(losses), torch.stack(norms), [p.detach() for p in model.parameters()])


def config_of(tp_size: int, stage: int, num_data: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS // num_data,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 1e-2, "eps": EPS}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": MAX_NORM,
        "tensor_parallel": {"autotp_size": tp_size},
        **more,
    }


def train(engine: Any, steps: range) -> case.Run:
    losses, norms = [], []
    for step in steps:
        total = torch.zeros(())
        for micro in range(2):
            tokens = batch(2 * step + micro).chunk(engine.dp_world_size)[engine.dp_rank]
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / 2
        comm.all_reduce(total)
        losses.append(total / comm.get_world_size())
        norms.append(torch.tensor(engine.get_global_grad_norm()))
    return case.Run(torch.stack(losses), torch.stack(norms), [case.whole(p) for p in engine.module.parameters()])


def run(group: Any, kind: str, tp_size: int, stage: int, steps: range, folder: Path) -> case.Run:
    model = make(kind)
    with torch.no_grad():
        for param in model.parameters() if dist.get_rank() else ():
            param.mul_(2)  # rank 0's count
    engine = pyzero.initialize(model=model, config=config_of(tp_size, stage, 4 // tp_size))[0]
    if steps.start:
        engine.load_checkpoint(folder)
        assert engine.global_steps == steps.start
    result = train(engine, steps)
    engine.save_checkpoint(folder)
    engine.save_pretrained(folder / "whole")
    if dist.get_rank() == 0:
        saved = load_file(folder / "whole" / "model.safetensors")
        params = dict(engine.module.named_parameters())
        assert all(torch.equal(saved[name], whole) for name, whole in zip(params, result.weights, strict=True))
    return result


@pytest.mark.parametrize(("kind", "stage"), [("Qwen2", 2), ("Qwen3", 3)])
def test_models_train_as_on_one_process(ranks, tmp_path, kind, stage):
    exact, torchs = alone(kind, torch.float64), alone(kind, torch.float32)
    first = ranks.run(4, run, kind, 2, stage, range(STEPS), tmp_path)
    second = ranks.run(4, run, kind, 1, stage, range(STEPS, STEPS + EXTRA), tmp_path)
    for a, b in zip(first, second, strict=True):
        case.assert_near(case.Run(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), b.weights), exact, torchs)


# ---- other models, by a plan of the caller's -------------------------------------------------------------------------

PLAN = {"blocks.*.up": "colwise", "blocks.*.mid": "rowwise"}
SPECS = {
    "layer_specs": [
        {"patterns": [r".*\.up\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.mid\.weight$"], "partition_type": "row"},
    ]
}


class Grid:
    """An mpu in which the ranks of a layer are not consecutive."""

    def __init__(self) -> None:
        rank = dist.get_rank()
        self.model = [dist.new_group(members) for members in ([0, 2], [1, 3])][rank % 2]
        self.data = [dist.new_group(members) for members in ([0, 1], [2, 3])][rank // 2]

    def get_model_parallel_group(self) -> Any:
        return self.model

    def get_data_parallel_group(self) -> Any:
        return self.data


def start(how: str, model: Any = None, stage: int = 2, **sections: Any) -> Any:
    model = case.Model() if model is None else model
    config = config_of(2, stage, 2, gradient_accumulation_steps=1, gradient_clipping=0.2, **sections)
    config["optimizer"]["params"] = {"lr": case.LR, "weight_decay": 1e-2}
    options: dict[str, Any] = {"tp_plan": PLAN, "training_data": torch.arange(8).float()[:, None]}
    if how == "specs":
        config["tensor_parallel"]["partition_config"] = SPECS
    if how in ("specs", "own"):
        del options["tp_plan"]
    if how == "mpu":
        options["mpu"] = Grid()
    if how == "mesh":
        options["mesh"] = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    if how == "tp_model_init":
        del config["tensor_parallel"]
        assert deepspeed.tp_model_init(model.blocks, 2, torch.float32) is model.blocks
        assert groups.get_tensor_model_parallel_world_size() == 2
    if how == "optimizer":
        del config["optimizer"]
        options["optimizer"] = torch.optim.AdamW(model.parameters(), lr=case.LR)
    return pyzero.initialize(model=model, config=config, **options)


def is_split(param: Any) -> bool:
    names = getattr(getattr(param, "device_mesh", None), "mesh_dim_names", None) or ()
    return "tp" in names and not param.placements[names.index("tp")].is_replicate()


def use(group: Any, how: str, stage: int) -> dict[str, Any]:
    engine, optimizer, loader, _ = start(how, stage=stage)
    ours = case.train(engine.module, optimizer, group, share=(engine.dp_rank, 2))
    handle = engine.get_model_parallel_group()
    return {
        "run": ours,
        "places": (engine.dp_rank, engine.get_model_parallel_rank()),
        "sizes": (engine.dp_world_size, engine.mp_world_size, engine.get_data_parallel_world_size()),
        "groups": (
            (groups.get_data_parallel_rank(), groups._get_model_parallel_rank()),
            groups.get_tensor_model_parallel_src_rank(),
            groups.get_model_parallel_group() is handle and groups._get_data_parallel_group() is not None,
        ),
        "data": [sample.flatten().tolist() for sample in loader],
        "split": sum(map(is_split, engine.parameters())),
        "whole": list(engine._consolidated_16bit_state_dict().values()),
        "master": utils.safe_get_full_fp32_param(engine.module.blocks[0].up.weight).shape,
    }


@pytest.mark.parametrize(
    ("how", "stage"), [("plan", 1), ("specs", 2), ("mpu", 3), ("mesh", 2), ("tp_model_init", 3), ("optimizer", 2)]
)
def test_other_models_by_a_plan(ranks, how, stage):
    results = ranks.run(4, use, how, stage)
    for rank, found in enumerate(results):
        case.assert_follows(found["run"], 0.2)
        wanted = (rank % 2, rank // 2) if how in ("mpu", "mesh") else (rank // 2, rank % 2)
        assert found["places"] == found["groups"][0] == wanted and found["sizes"] == (2, 2, 2)
        assert found["groups"][1] == (rank % 2 if how in ("mpu", "mesh") else rank // 2 * 2) and found["groups"][2]
        assert found["data"] == results[0]["data"] if wanted[0] == 0 else found["data"] != results[0]["data"]
        assert found["split"] == 6 and found["master"] == (12, 6)  # up's weight and bias, mid's weight, of two blocks
        assert len(found["whole"]) == (0 if rank else 20)


class OfPlan(nn.Module):
    """A wrapper of a model with a plan, as actors are."""

    def __init__(self, model: nn.Module, plan: dict[str, str]) -> None:
        super().__init__()
        self.model = model
        self.model.tp_plan = plan


class PerHead(nn.Module):
    """A norm over each head, with one weight for all heads.

    On half of the heads, the weight's gradient is only a part of the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.RMSNorm(2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x).unflatten(-1, (-1, 2))).flatten(-2))


def take_step(engine: Any) -> None:
    engine.backward(engine(torch.linspace(-1, 2, 8).reshape(2, 4)).square().mean())
    engine.step()


def cohere() -> Any:
    """Make a Cohere model, whose norms have a row of weights per head."""
    import transformers

    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.CohereConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, use_qk_norm=True, eos_token_id=1
    )
    return transformers.CohereForCausalLM(config)


def clip_by_torch(group: Any, stage: int, tp_size: int) -> list[tuple[float, float]]:
    """Clip by torch's function. Parameters are on two meshes, or DTensors and plain tensors.

    The gradients of Qwen3's norms per head are partial sums.
    """
    model, split = (make("Qwen3", num_kv_heads=tp_size) for _ in range(2))
    engine, found = pyzero.initialize(model=split, config=config_of(tp_size, stage, 4 // tp_size))[0], []
    for kind in (2.0, 1.0, float("inf")):
        for micro in range(2):
            tokens = batch(micro)
            own = tokens.chunk(engine.dp_world_size)[engine.dp_rank]
            engine.backward(engine(input_ids=own, labels=own).loss)
            (model(input_ids=tokens, labels=tokens).loss / 2).backward()
        wanted = nn.utils.clip_grad_norm_(model.parameters(), 0.1, kind)
        norm = nn.utils.clip_grad_norm_(engine.module.parameters(), 0.1, kind)
        grads = [param.grad for param in engine.module.parameters()]
        torch.testing.assert_close([*map(whole_of, copy.deepcopy(grads))], [*map(whole_of, grads)])
        make_norms_plain(again := next(filter(is_dtensor, grads)).clone())
        torch.save(again, io.BytesIO())
        found += [(float(norm), float(wanted)), (float(engine.optimizer.clip_grad_norm_(1e9)), 0.1)][: 1 + (kind == 2)]
        engine.zero_grad()
        model.zero_grad()
    return found


@pytest.mark.parametrize(("stage", "tp_size"), [(3, 2), (1, 4)])
def test_torchs_clip_of_split_models(ranks, stage, tp_size):
    for found in ranks.run(4, clip_by_torch, stage, tp_size):
        for norm, wanted in found:
            assert norm == pytest.approx(wanted, rel=1e-4)


def refusals_and_more(group: Any) -> dict[str, str]:
    """Return the message of each case on this rank."""
    said = {}

    def note(name: str, do: Any) -> None:
        try:
            said[name] = str(do())
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    config = {"train_batch_size": 8, "optimizer": {"type": "Adam"}}
    three = {**config, "tensor_parallel": {"autotp_size": 3}}
    two = {**config, "tensor_parallel": {"autotp_size": 2}}
    note("no plan", lambda: pyzero.initialize(model=case.Model(), config=two))
    note("three", lambda: pyzero.initialize(model=case.Model(), config=three))
    note("typo", lambda: pyzero.initialize(model=case.Model(), config=two, tp_plan={"blocks.*.upp": "colwise"}))
    note("style", lambda: pyzero.initialize(model=case.Model(), config=two, tp_plan={"last": "moe_tp_experts"}))
    note("layer", lambda: pyzero.initialize(model=case.Model(), config=two, tp_plan={"blocks.0.norm": "colwise"}))
    note("width", lambda: pyzero.initialize(model=case.Model(), config=two, tp_plan={"last": "colwise"}))
    note("mpu", lambda: pyzero.initialize(model=case.Model(), config={**two, "tensor_parallel": {"autotp_size": 4}},
                                          mpu=Grid(), tp_plan=PLAN))  # fmt: skip
    note("heads", lambda: pyzero.initialize(model=cohere(), config=two))
    ours = case.Model()
    note("ours", lambda: pyzero.initialize(
        model=ours, config=two, tp_plan=PLAN, optimizer=pyzero.FusedZeroAdamW(ours.parameters())
    ))  # fmt: skip
    asked = deepspeed.tp_model_init(case.Model(), 4)
    note("sizes", lambda: pyzero.initialize(model=asked, config=two, tp_plan=PLAN))

    plan = {"up": "colwise", "down": "rowwise"}
    for stage in (1, 3):
        staged = {**two, "zero_optimization": {"stage": stage}}
        engine = pyzero.initialize(model=PerHead(), config=staged, tp_plan=plan)[0]
        note(f"partial {stage}", lambda engine=engine: take_step(engine))

    wrapped = OfPlan(case.Model(), {"blocks.*.up": "colwise", "blocks.*.mid": "rowwise", "last": "replicate"})
    torch.manual_seed(dist.get_rank())
    engine = start("own", wrapped, fp16={"enabled": True, "initial_scale_power": 8})[0]
    said["random"] = str(float(torch.rand(())))
    note("inputs", lambda: engine.module.model(torch.full((4, 5), float(engine.dp_rank)).half()).shape)
    note("other inputs", lambda: engine(torch.full((4, 5), float(dist.get_rank()))))
    engine = start("plan", fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})[0]
    applied = []
    for step in range(2):
        x = case.batch(step).chunk(2)[engine.dp_rank]
        loss = engine(x).float().square().mean() * (1e9 if step == 0 and engine.dp_rank else 1)
        engine.backward(loss)
        engine.step()
        applied.append(engine.was_step_applied())
    said["applied"] = f"{applied}, {engine.cur_scale}, {engine.skipped_steps}"
    evaluated = pyzero.initialize(model=case.Model(), config={**two, "optimizer": None}, tp_plan=PLAN)[0]
    with torch.no_grad():
        said["eval"] = str(torch.allclose(evaluated(case.batch(0)), case.Model()(case.batch(0)), atol=1e-6))
    half = {**two, "bf16": {"enabled": True}}
    note("half again", lambda: pyzero.initialize(model=evaluated.module, config=half, tp_plan=PLAN))
    again = pyzero.initialize(model=evaluated.module, config=two, tp_plan=PLAN)[0]
    again.backward(again(case.batch(0)).square().mean())
    again.step()
    said["again"] = str(again.was_step_applied())
    sizes = {"optimizer": {"type": "Adam"}, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    sizes["tensor_parallel"] = {"autotp_size": 2}
    for mpu in (None, Grid()):
        engine = pyzero.initialize(model=case.Model(), config=sizes, tp_plan=PLAN, mpu=mpu)[0]
        said[f"batches {mpu is None}"] = str(engine.get_batch_info())
    return said


def test_refusals_skips_and_first_inputs(ranks):
    results = ranks.run(4, refusals_and_more)
    for rank, said in enumerate(results):
        assert "a plan of how to split Model, got none" in said["no plan"] and "tp_plan={" in said["no plan"]
        assert "a multiple of 3 ranks" in said["three"] and "got 4; start the script by torchrun" in said["three"]
        assert "'blocks.*.upp' in tp_plan, which is no module" in said["typo"]
        assert "got 'moe_tp_experts' for last" in said["style"]
        assert said["layer"].startswith("TypeError: expected nn.Linear or nn.Embedding") and "norm" in said["layer"]
        assert "expected out_features of last that 2" in said["width"] and "got 1" in said["width"]
        assert "expected mpu with 4 tensor-parallel ranks" in said["mpu"] and "got 2" in said["mpu"]
        assert "q_norm.weight of shape (4, 2), which has a row for each head" in said["heads"]
        assert said["again"] == "True" and "got one that initialize() has split before" in said["half again"]
        assert "built over the parts of tensor_parallel" in said["ours"]
        assert "got 2 and 4 tensor-parallel ranks" in said["sizes"]
        for stage in (1, 3):
            assert "the same gradient of norm.weight on the 2 tensor-parallel ranks" in said[f"partial {stage}"]
        assert said["random"] == results[rank // 2 * 2]["random"] != results[(rank + 2) % 4]["random"]
        assert said["inputs"] == "torch.Size([4, 1])" and said["eval"] == "True"
        assert "the same inputs on the 2 tensor-parallel ranks" in said["other inputs"]
        assert said["batches True"] == "(16, 4, 1)" and said["batches False"] == "(16, 4, 2)"
        assert said["applied"] == "[False, True], 128.0, 1"


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def load_weights_alone(group: Any, folder: Path, options: dict[str, bool]) -> None:
    """The loaded weights are unchanged after a step with a learning rate of 0."""

    def take_steps(engine: Any, num: int) -> None:
        for number in range(num):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).bfloat16()
            engine.backward((engine(x).float() - 1).square().mean())
            engine.step()

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "tensor_parallel": {"autotp_size": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
    }
    plan = {"up": "colwise", "down": "rowwise"}
    saver, loader = (pyzero.initialize(model=Small(seed), config=config, tp_plan=plan)[0] for seed in (0, 1))
    take_steps(saver, 3)
    saver.save_checkpoint(folder)
    take_steps(loader, 2)
    loader.load_checkpoint(folder, **options)
    loader.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    take_steps(loader, 1)
    for got, wanted in zip(loader.module.parameters(), saver.module.parameters(), strict=True):
        assert torch.equal(whole_of(got), whole_of(wanted))


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
def test_weights_that_are_loaded_alone_stay(ranks, tmp_path, options):
    ranks.run(4, load_weights_alone, tmp_path, options)


def test_a_pipeline_is_not_split():
    net = deepspeed.PipelineModule(nn.Sequential(nn.Linear(1, 1)), num_stages=1, loss_fn=nn.MSELoss())
    config = {"train_batch_size": 1, "optimizer": {"type": "Adam"}, "tensor_parallel": {"autotp_size": 2}}
    with pytest.raises(ValueError, match="autotp_size 2 with a PipelineModule"):
        pyzero.initialize(model=net, config=config)
    assert groups.get_data_parallel_group() is None and groups.get_model_parallel_world_size() == 1
    with pytest.raises(AttributeError, match="no expert"):
        groups._get_expert_parallel_group("ep_size_2")
