"""The ranks that share an optimizer's state, and what they say to each other by collectives of torch.distributed."""

from __future__ import annotations

import contextlib
import json
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero.comm import process, process_group_pool
from pyzero.comm.shared_memory import HostError, SharedMemory, find_hosts

# torch 2.13 renames this, and warns of the old name; 2.11 has no new one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_ASKS_AFTER_S = 5.0  # a rank that has waited so long asks the others what they are waiting for
_GAVE_UP = -1  # in the place of a collective's number
_WORDS_BYTES = 64  # of what a rank says that it reads
_BATCH_BYTES = 25 << 20  # of tensors that are broadcast together


class CollectiveError(RuntimeError):
    """A collective did not complete: another rank died, stalled, or took part in something else."""


class Handle(Protocol):
    """What a Work waits for: torch.distributed's own, or one of a transport."""

    def is_completed(self) -> bool:
        """Whether it is over, in failure too. Does not wait."""

    def wait(self, timeout: timedelta = ..., /) -> object:
        """Return when it is done; raises RuntimeError where it has failed, or is not done in time."""


class Work:
    """A collective or a copy under way. On a GPU `wait` makes the current stream wait; on a CPU it blocks."""

    def __init__(
        self,
        handle: Handle | None,
        group: Group,
        what: str,
        number: int = 0,
        then: Callable[[], None] | None = None,
        blocks: bool = False,
    ) -> None:
        self._handle = handle
        self._group = group
        self._what = what
        self._number = number  # among the group's collectives
        self._then = then  # what is left to do once it has arrived
        self._blocks = blocks  # the handle's wait returns with the result, on the host

    def wait(self) -> None:
        """Return when what follows may use the result.

        Raises:
            CollectiveError: It failed, took longer than the group's timeout, or another rank waits for another
                collective in its place.
        """
        if self._handle is not None:
            self._group.wait(self._handle, self._what, self._number, self._blocks)
            if self._then is not None:
                self._then()
            self._handle = None  # last: a wait that was broken off can be made again

    def is_done(self, patience_s: float) -> bool:
        """Whether `wait` would return at once; waits for at most `patience_s`."""
        return self._handle is None or self._group.is_done(self._handle, patience_s, self._blocks)


