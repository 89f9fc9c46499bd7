"""A bench on two ranks: a process each, one thread each, so that all make of the same cores what they can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

NUM_RANKS = 2


def launch(module: str, *args: object) -> Any:
    """What rank 0 of `python -m module args` has printed as JSON, on a line of its own.

    Raises:
        AssertionError: A rank failed.
    """
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}", "-m"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
    }
    command += [module, *map(str, args)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise AssertionError(f"the ranks failed:\n{done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
