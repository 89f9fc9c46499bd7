"""The ranks that share an optimizer's state, and their collectives through torch.distributed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero.comm import process_group_pool
from pyzero.comm.root_gather import RootGather
from pyzero.comm.shared_memory import HostError, SharedMemory, find_hosts
from pyzero.comm.work import CollectiveError, Handle, Work, WorkGroup

# torch 2.13 renames this, and warns of the old name; 2.11 has no new one.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_MOST_IN_RING = 4  # ranks: a row of host memory goes through the first rank if there are more
_WORDS_BYTES = 64  # of the text in which a rank names what it reads
_BATCH_BYTES = 25 << 20  # of tensors that are broadcast together


class Group(WorkGroup):
    """The ranks that share one optimizer's state. Without a process group it is one rank, and sends nothing.

    Each Group has its own process group over the same ranks. So the collectives of two optimizers cannot mix if ranks
    use them in different orders.
    """

    _mesh: Any = None
    hosts: Sequence[Sequence[int]] = ()  # the ranks of each host, once memory is shared

    def spread_over(self, other: Group) -> Group:
        """Return the group of all ranks of a mesh; this group and `other` are its dimensions. Collective over both."""
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

    def share_memory(self) -> SharedMemory:
        """Connect the ranks of each host by shared memory. On one host gather_rows then uses it. Collective.

        Raises:
            HostError: The ranks cannot share memory, or no two are on one host.
        """
        if self.shared_memory is None:
            self.hosts = find_hosts(self.gather_objects)
            if len(self.hosts) == self.size:
                raise HostError("each rank runs on another host")
            mine = next(ranks for ranks in self.hosts if self.rank in ranks)
            self.shared_memory = SharedMemory(self.rank, mine, self.gather_objects, self._timeout)
        return self.shared_memory

    def begin_all_to_all(
        self, received: Tensor, sent: Tensor, received_numels: Sequence[int], sent_numels: Sequence[int]
    ) -> Handle:
        """Begin an all-to-all, for `launch`. The numels are elements from and to each rank."""
        handle: Handle = dist.all_to_all_single(
            received, sent, list(received_numels), list(sent_numels), group=self.handle, async_op=True
        )
        return handle

    def all_gather_into(self, flat: Tensor, shard: Tensor) -> Work:
        """Fill (size * n,) `flat` with every rank's (n,) `shard`. `shard` may be this rank's part of `flat`."""
        what = "the all-gather of weights"
        return Work(None, self, what) if self.size == 1 else self.start(what, _all_gather, flat, shard)

    def gather_shards(self, shard: Tensor, what: str = "the all-gather of a whole tensor") -> Tensor:
        """Return every rank's (n,) shard: (size * n,)."""
        if self.size == 1:
            return shard
        with self.awaited(what):
            flat = shard.new_empty(self.size * shard.numel())
            self.start(what, _all_gather, flat, shard).wait()
        return flat

    def check_alike(self, what: str, model_groups: Sequence[Group] = ()) -> None:
        """Check that every rank is about to read the same. Collective; sends only host memory.

        model_groups: The other dimensions of the ranks' mesh.

        Raises:
            CollectiveError: They differ. Raised on all ranks of this group and of model_groups, before anything else
                is sent.
        """
        differs = self._difference(what)
        for group in model_groups:  # a rank that has seen a difference tells these too
            told = group._difference("other tensors" if differs else what)
            differs = differs or told
        if differs:
            raise CollectiveError(f"{differs}. Read whole tensors equally often and in the same order on every rank")

    def _difference(self, what: str) -> str | None:
        """Return what each rank reads, as text, if they differ; else None."""
        if self.size == 1:
            return None
        mine = torch.tensor([*what.encode()[:_WORDS_BYTES].ljust(_WORDS_BYTES)], dtype=torch.uint8, device="cpu")
        rows = self.gather_shards(mine, "the comparison of what is read").view(self.size, -1)
        if bool((rows == mine).all()):
            return None
        words = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
        return "; ".join(f"rank {rank} reads {theirs}" for rank, theirs in enumerate(words))

    def gather_rows(self, row: Tensor, what: str = "the all-gather of overflow flag and norm") -> Tensor:
        """Return every rank's (k,) row, in rank order: (size, k)."""
        memory = self.shared_memory
        if memory is not None and len(self.hosts) == 1 and memory.can_send(row):
            with self.awaited(what):
                self.launch(what, lambda: memory.send(row), blocks=True).wait()
                return memory.messages(row).view(self.size, -1)
        if self.size <= _MOST_IN_RING or row.device.type != "cpu":
            return self.gather_shards(row, what).view(self.size, -1)
        with self.awaited(what):
            flat = row.new_empty(self.size * row.numel())
            self.launch(what, lambda: RootGather(flat, row, self.handle), blocks=True).wait()
        return flat.view(self.size, -1)

    def gather_with_host(self, values: Sequence[float], row: Tensor) -> tuple[Tensor, Tensor]:
        """Return every rank's numbers, (size, n) on the host, and its row, (size, k) on the device; in fp64.

        On a CPU both travel in one message. On a GPU the numbers travel from host to host, and no host waits for its
        device.
        """
        host = torch.tensor(values, dtype=torch.float64, device="cpu")
        if row.device.type == "cpu":
            rows = self.gather_rows(torch.cat([host, row]))
            return rows[:, : len(values)], rows[:, len(values) :].contiguous()
        hosts = self.gather_rows(host, "the all-gather of what the hosts know")
        return hosts, self.gather_rows(row)

    def gather_objects(self, value: object, what: str = "the comparison of parameters") -> list[Any]:
        """Return every rank's small Python object, in rank order."""
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
        """Return a one-dimensional DeviceMesh over the same ranks, for DTensors.

        Raises:
            RuntimeError: As check_exists, because torch makes no mesh without the process group.
        """
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh  # the import takes half a second

            self.check_exists("the DTensors of a state dict", ", or use full_state_dict()")
            self._mesh = DeviceMesh.from_group(self.handle, device_type)
        return self._mesh

    def any_rank(self, flag: bool, what: str) -> bool:
        """Whether the flag is True on any rank. Sends only host tensors."""
        host = torch.tensor([float(flag)], dtype=torch.float64, device="cpu")
        return any(self.gather_shards(host, what).tolist())

    def broadcast(self, tensor: Tensor, what: str = "the broadcast of weights", source: int = 0) -> None:
        """Overwrite the tensor with that of one rank of the group."""
        if self.size > 1:
            with self.awaited(what):
                self.start(what, dist.broadcast, tensor, src=dist.get_global_rank(self.handle, source)).wait()

    def broadcast_all(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with the first rank's. Those of one dtype and device travel in batches up to 25 MiB."""
        for batch in _batches(tensors):
            is_one = len(batch) == 1 and batch[0].is_contiguous() and not (batch[0].is_conj() or batch[0].is_neg())
            flat = batch[0].view(-1) if is_one else torch.cat([tensor.reshape(-1) for tensor in batch])
            self.broadcast(flat.view(torch.uint8))  # gloo knows no int16 and no fp8, NCCL no int16
            if is_one:
                continue
            for tensor, part in zip(batch, flat.split([tensor.numel() for tensor in batch]), strict=True):
                part = part.view(tensor.shape)
                for dim, stride in enumerate(tensor.stride()):
                    if stride == 0 < tensor.shape[dim]:  # expanded: one memory location, to write once
                        tensor, part = tensor.narrow(dim, 0, 1), part.narrow(dim, 0, 1)
                tensor.copy_(part)

    def sum(self, tensor: Tensor, what: str) -> None:
        """Overwrite the tensor with its sum over the ranks."""
        if self.size > 1:
            with self.awaited(what):
                self.start(what, dist.all_reduce, tensor).wait()

    def first_ranks(self, values: Sequence[int], most: int, what: str) -> list[int]:
        """Return the first rank's list of at most `most` numbers, each 0 or more."""
        host = torch.full((most,), -1, dtype=torch.int64, device="cpu")
        host[: len(values)] = torch.tensor(values, dtype=torch.int64, device="cpu")
        self.broadcast(host, what)
        return [value for value in host.tolist() if value >= 0]


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield batches of tensors of one dtype and device, in order. A batch has up to _BATCH_BYTES, or one tensor."""
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
