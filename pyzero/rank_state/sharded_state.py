"""This rank's part of a tensor that lies flat over ranks, in the form that torch.distributed.checkpoint needs.

A flat fragment of a tensor is a few boxes of its shape: the end of a row, whole rows, the start of a row, in each
dimension. The checkpoint stores boxes, so it can read them into other fragments, DTensors and plain tensors, and
nothing is gathered.

This module is imported only when a state dict is made, because it needs torch.distributed.tensor. It relies on private
names of torch. tests/checkpoint/test_sharded_state.py checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from pyzero.ops.rounding import ceil_div, round_up


class Box(NamedTuple):
    """A rectangular part of a tensor. Its elements lie in order in a flat fragment."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes_of(shape: Sequence[int], low: int, high: int) -> Iterator[Box]:
    """Cut elements [low, high) of a row-major tensor into boxes, in order: at most 2 * len(shape) - 1 of them."""
    if low >= high:
        return
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    first, last = low // row, ceil_div(high, row)  # rows that the range touches
    if last - first == 1:
        cuts = [(low, high)]
    else:
        cuts = [(low, (first + 1) * row)] if low % row else []
        begin, end = round_up(low, row), high // row * row
        cuts += [(begin, end)] if begin < end else []
        cuts += [(end, high)] if high % row else []
    for begin, end in cuts:
        index, inner = begin // row, begin % row
        if inner == 0 and end % row == 0:
            yield Box((index, *[0] * (len(shape) - 1)), ((end - begin) // row, *shape[1:]))
        else:
            for box in boxes_of(shape[1:], inner, inner + end - begin):
                yield Box((index, *box.offsets), (1, *box.sizes))


@dataclass(frozen=True)
class DTensorPart:
    """A DTensor, if a fragment is a part of its local tensor, and the place of that local tensor in it."""

    shape: torch.Size  # of the DTensor
    stride: tuple[int, ...]
    offsets: torch.Size  # of the local tensor in it
    wrap: Callable[[Tensor], DTensor]  # local tensor -> DTensor


@dataclass(frozen=True)
class Fragment:
    """The elements of a tensor that a rank holds."""

    shape: torch.Size  # of the tensor that ranks share
    stride: tuple[int, ...]  # of that tensor, dense
    low: int  # first element, in memory order
    high: int  # one past the last
    origin: str  # the rank of this state, and how it is cut: export.describe()
    gather: Callable[[Tensor], Tensor]  # every rank's flat part -> (numel,), on every rank
    part: DTensorPart | None = None  # None: the tensor that ranks share is the whole one
    is_copy: bool = False  # another model-parallel rank saves the same tensor

    @property
    def whole_shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.shape if self.part is None else self.part.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> Fragment:
        """Return itself, because it is constant and a process group cannot be copied."""
        return self

    def views(self, local: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """Yield boxes in the order of the tensor's dimensions, each with a view of its elements in the fragment."""
        order = sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim])  # outermost in memory first
        back = sorted(range(len(order)), key=order.__getitem__)
        begin = 0
        for box in boxes_of([self.shape[dim] for dim in order], self.low, self.high):
            end = begin + prod(box.sizes)
            offsets, sizes = ([values[i] for i in back] for values in box)
            if self.part is not None:
                offsets = [own + base for own, base in zip(offsets, self.part.offsets, strict=True)]
            yield Box(tuple(offsets), tuple(sizes)), local[begin:end].view(box.sizes).permute(back)
            begin = end


_READS = {"size", "dim", "numel", "nelement", "stride", "element_size", "is_contiguous", "__hash__"}
_MOVES = {"to", "cpu", "cuda", "clone", "detach", "pin_memory", "contiguous"}


class ShardedState(DTensor):
    """A tensor of an optimizer's state. This rank holds a flat fragment of it.

    It has the whole tensor's shape. torch.distributed.checkpoint can do with it what it does with DTensors: save, load,
    stage, move to the CPU, gather. It refuses arithmetic. `full_tensor()` gathers it; `to_local()` is the fragment.
    It pickles as the plain fragment.
    """

    fragment: Fragment

    @staticmethod
    def wrap(local: Tensor, fragment: Fragment, mesh: DeviceMesh) -> ShardedState:
        """Wrap a fragment. local: (high - low,); kept, not copied."""
        stride = fragment.stride if fragment.part is None else fragment.part.stride
        meta = TensorMeta(fragment.whole_shape, stride, local.dtype)
        spec = DTensorSpec(mesh, (Replicate(),), tensor_meta=meta)
        wrapped = ShardedState(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
        wrapped.fragment = fragment
        return wrapped

    def _like(self, local: Tensor) -> ShardedState:
        return self if local is self._local_tensor else ShardedState.wrap(local, self.fragment, self.device_mesh)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Allow what needs no other rank: questions about the tensor, and copies of it. Refuse the rest."""
        name, kwargs = func.__name__, kwargs or {}
        if name == "__get__" or name in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _MOVES and isinstance(args[0], ShardedState):
            return args[0]._like(getattr(args[0]._local_tensor, name)(*args[1:], **kwargs))
        raise TypeError(
            f"expected a whole tensor in {name}, got state of shape {tuple(args[0].shape)} of which this rank holds a "
            f"part; call full_tensor() on all ranks, or to_local() for the part"
        )

    def data_ptr(self) -> int:
        """Return 0, which means no memory, so that staging copies the fragment. torch would return its offset."""
        return 0

    def new_empty(self, size: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Make an empty tensor. One of the same shape is sharded alike, as staging for an asynchronous save needs."""
        if torch.Size(size) == self.shape:
            return self._like(self._local_tensor.new_empty(self._local_tensor.shape, **kwargs))
        return self._local_tensor.new_empty(size, **kwargs)

    def to_local(self, **kwargs: Any) -> Tensor:
        """Return this rank's fragment, (high - low,), in the parameter's memory order; the same memory."""
        return self._local_tensor.as_subclass(_Local).of(self.fragment)

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **kwargs: Any) -> DTensor:
        """Return the whole tensor on every rank. Collective.

        Raises:
            ValueError: The placement is not Replicate().
        """
        if not all(placement.is_replicate() for placement in placements or ()):
            raise ValueError(f"expected placements of [Replicate()], got {placements}; distribute full_tensor()")
        fragment = self.fragment
        whole = fragment.gather(self._local_tensor).as_strided(fragment.shape, fragment.stride)
        if fragment.part is not None:
            whole = fragment.part.wrap(whole).full_tensor()
        whole = whole.contiguous()  # torch's broadcast of a full state dict ignores strides
        return DTensor.from_local(whole, self.device_mesh, (Replicate(),), run_check=False)

    def full_tensor(self, **kwargs: Any) -> Tensor:
        """Return the whole tensor on every rank. Collective."""
        return self.redistribute().to_local()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedState:
        """Return a copy with its own local tensor."""
        return self._like(self._local_tensor.__deepcopy__(memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the plain fragment, so that torch.load(weights_only=True) loads it without this package."""
        return self._local_tensor.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        """Name the shape, and the elements that this rank holds."""
        held = f"elements {self.fragment.low} to {self.fragment.high} of {self.numel()}"
        return f"ShardedState(shape={tuple(self.shape)}, {self.dtype}, {self.device}, {held} in memory order)"

    # ---- what torch.distributed.checkpoint calls ------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if self.fragment.is_copy:
            return []
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        boxes = (box for box, _ in self.fragment.views(self._local_tensor))
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return next(view for box, view in self.fragment.views(self._local_tensor) if box.offsets == tuple(index.offset))


class _Local(Tensor):
    """A fragment that a whole tensor can be copied into, because torch does so with to_local() of a DTensor."""

    fragment: Fragment

    def of(self, fragment: Fragment) -> _Local:
        self.fragment = fragment
        return self

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Tensor:
        local = self.as_subclass(Tensor)
        if src.shape != self.fragment.whole_shape:
            return local.copy_(src, non_blocking)
        for box, view in self.fragment.views(local):
            slices = tuple(slice(low, low + size) for low, size in zip(box.offsets, box.sizes, strict=True))
            view.copy_(src[slices], non_blocking)
        return local


def _refuse_process(state: ShardedState) -> Any:
    raise TypeError(
        "expected an asynchronous save in a thread, got one in a process, which would receive plain fragments; pass "
        "async_checkpointer_type=AsyncCheckpointerType.THREAD"
    )


ForkingPickler.register(ShardedState, _refuse_process)
