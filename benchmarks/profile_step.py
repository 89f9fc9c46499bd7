"""python -m benchmarks.profile_step [--out FILE]: a trace of one training step, for Perfetto or chrome://tracing.

It trains a small GPT in bf16 with FusedZeroAdamW, stage 2, on one GPU if there is one, else on two gloo ranks on the
CPU. Rank 0 writes the trace. Beside torch's events it has pyzero::collect, ::reduce_scatter, ::adam and ::all_gather.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import pyzero

from .ranks import join, launch, leave

_NUM_RANKS = 2
_LAYERS, _WIDTH, _HEADS, _CONTEXT, _BATCH, _VOCABULARY = 4, 256, 4, 64, 4, 512
_WARM_UP_STEPS = 3  # these build kernels, plan the buckets again and fill the allocator


class SmallGPT(nn.Module):
    """Decoder blocks of torch's own layers. It takes tokens and returns the loss of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, _WIDTH)
        self.places = nn.Embedding(_CONTEXT, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, context + 1) int64 -> 0-D fp32."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(inputs) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(_CONTEXT, device=x.device, dtype=x.dtype)
        logits = self.head(self.blocks(x, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def trace(out: Path, device: torch.device, rank: int) -> None:
    """Rank 0 writes one step; the others take part in it."""
    torch.manual_seed(0)
    model = SmallGPT().to(device, torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    tokens = torch.randint(_VOCABULARY, (_BATCH, _CONTEXT + 1), device=device)

    def step() -> None:
        with record_function("forward"):
            loss = model(tokens)
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            optimizer.step()
        with record_function("zero_grad"):
            optimizer.zero_grad()

    for _ in range(_WARM_UP_STEPS):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(out))


def _rank() -> None:
    spec, device = join()
    trace(Path(spec["out"]), device, dist.get_rank())
    leave({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/profile.json"), metavar="FILE")
    out = parser.parse_args().out.absolute()
    if torch.cuda.is_available():
        trace(out, torch.device("cuda"), rank=0)
    else:
        launch("benchmarks.profile_step", _NUM_RANKS, {"out": str(out)})
    print(f"{out}: open it in https://ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    _rank() if "RANK" in os.environ else main()
