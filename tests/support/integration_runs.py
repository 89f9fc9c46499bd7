"""Runs other libraries with pyzero, on as many ranks as a launcher starts, all in one process: their imports take long.

python integration_runs.py FOLDER runs each of RUNS whose packages are installed, and writes FOLDER/results_RANKS.json.
On one rank it resumes from the checkpoints of two ranks in FOLDER.
"""

import functools
import importlib.util
import json
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "integrations"))

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEEPSPEED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
    }},
}  # fmt: skip


def trained(folder, **options):
    """Log and trainer of the Trainer example: 6 steps, saved at the third, with batches of 8 over all ranks."""
    import hf_trainer

    trainer = hf_trainer.main(
        str(folder),
        **{"dtype": torch.float32, "steps": 6, **options},
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=8 // SIZE,
        disable_tqdm=True,
    )
    return [row for row in trainer.state.log_history if "loss" in row], trainer


def mean(losses):
    """The mean over ranks of each loss."""
    values = torch.tensor(losses, dtype=torch.float64)
    if SIZE > 1:
        dist.all_reduce(values)
    return (values / SIZE).tolist()


def message_of(error, run):
    """The message that `run` raises, or None."""
    try:
        run()
    except error as raised:
        return str(raised)
    return None


def warned(run, lines):
    """The result of `run`. Adds pyzero's warnings to `lines`."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("pyzero").addHandler(handler)
    try:
        return run()
    finally:
        logging.getLogger("pyzero").removeHandler(handler)


def trainer(folder):
    """pyzero's Trainer, also resumed, beside transformers' Trainer with DDP and torch's AdamW."""
    import transformers

    from pyzero import FusedZeroAdamW

    if SIZE == 1:
        return {"resumed": trained(folder / "ours", resume=str(folder / "ours" / "checkpoint-3"))[0]}
    logs, ours = trained(folder / "ours")
    plain = functools.partial(
        transformers.Trainer, optimizer_cls_and_kwargs=(FusedZeroAdamW, {"lr": 1e-2, "reduce_grads": False})
    )
    return {
        "ours": logs,
        "is_bare": type(ours.model_wrapped).__name__,
        "kind": type(ours.optimizer.optimizer).__name__,
        "resumed": trained(folder / "ours", resume=str(folder / "ours" / "checkpoint-3"))[0],
        "torch": trained(folder / "torch", trainer_class=transformers.Trainer)[0],
        "from_torch": trained(folder / "torch", resume=str(folder / "torch" / "checkpoint-3"))[0],
        "plain": warned(lambda: trained(folder / "plain", trainer_class=plain)[0], lines := []),
        "plain_warned": lines,
        "plain_resumed": message_of(
            ValueError,
            lambda: trained(folder / "plain", trainer_class=plain, resume=str(folder / "plain" / "checkpoint-3")),
        ),
    }


def trainer_fp16(folder):
    """A Trainer in fp16, whose first loss scale is too large."""
    from pyzero import FusedZeroAdamW, LossScale
    from pyzero.transformers import Trainer

    options = {"lr": 1e-2, "loss_scale": LossScale(init_scale=2.0**18)}
    kind = functools.partial(Trainer, optimizer_cls_and_kwargs=(FusedZeroAdamW, options))
    folder = folder / f"fp16_{SIZE}"
    logs, _ = trained(folder, dtype=torch.float16, trainer_class=kind)
    resume = str(folder / "checkpoint-3")
    return {"logs": logs, "resumed": trained(folder, dtype=torch.float16, trainer_class=kind, resume=resume)[0]}


def trainer_bf16(folder):
    """A Trainer in bf16, without a loss scale, with an inf in the second step's gradients."""
    import transformers

    from pyzero.transformers import Trainer

    class Spoil(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **others):
            if state.global_step == 1:
                self.hook = next(model.parameters()).register_hook(lambda grad: grad * float("inf"))

        def on_step_end(self, args, state, control, **others):
            if state.global_step == 2:
                self.hook.remove()

    kind = functools.partial(Trainer, callbacks=[Spoil()])
    return {"logs": trained(folder / f"bf16_{SIZE}", dtype=torch.bfloat16, trainer_class=kind)[0]}