class Group:
    """The ranks that share one optimizer's state. Without a process group it is one rank and nothing is sent.

    Its collectives run on a process group of its own over the same ranks: two optimizers that are used in another order
    on another rank do not meet each other's.
    """

    def __init__(self, process_group: Any = None, *, is_alone: bool = False, on_host: bool = False) -> None:
        """Over the ranks of a process group, or all.

        Args:
            process_group: A ProcessGroup, or a DeviceMesh of one dimension; None: the default group.
            is_alone: One rank, whatever has been initialised.
            on_host: It sends memory of the host alone.
        """
        process_group = process.process_group_of(process_group)
        initialized = not is_alone and dist.is_available() and dist.is_initialized()
        if not initialized and not is_alone:
            process.check_alone(process_group)
        parent = (process_group or dist.group.WORLD) if initialized else None
        if parent is not None and dist.get_rank(parent) < 0:
            raise ValueError(
                f"expected a process group that this process is in, got one that rank {dist.get_rank()} is not in; "
                f"build the optimizer on the group's ranks only"
            )
        self.size: int = dist.get_world_size(parent) if initialized else 1
        self.rank: int = dist.get_rank(parent) if initialized else 0
        self.where = "before the first backward"  # for messages: what the optimizer is at
        self.handle: Any = None
        self._lease = process_group_pool.LeasedGroup(None, serial=0)  # alone: nothing is sent in it
        self._timeout: timedelta | None = None
        self._blocks = False
        self._mesh: Any = None
        self.hosts: list[list[int]] = []  # the ranks of each, where memory is shared
        self.shared_memory: SharedMemory | None = None
        if self.size > 1:
            self._timeout = process_group_pool.timeout_of(parent)
            is_gloo = on_host or set(process.backends_of(parent).values()) == {"gloo"}
            self._blocks = is_gloo  # wait() returns with the result
            leased_from = process_group_pool.pool_over(parent, self._timeout, on_host)
            with self.error_context("the lease of a process group"):
                self._lease = leased_from.lease(parent, self._timeout)
            self.handle = self._lease.handle
            weakref.finalize(self, leased_from.give_back, self._lease)

    def members(self) -> list[int]:
        """Its ranks, as the default group numbers them."""
        return dist.get_process_group_ranks(self.handle) if self.size > 1 else [process.rank_and_size()[0]]

    def spread_over(self, other: Group) -> Group:
        """All ranks of the mesh that this group and `other` are two dimensions of. Collective over both."""
        if other.size == 1 or self.size == 1:
            group = self if other.size == 1 else other
            return Group(group.handle) if group.size > 1 else group
        what = "the comparison of a mesh's ranks"
        rows = other.gather_objects((dist.get_process_group_ranks(self.handle), process_group_pool.num_groups()), what)
        ranks = sorted({rank for row, _ in rows for rank in row})
        if len(ranks) != self.size * other.size:
            raise ValueError(
                f"expected process_group and model_parallel_group as two dimensions of one mesh, got {self.size} x "
                f"{other.size} ranks that are {ranks} together; take both from one init_device_mesh(...)"
            )
        if len(ranks) == dist.get_world_size():
            return Group()
        most = max(self.gather_objects(max(num for _, num in rows), what))
        return Group(process_group_pool.new_group(ranks, self.handle, self._timeout, most))

    @contextmanager
    def error_context(self, what: str) -> Iterator[None]:
        """Failures in here say which collective failed, and the timeout that it ran under."""
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            self._give_up(reason)
            raise CollectiveError(
                f"{what} failed on rank {self.rank} of {self.size}: {reason}. Every rank must take part within "
                f"{self.timeout()}: one has died or stalled, runs backward or step a different number of times, or "
                f"trains other parameters. See the other ranks' output; where they are only slow, raise the timeout of "
                f"init_process_group"
            ) from error

    def _give_up(self, reason: str) -> None:
        """Send nothing more, and tell the ranks that share memory."""
        self._lease.is_broken = True
        if self.shared_memory is not None:
            self.shared_memory.give_up(reason)

    def _store(self) -> Any:
        """What the ranks say of what they wait for, by rank."""
        everyones = dist.distributed_c10d._get_default_store()
        return dist.distributed_c10d.PrefixStore(f"pyzero/{self.handle.group_name}/{self._lease.token}", everyones)

    def share_memory(self) -> SharedMemory:
        """Connect the ranks of each host by shared memory; on one host, gather_rows uses it from then on. Collective.

        Raises:
            HostError: They cannot share memory, or no two are on one host.
        """
        if self.shared_memory is None:
            self.hosts = find_hosts(self.gather_objects)
            if len(self.hosts) == self.size:
                raise HostError("each rank runs on another host")
            mine = next(ranks for ranks in self.hosts if self.rank in ranks)
            self.shared_memory = SharedMemory(self.rank, mine, self.gather_objects, self._timeout)
        return self.shared_memory

    def timeout(self) -> str:
        """How long a collective may take, for messages."""
        return "its timeout" if self._timeout is None else f"{self._timeout.total_seconds():g} s"

    def timeout_ms(self) -> int:
        """How long a collective may take, in milliseconds; 0: any time."""
        return 0 if self._timeout is None else int(self._timeout.total_seconds() * 1000)

    def start(self, what: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Work:
        """Launch a collective of torch.distributed; `what` names it where it fails, the same on every rank.

        args: The first is a tensor: of the host, beside NCCL too, it goes by gloo.
        """
        on_host = args[0].device.type == "cpu"
        return self.launch(what, lambda: collective(*args, group=self.handle, async_op=True, **kwargs), blocks=on_host)

    @contextmanager
    def broken_unless_finished(self) -> Iterator[None]:
        """What puts ranks out of step where a KeyboardInterrupt breaks it off: nothing is sent after that."""
        was_broken, self._lease.is_broken = self._lease.is_broken, True
        yield
        self._lease.is_broken = was_broken

    @contextmanager
    def lockstep(
        self,
        model_groups: Sequence[Group] = (),
        what: str = "a step",
        but: type[BaseException] | tuple[type[BaseException], ...] = (),
    ) -> Iterator[None]:
        """What every rank goes through to its end: where an exception leaves it on this one, nothing is sent after.

        model_groups: Of the ranks that hold other parts of the model, which go through it, too.
        but: Exceptions that every rank raises by itself.
        """
        try:
            yield
        except but:
            raise
        except BaseException as error:
            self.break_off(error, what, model_groups)
            raise

    def break_off(self, error: BaseException, what: str, model_groups: Sequence[Group] = ()) -> None:
        """Send nothing more, in this group and in model_groups: what all go through to its end has failed here.

        Who waits long for this rank finds the reason in the store; of a collective that failed, by itself.
        """
        reason = f"{what} was broken off by {type(error).__name__}"
        for group in (self, *model_groups):
            group._give_up(reason)
            if group.handle is not None and not isinstance(error, CollectiveError):
                with contextlib.suppress(RuntimeError, ValueError):  # where the store is gone, so are they
                    group._store().set(str(group.rank), json.dumps([_GAVE_UP, reason, group.where]))

    def awaited(self, what: str) -> AbstractContextManager[None]:
        """Around a collective that is begun and waited for: broken off, its result is lost to this rank alone."""
        return self.lockstep(what=what, but=CollectiveError)

    @property
    def num_launched(self) -> int:
        """How many collectives have been launched."""
        return self._lease.num_collectives

    def check_unbroken(self, what: str) -> None:
        """Raise CollectiveError where nothing is sent any more."""
        if self.size > 1 and self._lease.is_broken:
            with self.error_context(what):
                raise RuntimeError("another collective of this optimizer has failed, or was interrupted, before")

    def launch(
        self,
        what: str,
        begin: Callable[[], Handle],
        then: Callable[[], None] | None = None,
        blocks: bool = False,
    ) -> Work:
        """Launch what `begin` begins; `then` is called once, when its handle has been waited for.

        blocks: Waiting for it blocks the host, also where the group's other collectives do not.
        """
        self.check_unbroken(what)
        with self.error_context(what):
            self._lease.num_collectives += 1
            with self.broken_unless_finished():
                handle = begin()
        return Work(handle, self, what, self._lease.num_collectives, then, blocks or self._blocks)

    def wait(self, handle: Handle, what: str, number: int, blocks: bool) -> None:
        """Wait for a collective; see Work."""
        with self.error_context(what):
            while blocks:
                try:
                    handle.wait(timedelta(seconds=_ASKS_AFTER_S))
                    return
                except RuntimeError:
                    if handle.is_completed():  # it failed, or came this moment; else it is only slow
                        break
                self._compare(what, number)
            handle.wait()

    def is_done(self, handle: Handle, patience_s: float, blocks: bool) -> bool:
        """Whether a collective is done within so many seconds; see Work."""
        if not blocks or handle.is_completed():
            return True
        try:
            handle.wait(timedelta(seconds=patience_s))
        except RuntimeError:  # too slow, or failed, which wait() tells
            return bool(handle.is_completed())
        return True

    def _compare(self, what: str, number: int) -> None:
        """Tell the others what this rank waits for; raise where another waits for something else in its place."""
        store = self._store()
        store.set(str(self.rank), json.dumps([number, what, self.where]))
        seen = {self.rank: [number, what, self.where]}
        for rank in range(self.size):
            if rank != self.rank and store.check([str(rank)]):
                seen[rank] = json.loads(store.get(str(rank)))
        gave_up = {rank: reason for rank, (theirs, reason, _) in seen.items() if theirs == _GAVE_UP}
        is_other = any(theirs[0] == number and theirs[1] != what for theirs in seen.values())
        if gave_up or is_other:
            self._lease.is_broken = True
            process_group_pool.keep_forever(self.handle)
        for rank, reason in gave_up.items():
            raise CollectiveError(
                f"{what} failed on rank {self.rank} of {self.size}: rank {rank} sends nothing more, for {reason}; see "
                f"its output"
            )
        if is_other:
            places = "; ".join(f"rank {rank}, {place}, waits for {it}" for rank, (_, it, place) in sorted(seen.items()))
            raise CollectiveError(
                f"the ranks wait for different collectives: {places}. Run backward and step, and read norms and whole "
                f"tensors, equally often and in the same order on every rank; no_sync() in stage 2 needs the same"
            )

    def begin_all_to_all(
        self, received: Tensor, sent: Tensor, received_numels: Sequence[int], sent_numels: Sequence[int]
    ) -> Handle:
        """For `launch`: so many elements from and to each rank."""
        handle: Handle = dist.all_to_all_single(
            received, sent, list(received_numels), list(sent_numels), group=self.handle, async_op=True
        )
        return handle

    def all_gather_into(self, flat: Tensor, shard: Tensor) -> Work:
        """Fill (size * n,) `flat` with every rank's (n,) `shard`, which may be this rank's part of it."""
        what = "the all-gather of weights"
        return Work(None, self, what) if self.size == 1 else self.start(what, _all_gather, flat, shard)

    def gather_shards(self, shard: Tensor, what: str = "the all-gather of a whole tensor") -> Tensor:
        """(size * n,): every rank's (n,) shard."""
        if self.size == 1:
            return shard
        with self.awaited(what):
            flat = shard.new_empty(self.size * shard.numel())
            self.start(what, _all_gather, flat, shard).wait()
        return flat

    def check_alike(self, what: str, model_groups: Sequence[Group] = ()) -> None:
        """Have every rank be about to read the same. Collective; host memory alone is sent.

        model_groups: The other dimensions of the ranks' mesh.

        Raises:
            CollectiveError: They differ, on all ranks of this group and of model_groups. Nothing else has been sent.
        """
        differs = self._difference(what)
        for group in model_groups:  # whoever has seen a difference says so there
            told = group._difference("other tensors" if differs else what)
            differs = differs or told
        if differs:
            raise CollectiveError(f"{differs}. Read whole tensors equally often and in the same order on every rank")

    def _difference(self, what: str) -> str | None:
        """What each rank reads, where that differs."""
        if self.size == 1:
            return None
        mine = torch.tensor([*what.encode()[:_WORDS_BYTES].ljust(_WORDS_BYTES)], dtype=torch.uint8, device="cpu")
        rows = self.gather_shards(mine, "the comparison of what is read").view(self.size, -1)
        if bool((rows == mine).all()):
            return None
        words = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
        return "; ".join(f"rank {rank} reads {theirs}" for rank, theirs in enumerate(words))

    def gather_rows(self, row: Tensor, what: str = "the all-gather of overflow flag and norm") -> Tensor:
        """(size, k): every rank's (k,) row, in rank order."""
        memory = self.shared_memory
        if memory is not None and len(self.hosts) == 1 and memory.can_send(row):
            with self.awaited(what):
                self.launch(what, lambda: memory.send(row), blocks=True).wait()
                return memory.messages(row).view(self.size, -1)
        return self.gather_shards(row, what).view(self.size, -1)

    def gather_with_host(self, values: Sequence[float], row: Tensor) -> tuple[Tensor, Tensor]:
        """Every rank's numbers, (size, n) on the host, and its (k,) row, (size, k) on the device; fp64, in rank order.

        One message where the device is the host. On a GPU the numbers travel from host to host, and nobody waits for
        the device.
        """
        host = torch.tensor(values, dtype=torch.float64, device="cpu")
        if row.device.type == "cpu":
            rows = self.gather_rows(torch.cat([host, row]))
            return rows[:, : len(values)], rows[:, len(values) :].contiguous()
        hosts = self.gather_rows(host, "the all-gather of what the hosts know")
        return hosts, self.gather_rows(row)

    def gather_objects(self, value: object, what: str = "the comparison of parameters") -> list[Any]:
        """Every rank's small python object, in rank order."""
        if self.size == 1:
            return [value]
        with self.awaited(what):
            mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            sizes = self.gather_shards(torch.tensor([mine.numel()], device="cpu"), what).tolist()
            row = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
            row[: mine.numel()] = mine
            rows = self.gather_shards(row, what).view(self.size, -1)
            return [pickle.loads(row[:size].numpy()) for row, size in zip(rows, sizes, strict=True)]

    def mesh(self, device_type: str) -> Any:
        """A one-dimensional DeviceMesh over the same ranks, for DTensors."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh  # half a second

            self._mesh = DeviceMesh.from_group(self.handle, device_type)
        return self._mesh

    def any_rank(self, flag: bool, what: str) -> bool:
        """Whether the flag is True on any rank. Host tensors alone are sent."""
        host = torch.tensor([float(flag)], dtype=torch.float64, device="cpu")
        return any(self.gather_shards(host, what).tolist())

    def broadcast(self, tensor: Tensor, what: str = "the broadcast of weights", source: int = 0) -> None:
        """Overwrite with one rank's of the group."""
        if self.size > 1:
            with self.awaited(what):
                self.start(what, dist.broadcast, tensor, src=dist.get_global_rank(self.handle, source)).wait()

    def broadcast_all(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each with the first rank's; those of one dtype and device travel together, up to 25 MiB."""
        for batch in _batches(tensors):
            is_one = len(batch) == 1 and batch[0].is_contiguous() and not (batch[0].is_conj() or batch[0].is_neg())
            joined = batch[0].view(-1) if is_one else torch.cat([tensor.reshape(-1) for tensor in batch])
            flat = joined.resolve_conj().resolve_neg()
            self.broadcast(flat.view(torch.uint8))  # gloo knows no int16 and no fp8, NCCL no int16
            if is_one:
                continue
            for tensor, part in zip(batch, flat.split([tensor.numel() for tensor in batch]), strict=True):
                part = part.view(tensor.shape)
                for dim, stride in enumerate(tensor.stride()):
                    if stride == 0 < tensor.shape[dim]:  # expanded: one memory location, which is written once
                        tensor, part = tensor.narrow(dim, 0, 1), part.narrow(dim, 0, 1)
                tensor.copy_(part)

    def sum(self, tensor: Tensor, what: str) -> None:
        """Overwrite with the sum over ranks."""
        if self.size > 1:
            with self.awaited(what):
                self.start(what, dist.all_reduce, tensor).wait()

    def first_ranks(self, values: Sequence[int], most: int, what: str) -> list[int]:
        """The first rank's list of at most `most` numbers, each 0 or more."""
        host = torch.full((most,), -1, dtype=torch.int64, device="cpu")
        host[: len(values)] = torch.tensor(values, dtype=torch.int64, device="cpu")
        self.broadcast(host, what)
        return [value for value in host.tolist() if value >= 0]


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of one dtype and device, in order, each of at most _BATCH_BYTES or of one tensor."""
    batches: dict[tuple[Any, ...], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key = tensor.dtype, tensor.device
        batch, num_bytes = batches.get(key, ([], 0))
        if batch and num_bytes + tensor.nbytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(tensor)
        batches[key] = batch, num_bytes + tensor.nbytes
    yield from (batch for batch, _ in batches.values())
