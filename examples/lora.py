"""LoRA: a small GPT learns Python's own sources, is frozen, and learns the English of Python's manual by adapters.

    torchrun --standalone --nproc-per-node 2 examples/lora.py

The loss on the manual's held-out tenth falls by 0.3 nats per byte; 5% of the parameters are trained. Both texts are the
standard library's; the manual is what help("for") reads from. The adapters are peft's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from gpt import data, model, ranks, report
from gpt.data import Corpus
from gpt.model import Bytewise
from gpt.ranks import Place, own_rows
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from pyzero import FusedZeroAdamW

CONTEXT, LAYERS, WIDTH, HEADS, BATCH = 128, 3, 192, 4, 8
BASE_LR, LORA_LR = 2e-3, 5e-3
HELD_OUT_ROWS = 128
PROMPT, SAMPLE_BYTES = "The ", 200
ADAPTERS = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
QUALITY = "loss on the manual's held-out tenth, nats per byte"


def new_gpt() -> Any:
    return model.build(LAYERS, WIDTH, HEADS, CONTEXT, seed=0)


def train(
    kind: type[Optimizer], gpt: Any, corpus: Corpus, lr: float, num_steps: int, held_out: Corpus, place: Place
) -> dict[int, float]:
    """The loss on held-out text by step; what is frozen in gpt stays so."""
    bytewise = Bytewise(gpt, torch.float32)
    optimizer = kind([param for param in gpt.parameters() if param.requires_grad], lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, cycle_momentum=False)
    curve = {0: held_out_loss(bytewise, held_out, place)}
    with tqdm(range(1, num_steps + 1), unit="step", desc=kind.__name__, disable=place.rank != 0) as bar:
        for step in bar:
            rows, share = own_rows(corpus.batch(step, BATCH, CONTEXT, seed=0), place)
            loss = bytewise(rows) * share
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)  # of the mean over the ranks
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 25 == 0 or step == num_steps:
                curve[step] = held_out_loss(bytewise, held_out, place)
                bar.set_postfix(held_out=f"{curve[step]:.3f}")
    return curve


@torch.no_grad()
def held_out_loss(bytewise: Bytewise, corpus: Corpus, place: Place) -> float:
    rows, share = own_rows(corpus.held_out_windows(HELD_OUT_ROWS, CONTEXT), place)
    return float(place.mean(bytewise(rows) * share))


def adapted(weights: dict[str, Tensor], place: Place) -> Any:
    """These weights, frozen, and adapters, which leave what it computes as it is until they are trained."""
    gpt = new_gpt()
    gpt.load_state_dict(weights)
    torch.manual_seed(0)
    return get_peft_model(gpt, ADAPTERS).to(place.device)


def sample(gpt: Any) -> str:
    return model.sample(Bytewise(gpt, torch.float32), PROMPT, SAMPLE_BYTES, CONTEXT, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150, help="of the adapters")
    parser.add_argument("--no-baseline", action="store_true", help="do not train AdamW as well")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the picture")
    args = parser.parse_args()
    sources = data.load(None, CONTEXT, without="pydoc_data")
    manual = data.from_text("the manual", "\n".join(topics[name] for name in sorted(topics)).encode(), CONTEXT)
    with ranks.joined() as place:
        base = new_gpt().to(place.device)
        train(FusedZeroAdamW, base, sources, BASE_LR, args.base_steps, manual, place)
        gpt = adapted(base.state_dict(), place)
        curves = {"FusedZeroAdamW": train(FusedZeroAdamW, gpt, manual, LORA_LR, args.steps, manual, place)}
    if place.rank == 0:
        print(f"before: {sample(base)!r}\nafter: {sample(gpt)!r}")
        gpt.print_trainable_parameters()
        if not args.no_baseline:
            plain = adapted(base.state_dict(), place)
            curves["AdamW"] = train(AdamW, plain, manual, LORA_LR, args.steps, manual, place.alone())
        for name, curve in curves.items():
            print(f"{name}: held-out loss {curve[0]:.3f} before, {curve[args.steps]:.3f} after")
        report.plot_qualities(curves, QUALITY, args.out / "lora.png")


if __name__ == "__main__":
    main()