def trainer_stream(folder):
    """A stream of data that ends in the middle of an accumulation. Each epoch is saved."""
    import transformers

    from pyzero.transformers import Trainer

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return iter(self.rows)

    def run(kind, name):
        def build(train_dataset, **options):
            return kind(train_dataset=Stream(train_dataset[:40]), **options)  # 5 batches of 8; a step takes 2

        place = folder / f"{name}_{SIZE}"
        logs, _ = trained(place, trainer_class=build, save_strategy="epoch")
        return {"logs": logs, "saved": sorted(path.name for path in place.glob("checkpoint-*"))}

    return {"ours": run(Trainer, "stream"), "torch": run(transformers.Trainer, "torch_stream")}


def trainer_weights(folder):
    """The warnings when a run resumes from weights only."""
    place, lines = folder / f"weights_{SIZE}", []
    trained(place, save_only_model=True)
    warned(lambda: trained(place, resume=str(place / "checkpoint-3")), lines)
    return {"warned": lines}


def trainer_lora(folder):
    """The names in a checkpoint of adapters, and the losses after it."""
    from peft import LoraConfig, get_peft_model

    from pyzero import latest_checkpoint
    from pyzero.checkpoint import files
    from pyzero.transformers import Trainer

    def kind(model, **options):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
        return Trainer(model=get_peft_model(model, lora), **options)

    folder = folder / f"lora_{SIZE}"
    logs, _ = trained(folder, trainer_class=kind)
    names = files.read_index(latest_checkpoint(folder / "checkpoint-3" / "pyzero"))["tensors"]
    resumed, _ = trained(folder, trainer_class=kind, resume=str(folder / "checkpoint-3"))
    return {"logs": logs, "resumed": resumed, "names": sorted(names)}


