"""Parameters between zero.Init and initialize(): they have the whole shape, but this rank holds only its rows.

A parameter stays the same object. While it is sharded it has a subclass, which intercepts torch functions, and its
memory is one element. Writes (`normal_`, `copy_`, `w[0] = 0`, also through views) gather the whole weight, and all
ranks take rank 0's result. Reads of `w.data` or under no_grad() gather it too. Both are collective. Anything else
counts as a forward, and is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pyzero.comm.group import Group
from pyzero.ops.rounding import ceil_div

_ids = itertools.count()


class ZeroParamStatus(Enum):
    """Values of the attribute `ds_status` of a sharded parameter."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def mark_sharded(param: Any) -> None:
    """Set the attributes by which scripts recognise a stage-3 parameter: ds_id, ds_status, ds_shape and ds_numel."""
    param.ds_id, param.ds_status = next(_ids), ZeroParamStatus.NOT_AVAILABLE
    param.ds_shape, param.ds_numel = param.shape, param.numel()


# ---- rows of a weight ------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """This rank's rows of a weight, divided as by torch.chunk and fully_shard."""

    local: Tensor  # may have no rows
    group: Group
    device: torch.device | None = None  # device of the rows; None: the weight's

    def cut(self, whole: Tensor) -> None:
        """Keep a copy of this rank's rows of a whole weight."""
        per_rank = ceil_div(whole.shape[0], self.group.size)
        low = min(self.group.rank * per_rank, whole.shape[0])
        own = whole[low : low + per_rank].to(self.device or whole.device)
        self.local = own.clone(memory_format=torch.contiguous_format)

    def whole(self, like: Tensor) -> Tensor:
        """Gather all rows on every rank. like: A tensor of the whole shape."""
        per_rank = ceil_div(like.shape[0], self.group.size)
        padded = like.new_zeros(per_rank, *like.shape[1:])
        padded[: len(self.local)] = self.local
        flat = self.group.gather_shards(padded.view(-1), f"zero: the all-gather of a weight of shape {_shape(like)}")
        return flat.view(-1, *like.shape[1:])[: like.shape[0]]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _placeholder(like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Return a tensor of this shape, dtype and device that has one element of memory."""
    return like.new_zeros(()).expand(like.shape if shape is None else shape)


def shard_(param: Any, group: Group, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """Make a parameter keep only this rank's rows of rank 0's values. Collective.

    Args:
        param: A parameter of one dimension or more. It stays the same object.
        group: Ranks that share it.
        dtype: Dtype to which it is converted; None: it stays.
        device: Device of the rows; None: the weight's.
    """
    with torch.no_grad():
        whole = param.detach().to(dtype or param.dtype).contiguous()
        group.broadcast(whole, f"zero.Init: the broadcast of a weight of shape {_shape(whole)}")
        rows = Rows(whole, group, device)
        rows.cut(whole)
    _hide(param, rows, whole)
    mark_sharded(param)


def _hide(param: Any, rows: Rows, whole: Tensor) -> None:
    param.data = _placeholder(whole)
    param.rows = rows
    kind: Any = type(param)
    param.__class__ = _sharded(kind)


@torch.no_grad()
def _show(param: Any) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        whole = param.rows.whole(param)
        param.__class__ = _kind(param)
        param.data = whole


def gather_(param: Any) -> None:
    """Turn a sharded parameter back into a plain, whole one. Collective."""
    _show(param)
    del param.rows, param.ds_id, param.ds_status, param.ds_shape, param.ds_numel


@contextmanager
def gathered(params: Iterable[Any], source: int | None) -> Iterator[None]:
    """A context in which sharded parameters are plain and whole. On exit, all ranks take the source's values.

    Args:
        params: Sharded parameters.
        source: Rank in their group; None: writes are lost.
    """
    held = list(dict.fromkeys(params))
    for param in held:
        _show(param)
        param.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    except BaseException:
        source = None
        raise
    finally:
        for param in held:
            rows, whole = param.rows, param.detach()
            if source is not None:
                whole = whole.contiguous()
                what = f"zero: the broadcast of a weight of shape {_shape(whole)}"
                rows.group.broadcast(whole, what, source)
                rows.cut(whole)
            _hide(param, rows, whole)
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE


# ---- what torch does to them -----------------------------------------------------------------------------------------

_VIEWS = {
    *("data", "T", "H", "mT", "mH", "detach", "view", "view_as", "reshape", "flatten", "t", "transpose", "permute"),
    *("__getitem__", "select", "narrow", "unsqueeze", "squeeze", "diagonal", "expand", "real"),
}
_CONVERSIONS = {"to", "half", "float", "double", "bfloat16", "cuda", "cpu", "contiguous"}
_SHAPES = {  # functions that read only shape, dtype and device
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_signed", "is_same_size", "get_device", "type"),
    *("requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook", "is_pinned", "is_shared"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like"),
    *("full_like", "rand_like", "randn_like", "_has_compatible_shallow_copy_type", "data_ptr", "untyped_storage"),
    "__hash__",
}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def _misuse(name: str) -> RuntimeError:
    return RuntimeError(
        f"got {name}() with a weight that zero.Init has sharded, wanted it whole; call initialize() before a forward, "
        f"and read weights under torch.no_grad(), or in deepspeed.zero.GatheredParameters(parameter)"
    )


class _Watched:
    """Intercepts torch functions on sharded parameters and on views of them."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        is_getter, is_setter = name == "__get__", name == "__set__"
        if is_getter or is_setter:
            name = getattr(func.__self__, "__name__", "")
        kwargs = kwargs or {}
        if is_setter and name == "data":
            return _set_data(*args)
        if name in _VIEWS:
            return ShardedView.of(args[0], lambda tensor: func(tensor, *args[1:], **kwargs))
        if name in _CONVERSIONS:
            return _converted(args[0], lambda tensor: func(tensor, *args[1:], **kwargs))
        if is_getter or is_setter or name in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
            return _written(func, args, kwargs)
        return _read(func, args, kwargs)

    def __format__(self, spec: str) -> str:
        """Return repr()."""
        return repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse torch.save and pickling.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "got a weight that zero.Init has sharded, wanted a whole one to save; save in "
            "deepspeed.zero.GatheredParameters(list(model.parameters())), or call engine.save_16bit_model()"
        )


