"""Cold builds at first use: the C++ module, and the CUDA module for one architecture if nvcc is found."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyzero.ops import build_spec, env

from .options import Options
from .rows import Row, timed_row

_CUDA_ARCH = "90"
_PROGRAM = """
import sys, torch
from pyzero.ops import jit
print(jit.build(jit.make_spec(sys.argv[1])))
"""


def run(options: Options) -> list[Row]:
    rows = [timed_row("build", "cold, 1 run", "C++ module, 3 instruction sets", [_cold("cpu")])]
    if _has_nvcc():
        rows.append(timed_row("build", "cold, 1 run", f"CUDA module, sm_{_CUDA_ARCH}", [_cold("cuda")]))
    return rows


def _has_nvcc() -> bool:
    try:
        build_spec.find_nvcc(env.cuda_home())
    except build_spec.ToolchainError:
        return False
    return True


def _cold(kind: str) -> float:
    """Seconds to build the module's file from nothing, without the start of Python. Checks its stamp."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"PYZERO_CACHE_DIR": cache, "PYZERO_CUDA_ARCHS": _CUDA_ARCH}
        env_now = fresh_env(settings)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], env=env_now, check=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _PROGRAM, kind], env=env_now, stdout=subprocess.PIPE, text=True)
        elapsed = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"building the {kind} module failed; its output is above")
        module = Path(done.stdout.strip().splitlines()[-1])
        assert build_spec.read_stamp(module) is not None, f"{module} carries no stamp"
        return elapsed - (started - start)


def fresh_env(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment, with the checkout on the path and `extra`."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **extra}
