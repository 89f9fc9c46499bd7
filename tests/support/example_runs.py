"""Runs programs of examples/ and docs/ in separate processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


TRAIN_GPT = ROOT / "examples" / "train_gpt.py"


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


TINY = ("--layers", "1", "--width", "32", "--heads", "2", "--context", "32", "--batch", "4", "--sample-bytes", "8")


def environ():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*command):
    done = subprocess.run(
        [str(word) for word in command], env=environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(before)