class ShardedParam(_Watched, nn.Parameter):
    """A parameter of which this rank holds some rows, in its attribute `rows`."""

    rows: Rows

    def take_rows(self) -> Tensor:
        """Return this rank's rows, and release them here."""
        local, self.rows.local = self.rows.local, self.rows.local.new_empty(0)
        return local

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy with its own rows."""
        if id(self) not in memo:
            memo[id(self)] = _copied(self, lambda tensor: tensor.clone(), self.requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={_shape(self)}, dtype={self.dtype}, {len(self.rows.local)} rows here)"


@cache
def _sharded(kind: type) -> type:
    """Return the sharded subclass of a parameter's class."""
    bases = (ShardedParam,) if kind is nn.Parameter else (ShardedParam, kind)
    return type(f"Sharded{kind.__name__}", bases, {"kind": kind})


def _kind(param: Any) -> type:
    kind: type = type(param).kind
    return kind


class ShardedView(_Watched, torch.Tensor):
    """A view of a sharded parameter. Each use makes it anew from the whole parameter."""

    origin: Any
    make: Callable[[Tensor], Tensor]  # from the whole parameter

    @staticmethod
    def of(tensor: Any, make: Callable[[Tensor], Tensor]) -> ShardedView:
        """Make a view of a sharded parameter or of another view."""
        with torch._C.DisableTorchFunctionSubclass():
            view = make(tensor).detach().as_subclass(ShardedView)
        if isinstance(tensor, ShardedView):
            view.origin, view.make = tensor.origin, lambda whole: make(tensor.make(whole))
        else:
            view.origin, view.make = tensor, make
        return view

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={_shape(self)}, dtype={self.dtype})"


def _shown(param: Any) -> Tensor:
    """Return the placeholder as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        shown: Tensor = param.as_subclass(torch.Tensor).detach()
    return shown


def _origin(tensor: Any) -> Any:
    return tensor.origin if isinstance(tensor, ShardedView) else tensor


def _watched(args: Any, kwargs: Any) -> list[Any]:
    """Return the sharded tensors among the arguments; an empty list if the first tensor is not sharded."""
    given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
    return [item for item in given if isinstance(item, _Watched)] if isinstance(given[0], _Watched) else []


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function that writes to its first argument, on whole weights."""
    given = _watched(args, kwargs)
    if not given:
        raise _misuse(func.__name__)
    with gathered([_origin(tensor) for tensor in given], source=0):
        func(*_whole(args), **_whole(kwargs))
    return given[0]


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function that reads whole weights."""
    given = _watched(args, kwargs)
    if not given or (torch.is_grad_enabled() and any(isinstance(item, ShardedParam) for item in given)):
        raise _misuse(getattr(func, "__name__", str(func)))
    with gathered([_origin(tensor) for tensor in given], source=None):
        return func(*_whole(args), **_whole(kwargs))


def _whole(value: Any) -> Any:
    return tree_map_only(ShardedView, lambda view: view.make(view.origin), value)


def _copied(param: Any, change: Callable[[Tensor], Tensor], requires_grad: bool) -> Any:
    """Return a sharded parameter with changed rows. change: Makes the new rows from this rank's."""
    rows: Rows = param.rows
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        shown = _placeholder(change(_shown(param)[:0]), param.shape)
        made: Any = nn.Parameter(shown, requires_grad=requires_grad)
        local = change(rows.local)
        _hide(made, Rows(local.to(rows.device or local.device), rows.group, rows.device), shown)
    mark_sharded(made)
    return made


def _converted(tensor: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Run `.to()` or a similar conversion."""
    param = _origin(tensor)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        after = convert(_shown(param)[:0])
        if (after.dtype, after.device) == (param.dtype, param.device):
            return tensor
    return _copied(param, convert, requires_grad=False)


def _set_data(param: Any, value: Any) -> None:
    """Run `param.data = value`. value: Sharded, or whole; of a whole one, rank 0's is taken."""
    other = _origin(value)
    if not isinstance(param, ShardedParam):
        raise _misuse("data")
    if isinstance(other, ShardedParam):
        rows, shown = other.rows, _shown(other)
    else:
        rows, shown = Rows(value, param.rows.group, param.rows.device), value.contiguous()
        rows.group.broadcast(shown, f"zero: the broadcast of a weight of shape {_shape(shown)}")
        rows.cut(shown)
    param.__class__ = _kind(param)
    _hide(param, rows, shown)
