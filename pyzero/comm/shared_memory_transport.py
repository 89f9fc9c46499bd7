"""The transport of ranks on one host: through memory that all of them have mapped, without sockets.

Each rank has a ring of bytes that every rank can read. It packs gradients straight into its ring, and sums its slice
from every rank's ring. It writes the updated weights of its shard into its ring, and the others copy them into their
own flat buffers. So parameters stay in their own process's memory: an edit in place, or a forked child, changes nothing
on another rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.comm.shared_memory import Arrival, HostError
from pyzero.comm.transport import Exchange, Transport
from pyzero.comm.work import Handle, Work

_ROOM_WAIT_S = 2.0  # wait for room in the ring; after it a bucket is packed elsewhere, and copied when there is room
_MESSAGE_BYTES = 256  # of the step's message, besides one number per parameter; larger messages go by sockets
_NUMBER_BYTES = 8


@dataclass(frozen=True)
class Chunk:
    """Bytes [begin, end) of the ring that are sent together. They lie at the same place on all ranks."""

    number: int  # from 1 on
    begin: int
    end: int
    after: int  # number of the last chunk in these bytes; all ranks must have read it first


class Ring:
    """The place of each chunk: one behind the other in one half, then in the other. The same on all ranks.

    So a chunk of up to half the ring never waits for the one before it.
    """

    def __init__(self) -> None:
        self._half = 0
        self._num_chunks = 0
        self._chunks: deque[Chunk] = deque()  # whose bytes no later chunk has taken

    def resize(self, num_bytes: int) -> None:
        """Start again with a ring of this size. No chunk of the old ring may be in use."""
        self._half = num_bytes // 2
        self._chunks.clear()

    def next(self, num_bytes: int) -> Chunk:
        """Return the next chunk, for `take`."""
        begin = 0
        if self._chunks:
            last = self._chunks[-1]
            in_second = last.begin >= self._half
            begin = last.end
            if begin + num_bytes > self._half * (1 + in_second):
                begin = 0 if in_second else self._half
        end = begin + num_bytes
        given_away = self._chunks[0].number - 1 if self._chunks else self._num_chunks
        beneath = [chunk.number for chunk in self._chunks if chunk.begin < end and begin < chunk.end]
        after = max(beneath, default=given_away)
        return Chunk(self._num_chunks + 1, begin, end, after)

    @property
    def last(self) -> Chunk:
        """The chunk that was taken last."""
        return self._chunks[-1]

    def take(self, chunk: Chunk) -> None:
        """Place the chunk that `next` returned."""
        while self._chunks and self._chunks[0].number <= chunk.after:
            self._chunks.popleft()
        self._chunks.append(chunk)
        self._num_chunks = chunk.number


class Deferred(NamedTuple):
    """A chunk with data that is not in the ring yet: there was no room, or other hosts' part has not arrived."""

    chunk: Chunk
    data: Tensor
    awaited: Sequence[Handle]  # to wait for before the copy to the ring


class _Gather(NamedTuple):
    """Weights that this rank has not copied yet."""

    chunk: Chunk
    flat: Tensor
    work: Work


