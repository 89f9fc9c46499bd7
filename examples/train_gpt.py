"""Train a small GPT on Python's own sources, its optimizer state sharded over the ranks.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py
    python examples/train_gpt.py

GPUs are used where there are any, one per process. `--optimizer adamw` trains the baseline alone; the default run
trains it too, after FusedZeroAdamW, unless --out holds its curve from the same settings.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from gpt import data, model, ranks, report
from gpt.model import Bytewise
from gpt.ranks import Place
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import pyzero

ZERO, ADAMW = "FusedZeroAdamW", "AdamW"
HELD_OUT_ROWS = 256
SAMPLE_PROMPT = "def "
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["zero", "adamw"], default="zero")
    parser.add_argument("--data", metavar="FILE", help="text to train on; default: the standard library's sources")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for curves and pictures")
    parser.add_argument("--no-baseline", action="store_true", help="do not train AdamW as well")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="rows per step, over all ranks; rounded up to a multiple")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of FusedZeroAdamW's weights")
    parser.add_argument("--compute", choices=DTYPES, help="of the arithmetic; default: fp32 on CPUs, else as --dtype")
    parser.add_argument("--sample-bytes", type=int, default=300)
    return parser.parse_args()


def settings_of(args: argparse.Namespace, corpus: data.Corpus, num_ranks: int) -> dict[str, Any]:
    """What two curves must share to be laid over each other."""
    names = ("steps", "batch", "layers", "width", "heads", "context", "lr", "seed")
    return {name: getattr(args, name) for name in names} | {"text": corpus.fingerprint(), "ranks": num_ranks}


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warmup over a twentieth of the steps, then half a cosine down to a twentieth of the rate."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Trainer:
    """A model, its optimizer, and how one step goes."""

    def __init__(self, name: str, args: argparse.Namespace, place: Place) -> None:
        self.name, self.args, self.place = name, args, place
        gpt = model.build(args.layers, args.width, args.heads, args.context, args.seed).to(place.device)
        self.num_params = sum(param.numel() for param in gpt.parameters())
        self.grad_norm = torch.zeros(())  # 0-D, before clipping
        self.optimizer: Any
        if name == ZERO:
            compute = args.compute or (args.dtype if place.device.type != "cpu" else "fp32")
            self.model = Bytewise(gpt.to(DTYPES[args.dtype]), DTYPES[compute])
            self.loss_of: Any = self.model
            self.optimizer = pyzero.FusedZeroAdamW(
                self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), stage=args.stage, max_grad_norm=1.0
            )
        else:
            self.model = Bytewise(gpt, torch.float32)
            self.loss_of = DistributedDataParallel(self.model) if place.size > 1 else self.model
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.schedule = schedule(self.optimizer, args.steps)

    def step(self, tokens: Tensor) -> Tensor:
        """One step on this rank's rows. Returns its loss, 0-D."""
        loss = self.loss_of(tokens)
        if self.name == ZERO:
            self.optimizer.backward(loss)
            self.optimizer.step()
            self.grad_norm = self.optimizer.grad_norm
        else:
            loss.backward()
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss.detach()

    def status(self, loss: Tensor) -> dict[str, str]:
        """For the progress bar; reads the device."""
        shown = {"loss": f"{float(loss):.3f}", "norm": f"{float(self.grad_norm):.2f}"}
        if self.name == ZERO and self.args.dtype == "fp16":
            shown["scale"] = f"{self.optimizer.loss_scale:g}"
        return shown

    def state_bytes(self) -> int:
        """Bytes of masters and moments on the rank that holds most."""
        if self.name == ZERO:
            mine = self.optimizer.state_bytes()
        else:
            tensors = [t for state in self.optimizer.state.values() for t in state.values()]
            mine = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return int(self.place.mean(torch.tensor(float(mine), device=self.place.device, dtype=torch.float64)))


def own_rows(rows: Tensor, place: Place) -> Tensor:
    """This rank's part of a batch that all ranks drew alike."""
    return rows.chunk(place.size)[place.rank].to(place.device)


@torch.no_grad()
def held_out_loss(trainer: Trainer, corpus: data.Corpus) -> float:
    rows = own_rows(corpus.held_out_windows(HELD_OUT_ROWS, trainer.args.context), trainer.place)
    losses = torch.stack([trainer.model(part) for part in rows.split(32)])
    return float(trainer.place.mean(losses.mean()))


def train(name: str, args: argparse.Namespace, corpus: data.Corpus, place: Place) -> tuple[report.Result, Trainer]:
    """One optimizer from the seed to the last step."""
    from tqdm import tqdm

    trainer = Trainer(name, args, place)
    losses = torch.zeros(args.steps, device=place.device)
    tokens_per_step = args.batch * args.context
    started = time.monotonic()
    with tqdm(
        total=args.steps * tokens_per_step, unit="tok", unit_scale=True, desc=name, disable=place.rank != 0
    ) as bar:
        for step in range(args.steps):
            tokens = own_rows(corpus.batch(step, args.batch, args.context, args.seed), place)
            losses[step] = trainer.step(tokens)
            bar.update(tokens_per_step)
            if step % 10 == 9 and place.rank == 0:  # a read of the device waits for it: not in every step
                bar.set_postfix(trainer.status(losses[step]))
    curve = place.mean(losses).tolist()
    seconds = time.monotonic() - started
    result = report.Result(
        optimizer=name,
        settings=settings_of(args, corpus, place.size),
        losses=curve,
        held_out_loss=held_out_loss(trainer, corpus),
        seconds=seconds,
        weight_bytes=sum(param.numel() * param.element_size() for param in trainer.model.parameters()),
        state_bytes=trainer.state_bytes(),
    )
    if place.rank == 0:
        report.save(result, args.out)
    return result, trainer


def conclude(results: list[report.Result], trainer: Trainer, corpus: data.Corpus) -> None:
    """Rank 0's last words."""
    args, place = trainer.args, trainer.place
    print(f"\nsample:\n{model.sample(trainer.model, SAMPLE_PROMPT, args.sample_bytes, args.context, args.seed)}\n")
    print(report.memory_table(trainer.num_params, place.size, results))
    for result in results:
        print(
            f"{result.optimizer}: held-out loss {result.held_out_loss:.3f} nats per byte, "
            f"{args.steps} steps in {result.seconds:.0f} s"
        )
    picture = args.out / "loss.png"
    if report.plot(results, picture):
        print(f"curves: {picture}, and as CSV beside it")
    else:
        print(f"curves: {args.out}/*.csv; no picture, matplotlib is not installed (pip install matplotlib)")


def run(args: argparse.Namespace, place: Place) -> None:
    args.batch = math.ceil(args.batch / place.size) * place.size  # the same number of rows on every rank
    corpus = data.load(args.data, args.context)
    name = ZERO if args.optimizer == "zero" else ADAMW
    if place.rank == 0:
        print(f"text: {corpus.name}, {len(corpus.train)} bytes, {len(corpus.held_out)} held out")
    result, trainer = train(name, args, corpus, place)
    other = report.load(ADAMW if name == ZERO else ZERO, args.out, result.settings)
    if other is None and name == ZERO and not args.no_baseline:
        other, _ = train(ADAMW, args, corpus, place)
    if place.rank == 0:
        conclude([result] + ([other] if other else []), trainer, corpus)


def main() -> None:
    args = parse()
    try:
        with ranks.joined() as place:
            run(args, place)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: what was finished is in the output folder, whole") from None


if __name__ == "__main__":
    main()