def trainer_deepspeed(folder):
    """TrainingArguments(deepspeed=...), under compat.install()."""
    import safetensors.torch
    import transformers

    run = functools.partial(trained, trainer_class=transformers.Trainer, deepspeed=DEEPSPEED, bf16=True)
    split = split_by_a_trainer(folder / f"split_{SIZE}")
    if SIZE == 1:
        return {"resumed": run(folder / "ds", resume=str(folder / "ds" / "checkpoint-3"))[0], "split": split}
    logs, made = run(folder / "ds")
    resumed = run(folder / "ds", resume=str(folder / "ds" / "checkpoint-3"))[0]
    stage3 = {**DEEPSPEED, "zero_optimization": {"stage": 3}}
    run(folder / "stage3", deepspeed=stage3, steps=3)
    saved = safetensors.torch.load_file(folder / "stage3" / "checkpoint-3" / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    own = {name: tuple(param.shape) for name, param in made.model.named_parameters()}
    return {
        "logs": logs,
        "resumed": resumed,
        "stage3_is_whole": shapes == own,
        "split": split,
        "engine": f"{type(made.model_wrapped).__module__}",
    }


def split_by_a_trainer(folder):
    """Logs of a Llama whose layers are split over the ranks. A step has 16 rows, on one rank and on two."""
    import transformers

    def kind(model, **options):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        return transformers.Trainer(model=transformers.LlamaForCausalLM(config), **options)

    config = {**DEEPSPEED, "tensor_parallel": {"autotp_size": SIZE}}
    config["zero_optimization"] = {"stage": 2, "gather_16bit_weights_on_model_save": True}
    logs, _ = trained(
        folder, trainer_class=kind, deepspeed=config, bf16=False, gradient_accumulation_steps=2 * SIZE, steps=3
    )
    return logs


def zero3_models(folder):
    """Whether transformers' models train alike if built whole, in zero.Init, or by its own integration of stage 3."""
    if SIZE == 1:
        return {}
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    import pyzero

    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip

    def masters(model):
        engine = pyzero.initialize(model=model, config=settings)[0]
        ids = torch.arange(1, 9)[None] + RANK
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        return engine.get_fp32_state_dict()

    def sharded(model):
        return all(hasattr(param, "rows") for param in model.parameters())

    def same(ours, wanted):
        return all(torch.equal(ours[name], wanted[name]) for name in wanted)

    torch.manual_seed(RANK)  # rank 0's weights are used
    whole = masters(transformers.LlamaForCausalLM(config))
    torch.manual_seed(RANK)
    with pyzero.deepspeed.zero.Init():
        model = transformers.LlamaForCausalLM(config)
    result = {"init": sharded(model) and same(masters(model), whole)}
    if RANK == 0:
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    dist.barrier()
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = masters(load(folder / "llama"))
    stage_3 = HfDeepSpeedConfig(settings)  # in effect while it lives
    model = load(folder / "llama")
    result["from_pretrained"] = sharded(model) and same(masters(model), whole)
    model = transformers.AutoModelForCausalLM.from_config(config)
    result["from_config"] = sharded(model) and not model.model.embed_tokens.weight.data[0].any().item()
    model.resize_token_embeddings(110)
    result["resized"] = len(masters(model)["lm_head.weight"])
    del stage_3
    return result


def accelerate_loop(folder):
    """The example, the example resumed, and what the Accelerator refuses."""
    import accelerate_loop as example
    from accelerate.state import AcceleratorState

    from pyzero import FusedZeroAdamW
    from pyzero.accelerate import Accelerator

    def main(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return example.main(str(folder / "accelerate"), **options)[0]

    result = {} if SIZE == 1 else {"losses": main(epochs=2)}
    result["resumed"] = main(resume=True)
    model, accelerator = torch.nn.Linear(2, 2), Accelerator(cpu=True)
    refused = {"torch": torch.optim.AdamW(model.parameters())}
    refused["reduced"] = FusedZeroAdamW(model.parameters(), reduce_grads=False)
    for name, optimizer in refused.items():
        result[name] = message_of((TypeError, ValueError), lambda one=optimizer: accelerator.prepare(one))
    return result


def accelerate_models(folder):
    """Two models with one optimizer, also resumed; and a loss scale beside an optimizer that has none."""
    from accelerate.state import AcceleratorState

    from pyzero import FusedZeroAdamW
    from pyzero.accelerate import Accelerator

    def build():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        models = torch.nn.Linear(8, 4).bfloat16(), torch.nn.Linear(4, 2).bfloat16()
        params = [param for model in models for param in model.parameters()]
        return accelerator, *accelerator.prepare(*models, FusedZeroAdamW(params, lr=1e-2))

    def step(number, accelerator, first, second, optimizer):
        torch.manual_seed(number * SIZE + RANK)
        loss = second(first(torch.randn(4, 8).bfloat16())).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    built = build()
    for number in range(2):
        step(number, *built)
    built[0].save_state(str(folder / f"models_{SIZE}"))
    result = {"straight": [step(number, *built) for number in range(2, 5)]}
    built = build()
    built[0].load_state(str(folder / f"models_{SIZE}"))
    result["resumed"] = [step(number, *built) for number in range(2, 5)]

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    models = torch.nn.Linear(4, 4).half(), torch.nn.Linear(4, 4)
    optimizers = [FusedZeroAdamW(model.parameters()) for model in models]
    accelerator.prepare(*models, *optimizers)
    loss = models[1](torch.ones(2, 4)).sum()
    result["scaled"] = message_of(ValueError, lambda: accelerator.backward(loss))
    result["has_grad"] = models[1].weight.grad is not None
    return result


def accelerate_plain(folder):
    """accelerate's own Accelerator with DDP, which reduces the gradients for the optimizer."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pyzero import FusedZeroAdamW

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, FusedZeroAdamW(model.parameters(), lr=1e-2, reduce_grads=False))
    rows = torch.randn(8, 8)
    for _ in range(3):
        accelerator.backward(model(rows[accelerator.process_index :: SIZE]).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder / f"state_{SIZE}"))
    accelerator.wait_for_everyone()
    refused = message_of(ValueError, lambda: accelerator.load_state(str(folder / f"state_{SIZE}")))
    return {"loaded": refused, "weights": sum((p.flatten().tolist() for p in model.parameters()), [])}


def accelerate_grad_scaler(folder):
    """For each step: whether it was skipped, the scale, the learning rate. On GPUs mixed_precision="fp16" does this."""
    from accelerate import DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    from pyzero import FusedZeroAdamW
    from pyzero.accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    model = torch.nn.Linear(8, 4)
    model, optimizer = accelerator.prepare(model, FusedZeroAdamW(model.parameters(), lr=1.0))
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    steps = []
    for _ in range(3):
        accelerator.backward(
            model(torch.ones(2, 8)).sum() * 2
        )  # gradients of 4: the first step overflows, and the second does in the sum over two ranks
        accelerator.scaler.unscale_(optimizer.optimizer)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        skipped = accelerator.optimizer_step_was_skipped
        steps.append([skipped, accelerator.scaler.get_scale(), schedule.get_last_lr()[0]])
    return {"steps": steps}


def lightning_module(folder):
    """The example with automatic and manual optimization, also resumed, and with a strategy that adds no DDP."""
    import lightning_module as example
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy
    from torch.amp import GradScaler

    from pyzero import FusedZeroAdamW

    class BareStrategy(example.WholeState):
        def configure_ddp(self):
            """No DDP: the optimizer reduces."""

    class BareModule(example.Module):
        def configure_optimizers(self):
            return FusedZeroAdamW(self.parameters(), lr=1e-2)

    class TorchModule(example.Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def main(*args, **options):
        return warned(lambda: example.main(*args, **options), lines)

    result, lines = {}, []
    for automatic in (True, False):
        name = "automatic" if automatic else "manual"
        place = folder / f"lightning_{name}"
        if SIZE > 1:
            result[name], first = main(str(place), automatic=automatic, epochs=1)
            first.save_checkpoint(place / "saved.ckpt")
            straight, _ = main(str(place), automatic=automatic, epochs=2)
            result[f"{name}_straight"] = straight
        resume = str(place / "saved.ckpt")
        result[f"{name}_resumed"], _ = main(str(place), automatic=automatic, epochs=2, resume=resume)
    bare, _ = main(str(folder / "bare"), epochs=2, module_class=BareModule, strategy=BareStrategy())
    for name, kind, strategy in (("torch", TorchModule, DDPStrategy), ("ours", BareModule, BareStrategy)):
        for precision in ("bf16", "16"):
            scaler = GradScaler("cpu", init_scale=64.0) if precision == "16" else None
            result[f"{name}_{precision}"], _ = example.main(
                str(folder / f"lightning_{name}"),
                epochs=1,
                module_class=kind,
                strategy=strategy(),
                plugins=[MixedPrecision(f"{precision}-mixed", "cpu", scaler)],
            )
    return {name: mean(losses) for name, losses in {**result, "bare": bare}.items()} | {"warned": lines}


def peft_lora(folder):
    """The example, and its checkpoint loaded into a new model."""
    import peft_lora as example

    import pyzero

    result = {}
    if SIZE > 1:
        result["losses"] = mean(example.main(str(folder / "peft"), steps=20)[0])
    model, optimizer = example.build()
    pyzero.load_checkpoint(folder / "peft", model=model, optimizer=optimizer)
    result["next"] = mean([example.step(model, optimizer, 20, RANK, SIZE)])
    result["state_bytes"] = optimizer.state_bytes()
    result["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return result


def compiled(folder):
    """The example, compiled and not. Inductor would take a minute; aot_eager compiles autograd in the same way."""
    import compiled as example

    return {backend: mean(example.main(steps=20, backend=backend)) for backend in ("aot_eager", "eager")}


RUNS = {  # run -> the packages that it needs
    trainer: ("transformers", "accelerate"),
    trainer_fp16: ("transformers", "accelerate"),
    trainer_bf16: ("transformers", "accelerate"),
    trainer_stream: ("transformers", "accelerate"),
    trainer_weights: ("transformers", "accelerate"),
    trainer_lora: ("transformers", "accelerate", "peft"),
    accelerate_loop: ("accelerate",),
    accelerate_models: ("accelerate",),
    accelerate_plain: ("accelerate",),
    accelerate_grad_scaler: ("accelerate",),
    lightning_module: ("lightning",),
    peft_lora: ("peft", "transformers"),
    compiled: (),
    trainer_deepspeed: (
        "transformers",
        "accelerate",
        "safetensors",
    ),  # late, because its state and environment remain in accelerate
    zero3_models: ("transformers", "accelerate", "safetensors"),
}


def main():
    """Run all. If one raises, its traceback is its result."""
    import pyzero

    torch.set_num_threads(1)
    pyzero.compat.install()  # before transformers and accelerate look for deepspeed
    folder, results = Path(sys.argv[1]), {}
    for run, packages in RUNS.items():
        if all(importlib.util.find_spec(name) for name in packages):
            try:
                results[run.__name__] = run(folder)
            except Exception:  # the test of this run reports it
                results[run.__name__] = {"error": traceback.format_exc()}
                print(results[run.__name__]["error"], flush=True)
                if SIZE > 1:
                    break  # the other rank may be at another place now
    if RANK == 0:
        (folder / f"results_{SIZE}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
