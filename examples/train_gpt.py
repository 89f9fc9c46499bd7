"""Train a small GPT on Python's own sources, its optimizer state sharded over the ranks.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py
    python examples/train_gpt.py

GPUs are used where there are any, one per process. `--optimizer adamw` trains the baseline alone; the default run
trains it too, after FusedZeroAdamW, unless --out holds its curve from the same settings.

With `--save-every 100` a run that was interrupted goes on from its last checkpoint when it is started with `--resume`,
on any number of ranks: a batch is the same rows, however many ranks share them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from gpt import data, model, ranks, report
from gpt.model import Bytewise
from gpt.progress import Keeper, fail
from gpt.ranks import Place, own_rows
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
    parser.add_argument("--batch", type=int, default=8, help="rows per step, shared out among the ranks")
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
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="save a checkpoint in the folder of --out")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint there, if there is one")
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="for trying --resume: the last rank dies there")
    parser.add_argument("--over", type=Path, metavar="FOLDER", help="draw the curve over that of the run saved there")
    args = parser.parse_args()
    if args.optimizer == "adamw" and (args.save_every or args.resume or args.over):
        parser.error("expected --save-every, --resume and --over without --optimizer adamw; pass --optimizer zero")
    return args


def settings_of(args: argparse.Namespace, corpus: data.Corpus) -> dict[str, Any]:
    """What two curves must share to be laid over each other."""
    names = ("steps", "batch", "layers", "width", "heads", "context", "lr", "seed")
    return {name: getattr(args, name) for name in names} | {"text": corpus.fingerprint()}


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

    def step(self, batch: Tensor) -> Tensor:
        """One step on a batch, the same on all ranks. Returns a loss, 0-D, whose mean over ranks is the batch's."""
        rows, share = own_rows(batch, self.place)
        loss = self.loss_of(rows) * share
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
        """Bytes of masters and moments on a rank, the mean over the ranks."""
        if self.name == ZERO:
            mine = self.optimizer.state_bytes()
        else:
            tensors = [t for state in self.optimizer.state.values() for t in state.values()]
            mine = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return int(self.place.mean(torch.tensor(float(mine), device=self.place.device, dtype=torch.float64)))


@torch.no_grad()
def held_out_loss(trainer: Trainer, corpus: data.Corpus) -> float:
    rows, share = own_rows(corpus.held_out_windows(HELD_OUT_ROWS, trainer.args.context), trainer.place)
    total = sum(trainer.model(part) * len(part) for part in rows.split(32))
    return float(trainer.place.mean(total / len(rows) * share))


def train(name: str, args: argparse.Namespace, corpus: data.Corpus, place: Place) -> tuple[report.Result, Trainer]:
    """One optimizer from the seed, or from its last checkpoint, to the last step."""
    from tqdm import tqdm

    trainer = Trainer(name, args, place)
    keeper = Keeper(args.out / "checkpoints", trainer, settings_of(args, corpus), place)
    first = keeper.start(resume=args.resume and name == ZERO)
    tokens_per_step = args.batch * args.context
    sizes = {"total": args.steps * tokens_per_step, "initial": first * tokens_per_step}
    with tqdm(**sizes, unit="tok", unit_scale=True, desc=name, disable=place.rank != 0) as bar:
        for step in range(first + 1, args.steps + 1):
            loss = trainer.step(corpus.batch(step - 1, args.batch, args.context, args.seed))
            keeper.add(loss)
            bar.update(tokens_per_step)
            if step % 10 == 0 and place.rank == 0:  # a read of the device waits for it: not in every step
                bar.set_postfix(trainer.status(loss))
            if name == ZERO and args.save_every and step % args.save_every == 0:
                keeper.save()
            if name == ZERO and step == args.kill_at:
                fail(place)
    progress = keeper.read()
    result = report.Result(
        optimizer=name,
        settings=settings_of(args, corpus) | {"ranks": place.size},
        losses=progress.losses,
        held_out_loss=held_out_loss(trainer, corpus),
        seconds=progress.seconds,
        weight_bytes=sum(param.numel() * param.element_size() for param in trainer.model.parameters()),
        state_bytes=trainer.state_bytes(),
        parts=progress.parts,
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
    drawn = report.plot(results, args.out / "loss.png")
    if args.over:
        report.plot_over(results[0], whole_run(args, corpus), args.out / "resume.png")
    if drawn:
        print(f"curves: {args.out}/*.png, and as CSV beside them")
    else:
        print(f"curves: {args.out}/*.csv; no picture, matplotlib is not installed (pip install matplotlib)")


def whole_run(args: argparse.Namespace, corpus: data.Corpus) -> report.Result:
    """The run of --over."""
    found = report.load(ZERO, args.over, settings_of(args, corpus))
    if found is None:
        raise SystemExit(f"expected a run of these settings in {args.over}, got none; train it with --out {args.over}")
    return found


def run(args: argparse.Namespace, place: Place) -> None:
    if args.batch < place.size:
        raise SystemExit(f"expected a row for each of {place.size} ranks, got --batch {args.batch}; pass more")
    corpus = data.load(args.data, args.context)
    if args.over:
        whole_run(args, corpus)  # or stop now
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
