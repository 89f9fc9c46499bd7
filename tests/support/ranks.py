"""One pool of four gloo workers, shared by all tests: `ranks.run(3, fn, x)` calls fn(group, x) on three of them.

A worker is forked from a process of its rank that has imported torch, which takes longer than most tests: another one,
without what tests leave behind, costs next to nothing, and ranks have their own addresses and order of sets, as a
launcher's have.

PYZERO_TEST_DEVICE=cuda has all of them make their tensors on the one GPU; then each is a process of its own.
"""

import gc
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

NUM_WORKERS = 4
TIMEOUT_S = 60
MAX_JOBS = 500  # of a worker, more or less: what tests have imported and left behind slows it down by up to five times
MAX_GROUPS = 1000  # made by one job
MAX_THREADS = 200  # three for each process group; with up to 900 tests/parallel took 8 min, renewed 4
ON_GPU = "PYZERO_TEST_DEVICE" in os.environ
FORKS = not ON_GPU  # no fork survives a CUDA that runs


def _fork_workers(rank: int, inbox: Any, outbox: Any, told: Any) -> None:
    """One after another, each for a store out of `inbox`; `told` gets its process id, then how it ended."""
    import pytest  # noqa: F401  what tests use, once
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    worker = 0

    def end(*_: Any) -> None:
        if worker:
            os.kill(worker, signal.SIGKILL)
        os._exit(1)

    if not FORKS:
        told.send(os.getpid())
        _serve(rank, inbox.get(), inbox, outbox)
        told.send(0)
        return
    signal.signal(signal.SIGTERM, end)
    gc.collect()
    gc.freeze()
    while (store := inbox.get()) is not None:
        worker = os.fork()
        if not worker:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                _serve(rank, store, inbox, outbox)
                outbox.close()
                outbox.join_thread()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        told.send(worker)
        _, status = os.waitpid(worker, 0)
        worker = 0
        told.send(status)
        if status:
            return


def _serve(rank: int, store: str, inbox: Any, outbox: Any) -> None:
    import pytest
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if ON_GPU:
        torch.set_default_device(os.environ["PYZERO_TEST_DEVICE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_WORKERS, timeout=timedelta(seconds=TIMEOUT_S)
    )
    limit = timedelta(seconds=TIMEOUT_S)  # a new group does not inherit it
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in range(1, NUM_WORKERS + 1)}
    while (job := inbox.get()) is not None:
        number, size, fn, args = job
        # From torch 2.14 on groups are named by how many a rank has asked for, and jobs of some ranks ask for some.
        dist.distributed_c10d._world.group_count = number * MAX_GROUPS
        gc.collect()
        gc.freeze()  # the search for modules at construction looks at this job's objects alone, not at a million others
        try:
            outbox.put((number, rank, True, fn(groups[size], *args)))
        except (Exception, pytest.fail.Exception):  # handed to the test, which fails with it
            outbox.put((number, rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """The pool. Functions and arguments are pickled: pass functions of a test module's top level."""

    def __init__(self) -> None:
        self._processes: list[Any] = []  # that workers are forked from
        self._workers: list[int] = []  # process ids
        self._num_jobs = 0
        self._jobs_before = 0  # these workers were started
        self._folder: Path | None = None  # of the tests that they run

    def _start(self) -> None:
        if not self._processes:
            self._start_processes()
        self._jobs_before = self._num_jobs
        self._dir = tempfile.TemporaryDirectory()
        for inbox in self._inboxes:
            inbox.put(os.path.join(self._dir.name, "store"))
        self._workers = [told.recv() for told in self._told]

    def _start_processes(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(NUM_WORKERS)]
        self._told, tell = zip(*(context.Pipe(duplex=False) for _ in range(NUM_WORKERS)), strict=True)
        self._processes = [
            context.Process(target=_fork_workers, args=(rank, inbox, self._outbox, tell[rank]), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process, end in zip(self._processes, tell, strict=True):
            process.start()
            end.close()

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """[fn(group, *args) of rank 0, of rank 1, ...]; a rank that raises fails the test with its traceback."""
        if not self._workers:
            self._start()
        self._num_jobs += 1
        for inbox in self._inboxes[:size]:
            inbox.put((self._num_jobs, size, fn, args))
        answers: list[tuple[int, bool, Any]] = []
        while len(answers) < size:
            number, *answer = self._outbox.get(timeout=5 * TIMEOUT_S)
            if number == self._num_jobs:  # an older one is of a test that gave up
                answers.append(tuple(answer))
        failures = [f"rank {rank}:\n{text}" for rank, ok, text in answers if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]

    def renew(self, folder: Path) -> None:
        """Before a module of tests in `folder`: end workers that ran another folder's, or too much."""
        is_spent = self._num_jobs - self._jobs_before >= MAX_JOBS or self._num_threads() > MAX_THREADS
        if folder != self._folder or is_spent:
            self._stop_workers()
        self._folder = folder

    def _num_threads(self) -> int:
        """Of the first worker; 0 where nobody says."""
        tasks = Path(f"/proc/{self._workers[0]}/task") if self._workers else Path()
        return len(list(tasks.iterdir())) if tasks.name == "task" and tasks.is_dir() else 0

    def _stop_workers(self) -> None:
        if not self._workers:
            return
        for inbox in self._inboxes:
            inbox.put(None)
        self._workers = []
        has_ended = [told.poll(10) and told.recv() == 0 for told in self._told]
        if not all(has_ended) or not FORKS:
            self._stop_processes()  # a worker that hangs or died may hold a lock of a queue

    def _stop_processes(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._processes = []

    def stop(self) -> None:
        """End the workers, and what they are forked from."""
        self._stop_workers()
        self._stop_processes()
