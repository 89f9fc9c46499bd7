"""A bench on several ranks: a process each, one thread each, so that all make of the same cores what they can."""

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
_RANK_TIMEOUT = timedelta(seconds=120)


def launch(module: str, num_ranks: int, spec: dict[str, Any], environ: dict[str, str] | None = None) -> Any:
    """What rank 0 of `python -m module` has printed as JSON, on a line of its own; ranks are given `spec` as JSON.

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
    what = f"{module.rpartition('.')[2]} on {num_ranks} ranks"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, module, json.dumps(spec)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        limit = threading.Timer(_TIMEOUT_S, process.terminate)
        limit.start()
        try:
            found = _read(process, what)
        finally:
            limit.cancel()
        if process.wait() != 0 or found is None:
            errors.seek(0)
            raise AssertionError(f"the ranks failed:\n{_cause(errors.read())}")
    return found


def _read(process: subprocess.Popen[str], what: str) -> Any:
    found = None
    assert process.stdout is not None
    with tqdm(total=1, desc=what, leave=False, disable=None) as bar:
        for line in process.stdout:
            if line.startswith(Ticks.WORD):
                bar.n, bar.total = map(int, line.split()[1:])
                bar.refresh()
            elif line.startswith("{"):
                found = json.loads(line)
    return found


def _cause(text: str) -> str:
    """What the first rank that raised has said; the launcher's own report of it follows, and tells less."""
    return text.partition("torch/distributed/elastic")[0][-2000:] or text[-2000:]


def join() -> tuple[dict[str, Any], torch.device]:
    """In a rank: what `launch` was given, and the device."""
    spec = json.loads(sys.argv[1])
    on_gpu = spec.get("device") == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_RANK_TIMEOUT)
    return spec, device


def leave(found: Any) -> None:
    """In a rank: the end; rank 0's is what `launch` returns."""
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def refuse_more_than_gpus(num_ranks: int) -> None:
    """NCCL wants a GPU for each.

    Raises:
        RuntimeError: There are fewer.
    """
    if num_ranks > torch.cuda.device_count():
        raise RuntimeError(
            f"got --ranks {num_ranks} with {torch.cuda.device_count()} GPUs; pass --ranks, or --device cpu"
        )
