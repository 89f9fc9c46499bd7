"""One pool of four gloo workers, shared by all tests: `ranks.run(3, fn, x)` calls fn(group, x) on three of them.

PYZERO_TEST_DEVICE=cuda has all of them make their tensors on the one GPU.
"""

import gc
import multiprocessing
import os
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


def _serve(rank: int, store: str, inbox: Any, outbox: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if "PYZERO_TEST_DEVICE" in os.environ:
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
        except Exception:  # handed to the test, which fails with it
            outbox.put((number, rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """The pool. Functions and arguments are pickled: pass functions of a test module's top level."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._num_jobs = 0
        self._jobs_before = 0  # these workers were started
        self._folder: Path | None = None  # of the tests that they run

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs_before = self._num_jobs
        self._dir = tempfile.TemporaryDirectory()
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(NUM_WORKERS)]
        store = os.path.join(self._dir.name, "store")
        self._processes = [
            context.Process(target=_serve, args=(rank, store, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """[fn(group, *args) of rank 0, of rank 1, ...]; a rank that raises fails the test with its traceback."""
        if not self._processes:
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
            self.stop()
        self._folder = folder

    def _num_threads(self) -> int:
        """Of the first worker; 0 where nobody says."""
        tasks = Path(f"/proc/{self._processes[0].pid}/task") if self._processes else Path()
        return len(list(tasks.iterdir())) if tasks.name == "task" and tasks.is_dir() else 0

    def stop(self) -> None:
        """End the workers."""
        for inbox in self._inboxes if self._processes else ():
            inbox.put(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._processes = []
