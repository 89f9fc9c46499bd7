"""The transport of ranks whose GPUs share a host: each reads the others' memory, over NVLink where there is some.

The memory is torch's symmetric memory. For gradients each rank has two slots, which take turns. What is sent is written
to one; a barrier on the device, and every rank's is there; it is read where it lies, by the kernel that sums them;
another barrier, and the slot may be written over. Weights lie there for good: between two barriers each rank writes
those of its shards to all ranks, in the kernel that updates them or by copies. In backward and step the host waits for
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyzero.comm.group import Group, Work
from pyzero.comm.shared_memory import HostError, find_hosts, raise_first
from pyzero.comm.transport import Exchange, FlatWeights, Transport
from pyzero.ops.backend import MAX_PARAM_OUTS
from pyzero.ops.rounding import round_up
from pyzero.streams import on_stream

_NUM_SLOTS = 2
_SLOT_ALIGNMENT = 512  # bytes
T = TypeVar("T")


@dataclass(frozen=True)
class SymmetricBytes:
    """Equally many bytes of each rank, mapped by all of them.

    Attributes:
        by_rank: (num_bytes,) uint8 each, on this rank's device. This rank's keeps its memory alive.
        barrier: Makes every rank's current stream wait for those of the others.
        owner: Keeps what this rank sees of the others' alive.
    """

    by_rank: list[Tensor]
    barrier: Callable[[], None]
    owner: Any = None


class SymmetricMemory(Protocol):
    """What allocates SymmetricBytes, in two parts: where the first fails on one rank, no other waits in the second."""

    num_shared: int  # how often this process has, in any group; torch pairs the ranks' calls of `share` by it

    def empty(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8 of this rank. Raises RuntimeError or ImportError."""

    def share(self, own: Tensor) -> SymmetricBytes:
        """Map that of all ranks. Collective. Raises RuntimeError."""


class TorchSymmetricMemory:
    """torch.distributed._symmetric_memory."""

    num_shared = 0

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device

    def empty(self, num_bytes: int) -> Tensor:
        """See SymmetricMemory."""
        import torch.distributed._symmetric_memory as symm_mem  # imports what most programs do not need

        return symm_mem.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def share(self, own: Tensor) -> SymmetricBytes:
        """See SymmetricMemory."""
        import torch.distributed._symmetric_memory as symm_mem

        TorchSymmetricMemory.num_shared += 1
        handle = symm_mem.rendezvous(own, self._group.handle)
        size, rank = tuple(own.shape), self._group.rank
        by_rank = [handle.get_buffer(each, size, torch.uint8) for each in range(self._group.size)]
        if by_rank[rank].data_ptr() != own.data_ptr():  # a torch that puts several tensors into one allocation
            by_rank = [handle.get_remote_tensor(each, size, torch.uint8) for each in range(self._group.size)]
        by_rank[rank] = own  # the others are views that own nothing
        timeout_ms = self._group.timeout_ms()
        return SymmetricBytes(by_rank, lambda: handle.barrier(channel=0, timeout_ms=timeout_ms), handle)


class SymmetricMemoryTransport(Transport):
    """Peer memory between the GPUs of one host, with the bits of ExactTransport.

    Where a rank dies or stalls, the others' barriers fail on the device within the group's timeout.

    Args:
        group: The ranks.
        device: This rank's.
        symmetric: Makes the memory; default: torch's.

    Raises:
        HostError: The ranks run on several hosts, are too many, or cannot read each other's memory.
    """

    def __init__(self, group: Group, device: torch.device, symmetric: SymmetricMemory | None = None) -> None:
        super().__init__(group)
        self._device = device
        self._symmetric = symmetric or TorchSymmetricMemory(group, device)
        self._slot_bytes = 0
        self._memory: SymmetricBytes | None = None
        self._num_sent = self._num_read = 0
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # for copies of weights
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
            torch.cuda.synchronize(self._device)  # after a barrier: all have read what lies in the old memory
        slot_bytes = round_up(slot_bytes, _SLOT_ALIGNMENT)
        self._memory = self._allocate(_NUM_SLOTS * slot_bytes)
        self._slot_bytes = slot_bytes

    def _allocate(self, num_bytes: int) -> SymmetricBytes:
        """Symmetric memory; where it fails on one rank, an error on all."""
        own = self._on_all_ranks(num_bytes, lambda: self._symmetric.empty(num_bytes))
        counts = self.group.gather_objects(self._symmetric.num_shared)
        if len(set(counts)) > 1:
            raise HostError(
                f"the ranks have taken part in {counts} allocations of symmetric memory, which torch pairs by their "
                f"number; build optimizers over groups that all have made as many"
            )
        return self._on_all_ranks(num_bytes, lambda: self._symmetric.share(own))

    def _on_all_ranks(self, num_bytes: int, make: Callable[[], T]) -> T:
        made, problem = None, None
        try:
            made = make()
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

    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """See Transport. A slot, which the current stream waits for."""
        number = self._num_sent
        if number - self._num_read >= _NUM_SLOTS:
            raise RuntimeError(f"expected a slot to pack a bucket into, got all {_NUM_SLOTS} unread")
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
        with self.group.broken_unless_finished(), self._in_order():
            self._memory.barrier()
            self._num_read += 1
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
        memory = self._allocate(max(numel * dtype.itemsize, _SLOT_ALIGNMENT))
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
        self._meet("the barrier after the update of weights")

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
