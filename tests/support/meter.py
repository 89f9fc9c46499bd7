"""Measures the memory of living tensors."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyzero
from pyzero.comm.work import Work
from pyzero.sharding.local_param import local_of


@contextmanager
def gloo_lets_go() -> Iterator[None]:
    """Make each wait 2 ms longer: gloo's thread releases its buffers shortly after it has reported completion."""
    wait = Work.wait

    def longer(work: Work) -> None:
        wait(work)
        time.sleep(0.002)

    Work.wait = longer
    try:
        yield
    finally:
        Work.wait = wait


class Meter(TorchDispatchMode):
    """Tracks every storage that is created inside, and keeps the largest sum of those that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._shared = 0
        self._known: dict[int, tuple[int, int]] = {}  # address range of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._see(local_of(tensor).untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if any(low <= begin and end <= high for low, high in self._known.values()):
            return  # a parameter's storage, inside its bucket's
        self._known[key] = begin, end
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def know_shared(self, optimizer: pyzero.FusedZeroAdam) -> None:
        """Count this rank's own part of the memory that ranks share. The other parts count for their ranks."""
        memory = optimizer._group.shared_memory
        if memory is None:
            return
        self.now += memory.ring_bytes - self._shared
        self._shared = memory.ring_bytes
        for rank, shared in memory._mapped.items():
            begin = shared.tensor(0, 1, torch.uint8).data_ptr()
            self._known[-1 - rank] = begin, begin + len(shared.pages) - shared._begin

    def _gone(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self.now -= num_bytes
