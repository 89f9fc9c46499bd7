"""Runs a bench on several ranks: one process each, with one thread each, so that all have the same cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from .environment import ROOT
from .timing import Ticks

_TIMEOUT_S = 600
_END_S = 10  # for the launcher to end its ranks
_RESULT = "benchmark result: "  # begins the line of rank 0 that `launch` returns: libraries print lines of their own
_RANK_TIMEOUT = timedelta(seconds=120)


def launch(module: str, num_ranks: int, spec: dict[str, Any], environ: dict[str, str] | None = None) -> Any:
    """Run `python -m module` on ranks, which get `spec` as JSON. Returns what rank 0 passes to `leave`.

    Raises:
        AssertionError: A rank failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        **(environ or {}),
    }
    env.pop("PYZERO_NUM_THREADS", None)  # else ours alone would have more threads than OMP_NUM_THREADS
    what = f"{module.rpartition('.')[2]} on {num_ranks} ranks"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, module, json.dumps(spec)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        limit = threading.Timer(_TIMEOUT_S, process.terminate)
        limit.start()
        try:
            found = _read(process, what)
            status = process.wait()
        finally:
            timed_out = limit.finished.is_set()
            limit.cancel()
            _end(process)
        if status != 0 or found is None:
            errors.seek(0)
            why = f"they took more than {_TIMEOUT_S} s:\n" if timed_out else "\n"
            raise AssertionError(f"the ranks failed:{why}{_cause(errors.read())}")
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """End the launcher, which ends its ranks, after a Ctrl-C or an error here."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[str], what: str) -> Any:
    found = None
    assert process.stdout is not None
    with tqdm(total=1, desc=what, leave=False, disable=None) as bar:
        for line in process.stdout:
            before, is_result, result = line.partition(_RESULT)
            if is_result:
                found = json.loads(result)
            elif ticks := Ticks.read(before):
                bar.n, bar.total = ticks
                bar.refresh()
    return found


def _cause(text: str) -> str:
    """The error of the first rank that raised; if none has, also the launcher's report, which says how one ended."""
    raised, _, report = text.partition("torch/distributed/elastic")
    return raised[-2000:] if "Error" in raised else (raised + report)[-2000:]


def join() -> tuple[dict[str, Any], torch.device]:
    """In a rank: the `spec` of `launch`, and the device."""
    spec = json.loads(sys.argv[1])
    on_gpu = spec.get("device") == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_RANK_TIMEOUT)
    return spec, device


def leave(found: Any) -> None:
    """End this rank. `launch` returns what rank 0 passes."""
    if dist.get_rank() == 0:
        print(_RESULT + json.dumps(found), flush=True)
    dist.destroy_process_group()


def refuse_more_than_gpus(num_ranks: int) -> None:
    """NCCL needs one GPU per rank.

    Raises:
        RuntimeError: There are fewer GPUs than ranks.
    """
    if num_ranks > torch.cuda.device_count():
        raise RuntimeError(
            f"got --ranks {num_ranks} with {torch.cuda.device_count()} GPUs; pass --ranks, or --device cpu"
        )
