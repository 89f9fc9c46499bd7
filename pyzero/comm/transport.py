"""What a transport of gradients and weights is, and the two that use collectives of torch.distributed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero import memory
from pyzero.comm.group import Group, Work

# torch 2.13 renames this, and warns of the old name; 2.11 has no new one.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Exchange:
    """A reduce-scatter under way: after `work.wait()` the slices are there to be summed, in rank order."""

    work: Work
    slices: list[Tensor]  # (shard_numel,) each, in the dtype that was sent
    send: Tensor  # kept until read by all
    by_rank: bool = True  # slices[r] is rank r's; otherwise the one slice is a sum over ranks
    release: Callable[[], None] = lambda: None  # called once the slices have been read


@dataclass(frozen=True)
class FlatWeights:
    """The memory that one bucket's weights lie in: this rank's, and where it can write them the other ranks'."""

    flat: Tensor  # (numel,)
    peers: Sequence[Tensor] = ()  # (numel,) each, written between begin_update and end_update alone; or none
    owner: Any = None  # keeps the memory alive


class Transport(ABC):
    """Brings a bucket's gradients to the ranks that hold its shards, and their weights back to all."""

    def __init__(self, group: Group) -> None:
        self.group = group

    @abstractmethod
    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:
        """Make room for what one step sends. Collective, the same on all ranks; nothing may be under way.

        Args:
            buckets: For each bucket, bytes of gradients to send, and of weights in a shard.
            num_params: How many parameters the optimizer has.
        """

    @abstractmethod
    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """(numel,) memory to pack what the next `start` sends into, on the current stream.

        side: The stream of a GPU that `start`, and whoever waits for its work, run on; None: the current one.
        """

    @abstractmethod
    def start(self, send: Tensor, what: str) -> Exchange:
        """Send each rank its slice of (size * n,) `send`; `what` names it where it fails."""

    def weights(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatWeights:
        """Zeros for the weights of a bucket. Collective, the same on all ranks."""
        return FlatWeights(memory.zeros(numel, dtype, device))

    def begin_update(self) -> None:  # noqa: B027  (most write no memory but their own)
        """Called before a step writes weights, on all ranks: after it none of them still reads the old ones."""

    @abstractmethod
    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """Fill (size * n,) `flat` with every rank's (n,) `shard`, which is this rank's part of it.

        peers: (n,) each: the same part in the memory of the other ranks, where `weights` has given that.
        """

    def end_update(self) -> None:  # noqa: B027
        """Called when all weights of a step are on their way: after it all are there, on all ranks."""


class _LibraryTransport(Transport):
    """Allocates buffers when they are needed, and gathers by torch.distributed."""

    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:
        """See Transport. Nothing is needed."""

    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """See Transport. Of the side stream's memory, which that stream's waits have made free.

        A host that runs ahead of its GPU would take new memory for each bucket from the current stream's.
        """
        if side is None:
            return memory.empty(numel, dtype, device)
        with torch.cuda.stream(side):
            made = memory.empty(numel, dtype, device)
        torch.cuda.current_stream(device).wait_stream(side)
        return made

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport."""
        return self.group.all_gather_into(flat, shard)


class ExactTransport(_LibraryTransport):
    """Sends slices by all-to-all; the sum is ours: in fp32 and rank order, the same whatever else the bucket holds."""

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport."""
        received = memory.empty(send.numel(), send.dtype, send.device)
        work = self.group.start(what, dist.all_to_all_single, received, send)
        return Exchange(work, list(received.view(self.group.size, -1).unbind(0)), send)


class CollectiveTransport(_LibraryTransport):
    """Uses the library's reduce-scatter, which sums in the dtype that is sent and in an order of its own."""

    def start(self, send: Tensor, what: str) -> Exchange:
        """Sum (size * n,) `send` over ranks; this rank receives its slice of the sum."""
        received = memory.empty(send.numel() // self.group.size, send.dtype, send.device)
        work = self.group.start(what, _reduce_scatter, received, send, op=dist.ReduceOp.SUM)
        return Exchange(work, [received], send, by_rank=False)
