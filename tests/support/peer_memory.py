"""The peer transport of GPUs without a GPU: shared memory of the host replaces symmetric memory."""

from typing import Any

import pytest
import torch
from ranks import ON_GPU
from torch import Tensor

from pyzero.comm import make_transport
from pyzero.comm.group import Group
from pyzero.comm.shared_memory import SharedMemory
from pyzero.comm.symmetric_memory_transport import SymmetricBytes, SymmetricMemoryTransport


class HostMemory:
    """Replaces the symmetric memory of GPUs by the ranks' rings, and a barrier of their counters."""

    num_shared = 0

    def __init__(self, group: Group) -> None:
        self.group = group

    def empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def share(self, own: Tensor) -> SymmetricBytes:
        group, num_bytes = self.group, own.numel()
        host = SharedMemory(group.rank, range(group.size), group.gather_objects, None)
        host.reserve(num_bytes, 1, group.gather_objects)
        num_barriers = 0

        def barrier() -> None:
            nonlocal num_barriers
            num_barriers += 1
            host.post()
            host.posted(num_barriers).wait()

        return SymmetricBytes([host.tensor(rank, 0, num_bytes, torch.uint8) for rank in range(group.size)], barrier)


def through_peers(group: Any, job: Any, *args: Any) -> Any:
    """Run a job whose transport="peer" is that of GPUs, on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(make_transport, "_through_memory", lambda ranks, device: made(ranks, device))
        return job(group, *args)


def made(group: Group, device: torch.device) -> SymmetricMemoryTransport:
    return SymmetricMemoryTransport(group, device, HostMemory(group))
