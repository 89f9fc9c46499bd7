"""The only caller of torch.distributed: groups, the two transports of a reduce-scatter, the all-gather of weights."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyzero import memory

# torch 2.13 renames these, and warns of the old names; 2.11 has no new ones.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def find_ddp_wrapper(params: Collection[Tensor]) -> str | None:
    """The class name of a DistributedDataParallel module that holds one of these parameters, or None.

    Looks at every living object: call it once, not in every step. DDP keeps no register that could be asked.
    """
    kinds = _with_subclasses(torch.nn.parallel.DistributedDataParallel)
    for candidate in gc.get_objects():
        if type(candidate) in kinds and any(param in params for param in candidate.parameters()):
            return type(candidate.module).__name__
    return None


def _with_subclasses(kind: Any) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


class CollectiveError(RuntimeError):
    """A collective did not complete: another rank died, stalled, or took part in something else."""


class Work:
    """Something under way. On a GPU `wait` makes the current stream wait; on a CPU it blocks."""

    def __init__(self, handle: Any, group: Group, what: str) -> None:
        self._handle = handle
        self._group = group
        self._what = what

    def wait(self) -> None:
        """Return when what follows may use the result.

        Raises:
            CollectiveError: It failed, or took longer than the group's timeout.
        """
        if self._handle is not None:
            with self._group.naming(self._what):
                self._handle.wait()


@dataclass
class Exchange:
    """A reduce-scatter under way: after `work.wait()` the slices are there to be summed, in rank order."""

    work: Work
    slices: list[Tensor]  # (shard_numel,) each, in the dtype that was sent
    send: Tensor  # kept until read by all
    by_rank: bool = True  # slices[r] is rank r's; otherwise the one slice is a sum over ranks


class Group:
    """The ranks that share one optimizer's state. Without a process group it is one rank and nothing is sent."""

    def __init__(self, process_group: Any = None) -> None:
        if hasattr(process_group, "get_group"):  # a DeviceMesh of one dimension
            process_group = process_group.get_group()
        initialized = dist.is_available() and dist.is_initialized()
        if process_group is not None and not initialized:
            raise ValueError(
                "expected an initialised process group, got a process_group with none; "
                "call torch.distributed.init_process_group first, or leave it out"
            )
        self.handle = (process_group or dist.group.WORLD) if initialized else None
        self.size: int = dist.get_world_size(self.handle) if initialized else 1
        self.rank: int = dist.get_rank(self.handle) if initialized else 0

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Failures in here say which collective failed, and the timeout that it ran under."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise CollectiveError(
                f"{what} failed on rank {self.rank} of {self.size}: {reason}. Every rank must take part within "
                f"{self.timeout()}: one has died or stalled, or runs backward or step a different number of times. "
                f"See the other ranks' output; where they are only slow, raise the timeout of init_process_group"
            ) from error

    def timeout(self) -> str:
        """How long a collective may take, in words."""
        device = torch.device("cuda" if dist.get_backend(self.handle) == "nccl" else "cpu")
        options = getattr(self.handle._get_backend(device), "options", None)  # type: ignore[union-attr]
        return "its timeout" if options is None else f"{options._timeout.total_seconds():g} s"

    def all_gather_into(self, flat: Tensor, shard: Tensor) -> Work:
        """Fill (size * n,) `flat` with every rank's (n,) `shard`, which may be this rank's part of it."""
        what = "the all-gather of weights"
        if self.size == 1:
            return Work(None, self, what)
        with self.naming(what):
            return Work(_all_gather(flat, shard, group=self.handle, async_op=True), self, what)

    def gather_shards(self, shard: Tensor) -> Tensor:
        """(size * n,): every rank's (n,) shard."""
        if self.size == 1:
            return shard
        flat = shard.new_empty(self.size * shard.numel())
        with self.naming("the all-gather of a whole tensor"):
            _all_gather(flat, shard, group=self.handle)
        return flat

    def gather_rows(self, row: Tensor) -> Tensor:
        """(size, k): every rank's (k,) row, in rank order."""
        if self.size == 1:
            return row.unsqueeze(0)
        rows = row.new_empty(self.size * row.numel())
        with self.naming("the all-gather of overflow flag and norm"):
            _all_gather(rows, row, group=self.handle)
        return rows.view(self.size, -1)

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's small python object, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with warnings.catch_warnings(), self.naming("the comparison of parameters"):
            warnings.simplefilter("ignore", FutureWarning)
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite with the first rank's."""
        if self.handle is not None and self.size > 1:
            with self.naming("the broadcast of weights"):
                dist.broadcast(tensor, src=dist.get_global_rank(self.handle, 0), group=self.handle)


class ExactTransport:
    """All-to-all of the slices; the sum is ours: fp32, in rank order, the same whatever the bucket holds beside it."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, send: Tensor, what: str) -> Exchange:
        """Send each rank its slice of (size * n,) `send`; `what` names it where it fails."""
        received = memory.empty(send.numel(), send.dtype, send.device)
        with self.group.naming(what):
            handle = dist.all_to_all_single(received, send, group=self.group.handle, async_op=True)
        return Exchange(Work(handle, self.group, what), list(received.view(self.group.size, -1).unbind(0)), send)


class CollectiveTransport:
    """The library's own reduce-scatter, which sums in the dtype that is sent and in an order of its own."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, send: Tensor, what: str) -> Exchange:
        """Sum (size * n,) `send` over ranks; this rank receives its slice of the sum."""
        received = memory.empty(send.numel() // self.group.size, send.dtype, send.device)
        with self.group.naming(what):
            handle = _reduce_scatter(received, send, op=dist.ReduceOp.SUM, group=self.group.handle, async_op=True)
        return Exchange(Work(handle, self.group, what), [received], send, by_rank=False)


Transport = ExactTransport | CollectiveTransport
_TRANSPORTS: dict[str, Callable[[Group], Transport]] = {"exact": ExactTransport, "collective": CollectiveTransport}


def make_transport(name: str, group: Group) -> Transport:
    """The transport of that name."""
    if name not in _TRANSPORTS:
        raise ValueError(f"expected transport to be one of {', '.join(_TRANSPORTS)}, got {name!r}; choose one of these")
    return _TRANSPORTS[name](group)


def device() -> torch.device:
    """Where this process computes: its GPU, by LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def rank_and_size() -> tuple[int, int]:
    """Of the default group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def join() -> bool:
    """Initialise the default process group where a launcher set RANK and WORLD_SIZE; True where this call did it."""
    if not dist.is_available() or dist.is_initialized() or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return False
    mine = device()
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
        dist.init_process_group("nccl", device_id=mine)
    else:
        dist.init_process_group("gloo")
    return True


def leave() -> None:
    """End the default process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
