"""The transport of ranks on several hosts: through memory inside each, by all-to-alls from one to another.

Gradients go as ExactTransport sends them, slice by slice, so their sum has its bits; what stays on a host is read where
it lies. Weights come to each host once: a rank takes in other hosts' shards for all ranks of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pyzero import memory
from pyzero.comm.group import Group, Handle, Work
from pyzero.comm.shared_memory import SharedMemory
from pyzero.comm.shared_memory_transport import Chunk, Deferred, SharedMemoryTransport
from pyzero.comm.transport import Exchange


class MultiHostTransport(SharedMemoryTransport):
    """Shared memory inside hosts and all-to-alls between them, with the bits of ExactTransport.

    Raises:
        HostError: Each rank has a host of its own, or those of one cannot share memory.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        mine = self._memory.ranks
        self._elsewhere = [rank for rank in range(group.size) if rank not in mine]
        sources = [_sources(ranks, group.hosts) for ranks in group.hosts]
        self._max_shards = 1 + max(len(ranks) for host in sources for ranks in host.values())
        self._shards_in = {rank: [rank, *ranks] for host in sources for rank, ranks in host.items() if rank in mine}
        self._takers = [rank for host in sources for rank, ranks in host.items() if group.rank in ranks]

    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:
        """See Transport."""
        super().reserve([(sent, shard * self._max_shards) for sent, shard in buckets], num_params)

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport."""
        parts = send.view(self.group.size, -1)
        sent = torch.cat([parts[rank] for rank in self._elsewhere])
        received = memory.empty(sent.numel(), send.dtype, send.device)
        numels = self._numels(self._elsewhere, parts.shape[1])
        work = self.group.launch(
            what,
            lambda: _Both(self._posted(self._post(send)), self._from_others(received, sent, numels, numels)),
            blocks=True,
        )
        slices = dict(zip(self._memory.ranks, self._slices(send), strict=True))
        slices |= zip(self._elsewhere, received.view(len(self._elsewhere), -1), strict=True)
        return Exchange(work, [slices[rank] for rank in range(self.group.size)], send, release=self._mark_read)

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport. Other hosts' shards are handed on when their work is waited for."""
        sources = self._shards_in[self.group.rank]
        shards = memory.empty(len(sources) * shard.numel(), shard.dtype, shard.device)
        shards[: shard.numel()] = shard
        sent = shard.repeat(len(self._takers))
        chunk = self._read_gathers_for(self._max_shards * shard.nbytes)

        def post() -> Chunk:
            handle = self._from_others(
                shards[shard.numel() :],
                sent,
                self._numels(sources[1:], shard.numel()),
                self._numels(self._takers, shard.numel()),
            )
            self._ring.take(chunk)
            self._deferred.append(Deferred(chunk, shards, [handle, self._memory.read(chunk.after)]))
            return chunk

        return self._launch_gather(flat, post)

    def _numels(self, ranks: Sequence[int], numel: int) -> list[int]:
        return [numel * (rank in ranks) for rank in range(self.group.size)]

    def _from_others(
        self, received: Tensor, sent: Tensor, received_numels: Sequence[int], sent_numels: Sequence[int]
    ) -> _FromOthers:
        return _FromOthers(self._memory, self.group.begin_all_to_all(received, sent, received_numels, sent_numels))


def _sources(mine: Sequence[int], hosts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """For each rank of a host, whose weights it receives for its host: other hosts' ranks, dealt out in turn."""
    found: dict[int, list[int]] = {rank: [] for rank in mine}
    for ranks in hosts:
        if ranks != mine:
            for place, rank in enumerate(ranks):
                found[mine[place % len(mine)]].append(rank)
    return found


class _FromOthers:
    """A Handle: a collective between hosts; where it fails, the ranks of this host learn of it."""

    def __init__(self, memory: SharedMemory, handle: Handle) -> None:
        self._memory = memory
        self._handle = handle

    def is_completed(self) -> bool:
        return self._handle.is_completed()

    def wait(self, timeout: timedelta | None = None) -> None:
        try:
            self._handle.wait(*() if timeout is None else (timeout,))
            return
        except RuntimeError:
            if not self._handle.is_completed():  # only slow
                raise
        try:  # it came this moment, or has failed
            self._handle.wait()
        except RuntimeError as error:
            self._memory.give_up(str(error))
            raise


class _Both:
    """A Handle: two as one."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def is_completed(self) -> bool:
        return all(handle.is_completed() for handle in self._handles)

    def wait(self, timeout: timedelta | None = None) -> None:
        for handle in self._handles:
            handle.wait(timeout)
