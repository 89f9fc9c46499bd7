"""The interface of a transport of gradients and weights, and two that use collectives of torch.distributed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero import memory
from pyzero.comm.group import Group
from pyzero.comm.work import Work

# torch 2.13 renames this, and warns of the old name; 2.11 has no new one.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Exchange:
    """A reduce-scatter under way. After `work.wait()` the slices have arrived, to be summed in rank order."""

    work: Work
    slices: list[Tensor]  # (shard_numel,) each, in the dtype that was sent
    send: Tensor  # kept until all ranks have read it
    by_rank: bool = True  # slices[r] is rank r's; otherwise the only slice is a sum over ranks
    release: Callable[[], None] = lambda: None  # called once the slices have been read


@dataclass(frozen=True)
class FlatWeights:
    """The memory of one bucket's weights: this rank's, and the other ranks' if this rank can write it."""

    flat: Tensor  # (numel,)
    peers: Sequence[Tensor] = ()  # (numel,) each, written only between begin_update and end_update; may be empty
    owner: Any = None  # keeps the memory alive


class Transport(ABC):
    """Sends a bucket's gradients to the ranks that hold its shards, and sends the shards' weights back to all."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:  # noqa: B027
        """Make room for what one step sends. Collective, with the same arguments; nothing may be under way.

        Args:
            buckets: For each bucket, the bytes of gradients to send and of weights in a shard.
            num_params: The number of the optimizer's parameters.
        """

    @abstractmethod
    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """Return (numel,) memory for what the next `start` sends. The caller packs it on the current stream.

        side: The GPU stream that `start` and the wait for its work run on; None: the current one.
        """

    @abstractmethod
    def start(self, send: Tensor, what: str) -> Exchange:
        """Send each rank its slice of (size * n,) `send`. `what` names the collective in errors."""

    def weights(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatWeights:
        """Return zeros for the weights of a bucket. Collective, with the same arguments."""
        return FlatWeights(memory.zeros(numel, dtype, device))

    def begin_update(self) -> None:  # noqa: B027  (most transports write only this rank's memory)
        """Called on all ranks before a step writes weights. After it no rank still reads the old ones."""

    @abstractmethod
    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """Fill (size * n,) `flat` with every rank's (n,) `shard`. `shard` is this rank's part of `flat`.

        peers: (n,) each: the same part in other ranks' memory, if `weights` has returned that memory.
        """

    def end_update(self) -> None:  # noqa: B027
        """Called when all weights of a step have been sent. After it all have arrived, on all ranks."""


class _LibraryTransport(Transport):
    """Allocates buffers when they are needed, and gathers by torch.distributed."""

    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """See Transport. Takes memory of the side stream, which is free again after that stream's waits.

        From the current stream, a host that runs ahead of its GPU would take new memory for each bucket.
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
    """Sends slices by all-to-all. pyzero sums them in fp32 and rank order, so a sum does not depend on its bucket."""

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport."""
        received = memory.empty(send.numel(), send.dtype, send.device)
        work = self.group.start(what, dist.all_to_all_single, received, send)
        return Exchange(work, list(received.view(self.group.size, -1).unbind(0)), send)


class CollectiveTransport(_LibraryTransport):
    """Uses the library's reduce-scatter. It sums in the dtype that is sent, and in its own order."""

    def start(self, send: Tensor, what: str) -> Exchange:
        """Sum (size * n,) `send` over ranks; this rank receives its slice of the sum."""
        received = memory.empty(send.numel() // self.group.size, send.dtype, send.device)
        work = self.group.start(what, _reduce_scatter, received, send, op=dist.ReduceOp.SUM)
        return Exchange(work, [received], send, by_rank=False)
