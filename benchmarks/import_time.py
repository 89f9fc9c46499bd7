"""What `import pyzero` and its names add to `import torch`, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys

from .build_time import fresh_env
from .options import Options
from .rows import Row, timed_row

_PROGRAM = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
{statement}
elapsed = time.perf_counter() - start
assert "pyzero" in sys.modules and not torch.cuda.is_initialized()
assert not [name for name in sys.modules if "_native_" in name], "the import has loaded kernels"
print(elapsed)
"""
_STATEMENTS = ("import pyzero", "from pyzero import FusedZeroAdamW")


def run(options: Options) -> list[Row]:
    repeats = 1 if options.numel else 3 if options.quick else 7
    rows = []
    for statement in _STATEMENTS:
        samples = [_measure(statement) for _ in range(repeats)]
        rows.append(timed_row("import", "after import torch", statement, samples))
    return rows


def _measure(statement: str) -> float:
    program = _PROGRAM.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", program], env=fresh_env({}), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{statement} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout)
