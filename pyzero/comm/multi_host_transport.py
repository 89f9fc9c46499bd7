"""The transport of ranks on several hosts: through shared memory inside a host, by all-to-all between hosts.

Gradients travel slice by slice, as with ExactTransport, so their sum has the same bits. Slices of the same host are
read in place. Weights come to each host once: one of its ranks receives another host's shard for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pyzero import memory
from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.comm.shared_memory import SharedMemory
from pyzero.comm.shared_memory_transport import Chunk, Deferred, SharedMemoryTransport
from pyzero.comm.transport import Exchange
from pyzero.comm.work import Handle, Work


class MultiHostTransport(SharedMemoryTransport):
    """Exchanges through shared memory inside hosts and all-to-all between them. Same bits as ExactTransport.

    Raises:
        HostError: Each rank has its own host, or the ranks of one host cannot share memory.
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
            lambda: _AllOf(self._posted(self._post(send)), self._from_others(received, sent, numels, numels)),
            blocks=True,
        )
        slices = dict(zip(self._memory.ranks, self._slices(send), strict=True))
        slices |= zip(self._elsewhere, received.view(len(self._elsewhere), -1), strict=True)
        return Exchange(work, [slices[rank] for rank in range(self.group.size)], send, release=self._mark_read)

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport. The wait for the work passes other hosts' shards on to this host's ranks."""
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
    """For each rank of a host, return the ranks of other hosts whose weights it receives, dealt out in turn."""
    found: dict[int, list[int]] = {rank: [] for rank in mine}
    for ranks in hosts:
        if ranks != mine:
            for place, rank in enumerate(ranks):
                found[mine[place % len(mine)]].append(rank)
    return found


class _FromOthers:
    """A Handle of a collective between hosts. If it fails, it tells the ranks of this host."""

    def __init__(self, memory: SharedMemory, handle: Handle) -> None:
        self._memory = memory
        self._handle = handle

    def is_completed(self) -> bool:
        return self._handle.is_completed()

    def wait(self, timeout: timedelta | None = None) -> None:
        try:
            self._handle.wait(*() if timeout is None else (timeout,))
            return
        except RuntimeError as error:
            if process.is_of_signal_handler(error) or not self._handle.is_completed():  # or is only slow
                raise
        try:  # it has just arrived, or has failed
            self._handle.wait()
        except RuntimeError as error:
            self._memory.give_up(str(error))
            raise


class _AllOf:
    """A Handle that is done when all of several handles are."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def is_completed(self) -> bool:
        return all(handle.is_completed() for handle in self._handles)

    def wait(self, timeout: timedelta | None = None) -> None:
        for handle in self._handles:
            handle.wait(timeout)
