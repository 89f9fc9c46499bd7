"""Training on three gloo ranks of which rank 1 fails: `fault_worker.py DIR NAME...` runs the cases of test_faults.py.

A name is that of a case, such as "peer-killed-backward-2". All ranks are forked from one process that has imported
torch, because the import takes longer than the training. Each rank ends like a script, by the interpreter's exit. Its
output goes to DIR/NAME/RANK.out and RANK.err. When and how the ranks ended is printed as JSON.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyzero
from pyzero.comm import group
from pyzero.comm.work import CollectiveError

NUM_RANKS = 3
BAD_RANK = 1
BAD_STEP = 2
NUM_RETRIES = 3
TIMEOUT_S = 5
GIVE_UP_S = 60
NUM_LAYERS = 4
BUCKET_MIB = 6 / 1024  # each bucket has one weight of 32 x 32 in fp32


def fail(how: str, folder: Path) -> None:
    (folder / "failed_at").write_text(str(time.monotonic()))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stalled":
        os.kill(os.getpid(), signal.SIGSTOP)  # stopped until every other rank has ended
    else:
        raise ArithmeticError("a bug of rank 1")


def arm(where: str, fault: Callable[[], None], layers: nn.Sequential, optimizer: pyzero.FusedZeroAdam) -> None:
    """Have `fault` called in the middle of the next forward, backward or step, or between backward and step."""

    def watch_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: fault())

    def update_with_fault(bucket: Any, *args: Any) -> None:
        if bucket.index == 1:
            fault()
        update(bucket, *args)

    middle, update = layers[NUM_LAYERS // 2], optimizer._updater.update
    if where == "forward":
        middle.register_forward_pre_hook(lambda module, args: fault())
    elif where == "backward":
        middle.register_forward_hook(watch_gradient)
    elif where == "between":
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: fault())
    else:
        optimizer._updater.update = update_with_fault  # type: ignore[method-assign]


def make_store(rank: int, folder: Path, transport: str) -> dist.Store:
    """The store through which ranks meet. That of "exact" is in the memory of the rank that fails."""
    if transport != "exact":
        return dist.FileStore(str(folder / "store"), NUM_RANKS)
    port = folder / "port"
    if rank == BAD_RANK:
        store = dist.TCPStore("localhost", 0, NUM_RANKS, is_master=True, wait_for_workers=False)
        (folder / "written").write_text(str(store.port))
        (folder / "written").rename(port)
        return store
    while not port.exists():
        time.sleep(0.01)
    return dist.TCPStore("localhost", int(port.read_text()), NUM_RANKS, wait_for_workers=False)


def train(rank: int, folder: Path, transport: str, how: str, where: str, stage: str, then: str = "") -> None:
    torch.set_num_threads(1)
    store = make_store(rank, folder, transport)
    if transport == "hosts":  # ranks 0 and 1 are on one host, rank 2 on another
        hosts.place(pytest.MonkeyPatch(), rank // 2, folder)
        transport = "peer"
    if transport == "rooted":  # messages go through rank 0, as with many ranks
        group._MOST_IN_RING = 1
        transport = "exact"
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timeout)
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(NUM_LAYERS)])
    optimizer = pyzero.FusedZeroAdamW(
        layers.parameters(), stage=int(stage), bucket_cap_mb=BUCKET_MIB, transport=transport
    )
    assert len(optimizer._buckets) == NUM_LAYERS

    def step() -> None:
        optimizer.zero_grad()
        layers(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        print("stepped", flush=True)

    try:
        for number in range(BAD_STEP + 2):
            if (rank, number) == (BAD_RANK, BAD_STEP):
                arm(where, lambda: fail(how, folder), layers, optimizer)
            step()
    except CollectiveError:
        for _ in range(NUM_RETRIES if then == "retried" else 0):  # like a script that tries to go on
            try:
                step()
            except CollectiveError:
                print("refused", flush=True)
        raise
    finally:
        if then == "tidied":
            dist.destroy_process_group()


def run_as_rank(rank: int, folder: Path) -> None:
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY, 0o644), descriptor)
    train(rank, folder, *folder.name.split("-"))
    sys.exit()


class Processes:
    """The ranks of all cases, and how they ended: (exit code, time) by case and rank, or None if a rank did not end."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[str, int]] = {}
        self.ended: dict[str, list[Any]] = {}

    def start(self, folder: Path) -> None:
        """Fork the ranks of one case, and wait until one has failed."""
        folder.mkdir()
        self.ended[folder.name] = [None] * NUM_RANKS
        for rank in range(NUM_RANKS):
            pid = os.fork()
            if pid == 0:
                run_as_rank(rank, folder)
            self._running[pid] = (folder.name, rank)
        self._reap_until((folder / "failed_at").exists)

    def finish(self) -> None:
        """Wait for all ranks, and kill those that do not end."""
        self._reap_until(lambda: not self._running)
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _reap_until(self, done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + GIVE_UP_S
        while not done() and time.monotonic() < give_up_at:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.01)
                continue
            name, rank = self._running.pop(pid)
            self.ended[name][rank] = (os.waitstatus_to_exitcode(status), time.monotonic())
            left = [pid for pid, (other, _) in self._running.items() if other == name]
            if len(left) == 1:
                os.kill(left[0], signal.SIGCONT)  # only the stopped rank is left: resume it


def main(root: Path, names: list[str]) -> None:
    pyzero.FusedZeroAdamW([nn.Parameter(torch.zeros(1))]).step()  # torch imports much at the first step
    gc.collect()
    gc.freeze()  # without it, the exit visits all of torch's objects, which takes a second
    processes = Processes()
    for name in names:
        processes.start(root / name)
    processes.finish()
    print(json.dumps(processes.ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
