"""The transport of GPU ranks on one host: each reads the others' memory, over NVLink if there is one.

The memory is torch's symmetric memory. For gradients each rank has two slots, used in turn. A rank writes what it sends
to a slot. After a barrier on the device every rank has written its slot, and the kernel that sums the gradients reads
them in place. After another barrier the slot may be overwritten. Weights stay in symmetric memory. Between two
barriers each rank writes the weights of its shards to all ranks, in the update kernel or by copies. The host never
waits in backward and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.comm.shared_memory import HostError, find_hosts, raise_first
from pyzero.comm.transport import Exchange, FlatWeights, Transport
from pyzero.comm.work import Work
from pyzero.ops.backend import MAX_PARAM_OUTS
from pyzero.ops.rounding import round_up
from pyzero.streams import on_stream

_NUM_SLOTS = 2
_SLOT_ALIGNMENT = 512  # bytes
T = TypeVar("T")


@dataclass(frozen=True)
class SymmetricBytes:
    """The same number of bytes of each rank, mapped by all of them.

    Attributes:
        by_rank: (num_bytes,) uint8 each, on this rank's device. This rank's tensor keeps its memory alive.
        barrier: Makes every rank's current stream wait for the other ranks' current streams.
        owner: Keeps the mapping of the other ranks' memory alive.
    """

    by_rank: list[Tensor]
    barrier: Callable[[], None]
    owner: Any = None


class SymmetricMemory(Protocol):
    """Allocates SymmetricBytes in two calls, so that no rank waits in the second if the first failed on another."""

    num_shared: int  # calls of `share` in this process, in any group; torch pairs the ranks' calls by it

    def empty(self, num_bytes: int) -> Tensor:
        """Allocate (num_bytes,) uint8 of this rank. Raises RuntimeError or ImportError."""

    def share(self, own: Tensor) -> SymmetricBytes:
        """Map the memory of all ranks. Collective. Raises RuntimeError."""


class TorchSymmetricMemory:
    """SymmetricMemory by torch.distributed._symmetric_memory."""

    num_shared = 0

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device

    def empty(self, num_bytes: int) -> Tensor:
        """See SymmetricMemory."""
        import torch.distributed._symmetric_memory as symm_mem  # heavy, and most programs do not need it

        return symm_mem.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def share(self, own: Tensor) -> SymmetricBytes:
        """See SymmetricMemory."""
        import torch.distributed._symmetric_memory as symm_mem

        TorchSymmetricMemory.num_shared += 1
        handle = symm_mem.rendezvous(own, self._group.handle)
        size, rank = tuple(own.shape), self._group.rank
        by_rank = [handle.get_buffer(each, size, torch.uint8) for each in range(self._group.size)]
        if by_rank[rank].data_ptr() != own.data_ptr():  # this torch puts several tensors into one allocation
            by_rank = [handle.get_remote_tensor(each, size, torch.uint8) for each in range(self._group.size)]
        by_rank[rank] = own  # the others are views that own nothing
        timeout_ms = self._group.timeout_ms()
        return SymmetricBytes(by_rank, lambda: handle.barrier(channel=0, timeout_ms=timeout_ms), handle)


class SymmetricMemoryTransport(Transport):
    """Exchanges through peer memory between the GPUs of one host. Gives the same bits as ExactTransport.

    If a rank dies or stalls, the others' barriers fail on the device within the group's timeout.

    Args:
        group: The ranks.
        device: This rank's device.
        symmetric: Allocates the memory; default: torch's.

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
            torch.cuda.synchronize(self._device)  # waits for the last barrier, so all ranks have read the old memory
        slot_bytes = round_up(slot_bytes, _SLOT_ALIGNMENT)
        self._memory = self._allocate(_NUM_SLOTS * slot_bytes)
        self._slot_bytes = slot_bytes

    def _allocate(self, num_bytes: int) -> SymmetricBytes:
        """Allocate symmetric memory. If it fails on one rank, all ranks raise."""
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
        """Return (numel,) elements of the slot of a rank's message, by the message's number."""
        assert self._memory is not None
        begin = number % _NUM_SLOTS * self._slot_bytes + begin_bytes
        return self._memory.by_rank[rank][begin : begin + numel * dtype.itemsize].view(dtype)

    def buffer(
        self, numel: int, dtype: torch.dtype, device: torch.device, side: torch.cuda.Stream | None = None
    ) -> Tensor:
        """See Transport. Returns a slot, once the current stream has waited for it."""
        number = self._num_sent
        if number - self._num_read >= _NUM_SLOTS:
            raise RuntimeError(f"expected a slot to pack a bucket into, got all {_NUM_SLOTS} unread")
        if number >= _NUM_SLOTS and self._read:
            torch.cuda.current_stream(self._device).wait_event(self._read[number % _NUM_SLOTS])
        return self._slot(self.group.rank, number, 0, numel, dtype)

    def _barrier(self) -> None:
        """Make all ranks' current streams wait for each other, after the last barrier: ranks pair them in order."""
        assert self._memory is not None
        if self._last is None:
            self._memory.barrier()
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._last)
        self._memory.barrier()
        self._last.record(current)

    def _post(self) -> int:
        """Tell the ranks that the slot is written: after the barrier every rank's is. Return the message's number."""
        number = self._num_sent
        self._num_sent += 1
        self._barrier()
        return number

    def _mark_read(self, number: int) -> None:
        with self.group.broken_unless_finished():
            self._barrier()
            self._num_read += 1
        if self._read:
            self._read[number % _NUM_SLOTS].record(torch.cuda.current_stream(self._device))

    def start(self, send: Tensor, what: str) -> Exchange:
        """See Transport. `send` must be the tensor that `buffer` returned."""
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
        """See Transport. Allocates symmetric memory."""
        memory = self._allocate(max(numel * dtype.itemsize, _SLOT_ALIGNMENT))
        by_rank = [there[: numel * dtype.itemsize].view(dtype) for there in memory.by_rank]
        own = by_rank.pop(self.group.rank)
        return FlatWeights(own.zero_(), by_rank, memory)

    def begin_update(self) -> None:
        """See Transport."""
        self._meet("the barrier before the update of weights")

    def gather(self, flat: Tensor, shard: Tensor, peers: Sequence[Tensor] = ()) -> Work:
        """See Transport. Copies the shard to the peers, on a separate stream."""
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
        """Make all ranks' current streams wait for each other."""

        def meet() -> _Done:
            self._barrier()
            return _Done(self._device)

        self.group.launch(what, meet).wait()


class _Done:
    """A Handle that is done when the current stream has done its work so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta | None = None) -> None:
        """Make the current stream wait. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
