"""save_checkpoint and load_checkpoint against the disk's rate, torch.save of the gathered state, and DeepSpeed."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyzero

from . import peers
from .harness import relative
from .options import Options
from .rows import Row, timed_row
from .timing import clock, in_turns

_NUMEL = 24 * 2**20
_WIDTH = 2048
_REPEATS = 5
_BLOCK = 2**22
MACHINE = ("torch.save, fsync", "disk: write, fsync", "torch.load", "disk cache: read")
_BYTES = {"save": 14, "load": 12}  # bf16 weights, masters and two moments; a load makes the weights from the masters

Call = Callable[[], object]


def run(options: Options) -> list[Row]:
    num_layers = max((options.numel or (_NUMEL // 4 if options.quick else _NUMEL)) // _WIDTH**2, 1)
    model = _model(num_layers)
    optimizer = pyzero.FusedZeroAdamW(model.parameters())
    model(torch.randn(2, _WIDTH).bfloat16()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    numel = num_layers * _WIDTH**2
    folder = Path(tempfile.mkdtemp(dir=".", prefix=".benchmark_"))  # not /tmp, which may be in memory
    try:
        return _rows(_jobs(model, optimizer, folder, numel, options), numel)
    finally:
        shutil.rmtree(folder)


def _jobs(model: nn.Module, optimizer: Any, folder: Path, numel: int, options: Options) -> dict[str, dict[str, Call]]:
    """The calls to time, by direction. Ours comes first."""
    raw, gathered = folder / "raw", folder / "gathered.pt"
    steps = iter(range(10**6))

    def write_raw() -> None:
        with open(f"{raw}.new", "wb", buffering=0) as file:
            for _ in range(_BYTES["save"] * numel // _BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        os.replace(f"{raw}.new", raw)  # removes the previous file, as keep=1 does

    def read_raw() -> None:
        with open(raw, "rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass

    def save_gathered() -> None:
        with open(f"{gathered}.new", "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.full_state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{gathered}.new", gathered)

    def load_gathered() -> None:
        state = torch.load(gathered, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        pyzero.save_checkpoint(folder / "ours", model=model, optimizer=optimizer, step=next(steps), keep=1)

    def load() -> None:
        pyzero.load_checkpoint(folder / "ours", model=model, optimizer=optimizer)

    block = os.urandom(_BLOCK)
    before = [param.detach().clone() for param in model.parameters()]
    save()
    for param in model.parameters():
        param.data.zero_()
    load()
    assert all(map(torch.equal, model.parameters(), before)), "load_checkpoint gives other weights than were saved"
    jobs: dict[str, dict[str, Call]] = {
        "save": {"pyzero": save, MACHINE[0]: save_gathered, MACHINE[1]: write_raw},
        "load": {"pyzero": load, MACHINE[2]: load_gathered, MACHINE[3]: read_raw},
    }
    if peers.is_there("deepspeed", options):
        with options.trying("DeepSpeed ZeRO-2"):
            engine = _deepspeed_engine(len(list(model.parameters())))
            where = str(folder / "deepspeed")
            jobs["save"]["DeepSpeed ZeRO-2, no fsync"] = lambda: engine.save_checkpoint(where, tag="last")
            jobs["load"]["DeepSpeed ZeRO-2"] = lambda: engine.load_checkpoint(where, tag="last")
    return jobs


def _model(num_layers: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(num_layers)]).bfloat16()


def _deepspeed_engine(num_layers: int) -> Any:
    import deepspeed
    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires what its launcher sets
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    model = _model(num_layers)
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config, dist_init_required=False)
    engine.backward(engine(torch.randn(2, _WIDTH).bfloat16()).sum())
    engine.step()
    return engine


def _rows(jobs: dict[str, dict[str, Call]], numel: int) -> list[Row]:
    """Caches are not flushed, because reads are served from the disk's cache."""
    rows = []
    for direction, calls in jobs.items():
        samplers = {name: functools.partial(clock, call) for name, call in calls.items()}
        times = in_turns(samplers, _REPEATS, f"checkpoint, {direction}")
        found = []
        for name, samples in times.items():
            num_bytes = _BYTES[direction] if name == "pyzero" else _BYTES["save"]
            row = timed_row(
                "checkpoint", direction, name, samples, numel, peer="deepspeed" if "DeepSpeed" in name else None
            )
            rate = num_bytes * numel / row.median_s / 1e9
            found.append(dataclasses.replace(row, bytes_per_element=num_bytes, gb_per_s=rate))
        rows += relative(found)
    return rows