class SharedMemoryTransport(Transport):
    """Exchanges through shared memory of one host's ranks. Gives the same bits as ExactTransport.

    Raises:
        HostError: The ranks cannot share memory.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._memory = group.share_memory()
        self._ring = Ring()
        self._room: Tensor | None = None  # in the ring, returned by `buffer`
        self._deferred: deque[Deferred] = deque()
        self._gathers: deque[_Gather] = deque()
        self._shards_in = {rank: [rank] for rank in self._memory.ranks}  # by rank: whose weights lie in its ring

    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:
        """See Transport."""
        largest = max((max(pair) for pair in buckets), default=0)
        message_bytes = _MESSAGE_BYTES + _NUMBER_BYTES * num_params
        try:
            is_new = self._memory.reserve(2 * largest, message_bytes, self.group.gather_objects)
        except HostError as error:
            raise HostError(
                f"expected {2 * largest:,} bytes to share for two buckets, got none: {error}; pass a smaller "
                f"bucket_cap_mb, or transport='exact'"
            ) from error
        if is_new:
            self._ring.resize(self._memory.ring_bytes)

    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """See Transport. Takes the ring, or other memory if the other ranks do not make room in time."""
        chunk = self._ring.next(numel * dtype.itemsize)
        self._room = None
        if self._deferred or not self._is_free(chunk):
            return memory.empty(numel, dtype, device)
        self._room = self._memory.tensor(self.group.rank, chunk.begin, numel, dtype)
        return self._room

    def _is_free(self, chunk: Chunk) -> bool:
        """Whether all ranks have read the bytes' last chunk, or do so within _ROOM_WAIT_S."""
        if not self._memory.has_read(chunk.after):
            return False  # this rank itself is late
        try:
            self._memory.read(chunk.after).wait(timedelta(seconds=_ROOM_WAIT_S))
        except RuntimeError as error:  # the wait for the chunk will say why
            if process.is_of_signal_handler(error):
                raise
            return False
        return True

    def _post(self, send: Tensor) -> Chunk:
        """Let the others read `send`, now or when there is room. Call it in a launch."""
        chunk = self._ring.next(send.nbytes)
        self._ring.take(chunk)
        if send is self._room:
            self._memory.post()
        else:
            self._deferred.append(Deferred(chunk, send, [self._memory.read(chunk.after)]))
        self._room = None
        return chunk

    def post_deferred(self, number: int, timeout: timedelta | None) -> None:
        """Copy deferred chunks up to that number into the ring, once there is room, and let the others read them.

        Raises:
            RuntimeError: See Arrival.wait.
        """
        while self._deferred and self._deferred[0].chunk.number <= number:
            chunk, data, awaited = self._deferred[0]
            for handle in awaited:
                handle.wait(*() if timeout is None else (timeout,))
            self._memory.tensor(self.group.rank, chunk.begin, data.numel(), data.dtype).copy_(data)
            self._deferred.popleft()
            self._memory.post()

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport."""
        work = self.group.launch(what, lambda: self._posted(self._post(send)), blocks=True)
        return Exchange(work, self._slices(send), send, release=self._mark_read)

    def _slices(self, send: Tensor) -> list[Tensor]:
        """Return this rank's slice of every rank's `send`. It must be the chunk posted last."""
        numel = send.numel() // self.group.size
        begin = self._ring.last.begin + self.group.rank * numel * send.itemsize
        return [self._memory.tensor(rank, begin, numel, send.dtype) for rank in self._memory.ranks]

    def _posted(self, chunk: Chunk) -> _PostedChunks:
        return _PostedChunks(self, chunk.number, self._memory.posted(chunk.number))

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport. Copies the shard at once."""
        self._read_gathers_for(shard.nbytes)
        room = self.buffer(shard.numel(), shard.dtype, shard.device)
        ops.pack_(room, [shard], offsets=[0])  # bypasses the caches; copy_ does not
        return self._launch_gather(flat, lambda: self._post(room))

    def _read_gathers_for(self, num_bytes: int) -> Chunk:
        """Return the next chunk. If weights that this rank has not copied yet lie in its bytes, wait and copy them."""
        chunk = self._ring.next(num_bytes)
        while self._gathers and not self._memory.has_read(chunk.after):
            self._gathers[0].work.wait()
        return chunk

    def _launch_gather(self, flat: Tensor, post: Callable[[], Chunk]) -> Work:
        """Launch `post`. The wait for the returned work copies its chunk to `flat`."""
        what = "the all-gather of weights"
        work = self.group.launch(what, lambda: self._posted(post()), lambda: self._copy(chunk.number), blocks=True)
        chunk = self._ring.last
        self._gathers.append(_Gather(chunk, flat, work))
        return work

    def _mark_read(self) -> None:
        with self.group.broken_unless_finished():
            self._memory.mark_read()

    def _copy(self, number: int) -> None:
        """Copy other ranks' weights from chunks up to that number into the flat buffers."""
        while self._gathers and self._gathers[0].chunk.number <= number:
            chunk, flat, _ = self._gathers.popleft()
            numel = flat.numel() // self.group.size
            found: dict[int, Tensor] = {}  # by the rank whose weights they are
            for rank, sources in self._shards_in.items():
                there = self._memory.tensor(rank, chunk.begin, len(sources) * numel, flat.dtype)
                found.update(zip(sources, there.split(numel), strict=True))
            others = sorted(found.keys() - {self.group.rank})
            try:
                ops.pack_(flat, [found[rank] for rank in others], offsets=[rank * numel for rank in others])
            finally:  # after a KeyboardInterrupt too, because the others wait for this room
                self._mark_read()


class _PostedChunks:
    """A Handle that is done when every rank has posted its chunks up to a number. The wait posts this rank's."""

    def __init__(self, transport: SharedMemoryTransport, number: int, posted: Arrival) -> None:
        self._transport = transport
        self._number = number
        self._posted = posted

    def is_completed(self) -> bool:
        return self._posted.is_completed()

    def wait(self, timeout: timedelta | None = None) -> None:
        self._transport.post_deferred(self._number, timeout)
        self._posted.wait(timeout)
