"""In place of DeepSpeed's tests/unit/common.py, whose own starts a process for every rank of every test.

DistributedTest here runs a test on gloo ranks that stay, one pool of each size; each test has a group of its own.
After a test of several ranks that failed its pool is thrown away, for one may hang.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import queue
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT_S = 60
GROUP_TIMEOUT_S = 20


class DistributedTest:
    """Base of their test classes."""

    world_size = 2


class DistributedFixture(DistributedTest):
    """Of tests that save on one number of ranks and load on another; none of those that are run here."""


def preferred_dtype() -> torch.dtype:
    return torch.bfloat16


def get_start_method_for_platform() -> str:
    return torch.multiprocessing.get_all_start_methods()[-1]


def get_test_path(filename: str) -> str:
    return str(Path(os.environ["PEER_ROOT"]) / "unit" / filename)


def allclose_on_all_ranks(actual: Any, expected: Any, assert_message: str | None = None, **kwargs: Any) -> None:
    """Every rank fails where one does, as in DeepSpeed's: nobody is waited for."""
    try:
        torch.testing.assert_close(actual, expected, **kwargs)
        error = None
    except AssertionError as caught:
        error = str(caught)
    if not dist.is_initialized():
        errors = [error]
    else:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if any(errors):
        raise AssertionError(f"{assert_message or 'tensors differ'}: {next(filter(None, errors))}")


def _load(path: str) -> Any:
    """The test file as a module, once for each process."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _join(rank: int, size: int, store: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)


def _serve(rank: int, size: int, inbox: Any, outbox: Any) -> None:
    import deepspeed_side  # noqa: F401  `import deepspeed` means this package from here on

    torch.set_num_threads(1)
    while (job := inbox.get()) is not None:
        path, cls, name, kwargs, store = job
        try:
            _join(rank, size, store)
            getattr(getattr(_load(path), cls)(), name)(**kwargs)
            dist.barrier()
            outbox.put((rank, "passed", ""))
        except pytest.skip.Exception as skipped:
            outbox.put((rank, "skipped", str(skipped)))
        except BaseException:
            outbox.put((rank, "failed", traceback.format_exc()))
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """Ranks that wait for tests."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, test: Callable[..., Any], cls: type, kwargs: dict[str, Any]) -> list[tuple[str, str]]:
        """(outcome, text) of each rank that answers in time."""
        store = os.path.join(tempfile.mkdtemp(), "store")
        path = sys.modules[cls.__module__].__file__
        for inbox in self._inboxes:
            inbox.put((path, cls.__name__, test.__name__, kwargs, store))
        answers = []
        try:
            for _ in range(self.size):
                answers.append(self._outbox.get(timeout=TIMEOUT_S)[1:])
        except queue.Empty:
            answers.append(("failed", f"TimeoutError: no answer in {TIMEOUT_S} s"))
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
