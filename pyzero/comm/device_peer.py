"""The transport of ranks whose GPUs share a host: each reads the others' memory, over NVLink where there is some.

The memory is torch's symmetric memory. For gradients each rank has two slots, which take turns. What is sent is written
to one; a barrier on the device, and every rank's is there; it is read where it lies, by the kernel that sums them;
another barrier, and the slot may be written over. Weights lie there for good: between two barriers each rank writes
those of its shards to all ranks, in the kernel that updates them or by copies. The host waits for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pyzero.comm.group import Group, Work
from pyzero.comm.host import HostError, find_hosts, raise_first
from pyzero.comm.transport import Exchange, FlatWeights, Transport
from pyzero.ops.backend import MAX_PARAM_OUTS
from pyzero.streams import on_stream

_NUM_SLOTS = 2
_SLOT_ALIGNMENT = 512  # bytes


@dataclass(frozen=True)
class SymmetricBytes:
    """Equally many bytes of each rank, mapped by all of them.

    Attributes:
        by_rank: (num_bytes,) uint8 each, on this rank's device.
        barrier: Makes every rank's current stream wait for those of the others.
        owner: Keeps the memory alive.
    """

    by_rank: list[Tensor]
    barrier: Callable[[], None]
    owner: Any = None


Allocate = Callable[[int], SymmetricBytes]  # collective; raises RuntimeError alike on all ranks


def symmetric_memory(group: Group, device: torch.device) -> Allocate:
    """An Allocate over torch.distributed._symmetric_memory."""

    def allocate(num_bytes: int) -> SymmetricBytes:
        import torch.distributed._symmetric_memory as symm_mem  # imports what most programs do not need

        own = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symm_mem.rendezvous(own, group.handle)
        by_rank = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.size)]
        timeout_ms = group.timeout_ms()
        return SymmetricBytes(by_rank, lambda: handle.barrier(channel=0, timeout_ms=timeout_ms), (own, handle))

    return allocate


class DevicePeerTransport(Transport):
    """Peer memory between the GPUs of one host, with the bits of ExactTransport.

    Where a rank dies or stalls, the others' barriers fail on the device within the group's timeout.

    Args:
        group: The ranks.
        device: This rank's.
        allocate: Makes the memory; default: torch's symmetric memory.

    Raises:
        HostError: The ranks run on several hosts, are too many, or cannot read each other's memory.
    """

    def __init__(self, group: Group, device: torch.device, allocate: Allocate | None = None) -> None:
        super().__init__(group)
        self._device = device
        self._allocate = allocate or symmetric_memory(group, device)
        self._slot_bytes = 0
        self._memory: SymmetricBytes | None = None
        self._num_sent = 0
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # weights travel beside the next bucket's update
        self._last = torch.cuda.Event() if on_gpu else None  # the last barrier on any stream
        self._read = [torch.cuda.Event() for _ in range(_NUM_SLOTS)] if on_gpu else []  # by slot: read by all ranks
        if len(find_hosts(group.gather_objects)) > 1:
            raise HostError("the ranks run on several hosts")
        if group.size > MAX_PARAM_OUTS:
            raise HostError(f"{group.size} ranks are more than the {MAX_PARAM_OUTS} that one update can write to")
        self._grow(_SLOT_ALIGNMENT)

    def reserve(self, buckets: Sequence[tuple[int, int]], num_params: int) -> None:
        """See Transport."""
        self._grow(max((num_sent for num_sent, _ in buckets), default=0))

    def _grow(self, slot_bytes: int) -> None:
        if slot_bytes <= self._slot_bytes:
            return
        if self._memory is not None and self._last is not None:
            torch.cuda.synchronize(self._device)  # a barrier behind: all have read what lies in the old memory
        self._slot_bytes = -(-slot_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
        self._memory = self._symmetric(_NUM_SLOTS * self._slot_bytes)

    def _symmetric(self, num_bytes: int) -> SymmetricBytes:
        """Allocate, or raise on all ranks."""
        made, problem = None, None
        try:
            made = self._allocate(num_bytes)
        except (ImportError, RuntimeError) as error:
            problem = f"no symmetric memory of {num_bytes:,} bytes: {str(error).strip().splitlines()[0]}"
        raise_first(self.group.gather_objects(problem))
        assert made is not None
        return made

    def _slot(self, rank: int, number: int, begin_bytes: int, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) elements of the slot that a rank's message of that number lies in."""
        assert self._memory is not None
        begin = number % _NUM_SLOTS * self._slot_bytes + begin_bytes
        return self._memory.by_rank[rank][begin : begin + numel * dtype.itemsize].view(dtype)

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Transport. A slot, which the current stream waits for."""
        number = self._num_sent
        if number >= _NUM_SLOTS and self._read:
            torch.cuda.current_stream(self._device).wait_event(self._read[number % _NUM_SLOTS])
        return self._slot(self.group.rank, number, 0, numel, dtype)

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Order the current stream after the barrier before, whatever stream that ran on: barriers pair up in order."""
        if self._last is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._last)
        yield
        self._last.record(current)

    def _post(self) -> int:
        """Called when the slot is written: after the barrier every rank's is. Returns the message's number."""
        assert self._memory is not None
        number = self._num_sent
        self._num_sent += 1
        with self._in_order():
            self._memory.barrier()
        return number

    def _mark_read(self, number: int) -> None:
        assert self._memory is not None
        with self._in_order():
            self._memory.barrier()
        if self._read:
            self._read[number % _NUM_SLOTS].record(torch.cuda.current_stream(self._device))

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport. `send` is what `buffer` gave."""
        number = -1

        def post() -> _Done:
            nonlocal number
            number = self._post()
            return _Done(self._device)

        work = self.group.launch(what, post)
        numel = send.numel() // self.group.size
        begin_bytes = self.group.rank * numel * send.itemsize
        slices = [self._slot(rank, number, begin_bytes, numel, send.dtype) for rank in range(self.group.size)]
        return Exchange(work, slices, send, release=lambda: self._mark_read(number))

    def weights(self, numel: int, dtype: torch.dtype, device: torch.device) -> FlatWeights:
        """See Transport. In symmetric memory."""
        memory = self._symmetric(max(numel * dtype.itemsize, _SLOT_ALIGNMENT))
        by_rank = [there[: numel * dtype.itemsize].view(dtype) for there in memory.by_rank]
        own = by_rank.pop(self.group.rank)
        return FlatWeights(own.zero_(), by_rank, memory)

    def begin_update(self) -> None:
        """See Transport."""
        self._meet("the barrier before the update of weights")

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport. The shard is copied to the peers, on a stream of its own."""
        return self.group.launch("the copies of weights to peers", lambda: self._copy(shard, peers))

    def _copy(self, shard: Tensor, peers: Sequence[Tensor]) -> _Done:
        with on_stream(self._stream, shard):
            for there in peers:
                there.copy_(shard)
            return _Done(self._device)

    def end_update(self) -> None:
        """See Transport."""
        self._meet("the barrier behind the update of weights")

    def _meet(self, what: str) -> None:
        """All ranks' current streams wait for each other."""

        def meet() -> _Done:
            assert self._memory is not None
            with self._in_order():
                self._memory.barrier()
            return _Done(self._device)

        self.group.launch(what, meet).wait()


class _Done:
    """A Handle: all that the current stream has been given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta | None = None) -> None:
        """The current stream waits; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
