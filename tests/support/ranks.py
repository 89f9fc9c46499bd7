"""One pool of four gloo workers, shared by all tests: `ranks.run(3, fn, x)` calls fn(group, x) on three of them.

Each rank has a process that has imported torch, which takes longer than most tests. Workers are forked from it, so that
a new one, without the leftovers of tests, costs next to nothing. Ranks have their own addresses and orders of sets, as
with a launcher.

With PYZERO_TEST_DEVICE=cuda all workers make their tensors on the one GPU. They are then not forked.
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
MAX_JOBS = 500  # about so many per worker: imports and leftovers of tests slow it down by up to five times
MAX_GROUPS = 1000  # made by one job
MAX_THREADS = 200  # a process group has three; with up to 900, tests/parallel took 8 min, with new workers 4
ON_GPU = "PYZERO_TEST_DEVICE" in os.environ
FORKS = not ON_GPU  # CUDA does not survive a fork


def _fork_workers(rank: int, inbox: Any, outbox: Any, told: Any) -> None:
    """Fork one worker after another, each for a store from `inbox`. Send its process id, then its status, to `told`."""
    import pytest  # noqa: F401  imported once for all workers
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
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # the ranks share a GPU
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_WORKERS, timeout=timedelta(seconds=TIMEOUT_S)
    )
    limit = timedelta(seconds=TIMEOUT_S)  # a new group does not inherit it
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in range(1, NUM_WORKERS + 1)}
    while (job := inbox.get()) is not None:
        number, size, fn, args = job
        # From torch 2.14 on, a group's name has the number of groups that a rank has made. Some jobs run on some ranks.
        dist.distributed_c10d._world.group_count = number * MAX_GROUPS
        gc.collect()
        gc.freeze()  # an optimizer's search for modules then sees only this job's objects, not a million
        try:
            outbox.put((number, rank, True, _in_host_memory(fn(groups[size], *args))))
        except (Exception, pytest.fail.Exception):  # sent to the test, which fails with it
            outbox.put((number, rank, False, traceback.format_exc()))
    dist.destroy_process_group()


def _in_host_memory(value: Any) -> Any:
    """Copy tensors of a GPU to the host, which are in lists, tuples and dicts: another process may outlive this one."""
    import torch
    from torch.utils._pytree import tree_map

    if not ON_GPU:
        return value
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf, value)


class Ranks:
    """The pool. Functions and arguments are pickled: pass functions of a test module's top level."""

    def __init__(self) -> None:
        self._processes: list[Any] = []  # workers are forked from these
        self._workers: list[int] = []  # process ids
        self._num_jobs = 0
        self._jobs_before = 0  # number of jobs before these workers were started
        self._folder: Path | None = None  # of the tests that these workers run

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
        """Return [fn(group, *args) of rank 0, of rank 1, ...]. If a rank raises, the test fails with its traceback."""
        if not self._workers:
            self._start()
        self._num_jobs += 1
        for inbox in self._inboxes[:size]:
            inbox.put((self._num_jobs, size, fn, args))
        answers: list[tuple[int, bool, Any]] = []
        while len(answers) < size:
            number, *answer = self._outbox.get(timeout=5 * TIMEOUT_S)
            if number == self._num_jobs:  # an older number is from a test that gave up
                answers.append(tuple(answer))
        failures = [f"rank {rank}:\n{text}" for rank, ok, text in answers if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]

    def renew(self, folder: Path) -> None:
        """Before a module of tests in `folder`: end workers that ran another folder's tests, or too many jobs."""
        is_spent = self._num_jobs - self._jobs_before >= MAX_JOBS or self._num_threads() > MAX_THREADS
        if folder != self._folder or is_spent:
            self._stop_workers()
        self._folder = folder

    def _num_threads(self) -> int:
        """Threads of the first worker; 0 if unknown."""
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
            self._stop_processes()  # a worker that hangs or has died may hold a lock of a queue

    def _stop_processes(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._processes = []

    def stop(self) -> None:
        """End the workers, and the processes that they are forked from."""
        self._stop_workers()
        self._stop_processes()
