"""The tensors in `.grad` if several ranks reduce. They answer for the averaged gradient, not for this rank's part.

Code that reads gradients expects whole ones: torch.nn.utils.clip_grad_norm_, a logger of norms, a check for NaN. On one
rank's part it would be silently wrong. With these tensors it is right, or raises an error that says what to call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyzero.gradients.reduced.accumulation import ParamGrad


class GradOwner(Protocol):
    """Methods of the optimizer's gradients that these tensors and their records call. `param_norm` is collective."""

    @property
    def num_rounds(self) -> int:
        """How often gradients have been reduced. It is the same on all ranks."""

    def param_norm(self, record: ParamGrad, norm_type: float) -> Tensor:
        """Return the p-norm of one parameter's averaged gradient: 0-D fp32."""

    def scale(self, records: Sequence[ParamGrad], factor: Tensor | float, inverse: bool = False) -> None:
        """Multiply the reduced parts of these gradients by one number, or divide them by it."""

    def zero(self, record: ParamGrad) -> None:
        """Make the reduced part of this gradient zeros."""


NORMS = (torch.norm, torch.linalg.vector_norm, torch.linalg.norm, Tensor.norm)
_FOREACH_NORM = torch._foreach_norm
_CHECKS = (torch.isfinite, Tensor.isfinite, torch.isnan, Tensor.isnan)  # not isinf: a norm cannot show inf beside NaN
_SCALES = (Tensor.mul_, Tensor.__imul__)
_INVERSE_SCALES = (Tensor.div_, Tensor.true_divide_, Tensor.divide_, Tensor.__itruediv__)
_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_UNCHANGING = (Tensor.detach, Tensor.detach_, Tensor.requires_grad_, _GET_DATA)  # zero_grad and old loops call them
_IN_PLACE = (Tensor.zero_, *_SCALES, *_INVERSE_SCALES, *_UNCHANGING, _SET_DATA)
_MEMORY = Tensor.as_subclass  # used by pyzero, and by callers who want only this rank's part
_VALUES = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__)
_FOREACH_SCALES = (torch._foreach_mul_, torch._foreach_div_)
_CLAMPS = (
    *(Tensor.clamp_, Tensor.clip_, Tensor.clamp_min_, Tensor.clamp_max_, torch.clamp_),
    *(torch._foreach_clamp_min_, torch._foreach_clamp_max_),
)


class _Gradient(torch.Tensor):
    """A gradient that its optimizer reduces over ranks."""

    record: ParamGrad
    owner: weakref.ref[Any]
    generation: int  # of the gradient; see ParamGrad

    def _attach(self, record: ParamGrad, owner: weakref.ref[Any]) -> None:
        self.record, self.owner, self.generation = record, owner, record.generation

    @property
    def _is_current(self) -> bool:
        """Whether this gradient has neither been cleared nor replaced since it was read from `.grad`."""
        return self.record.is_current(self.generation)

    @property
    def _is_plain(self) -> bool:
        """Whether it is an ordinary tensor that stands only for its own values."""
        return False

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle norms and scaling of the averaged gradient. The class decides on everything else."""
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], _Gradient) and not args[0]._is_plain else None
        if func in NORMS and first is not None:
            return first._norm(read_norm(func, args, kwargs))
        if func is _FOREACH_NORM:
            return [_norm_of(tensor, read_norm(func, args, kwargs)) for tensor in args[0]]
        if func in _CHECKS and first is not None:
            return func(first._norm(NormCall(2.0))).expand(first.shape)
        if func in _FOREACH_SCALES:
            return _scale_each(func, *args, **kwargs)
        if func is torch._foreach_zero_:
            for tensor in args[0]:
                tensor.zero_()
            return None
        if func in _CLAMPS:
            raise _refusal("clamp_ (clip_grad_value_)", args)
        if func == _SET_DATA and args[0] is args[1]:  # nn.Module.to() does this if nothing moves
            return None
        if func in _IN_PLACE and first is not None:
            result = first._in_place(func, args, kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        _check_whole(func, args, result)
        return result

    def _in_place(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one of _IN_PLACE. Return NotImplemented if it should run only on the tensor's own memory."""
        raise NotImplementedError

    def _norm(self, call: NormCall) -> Tensor:
        owner = self.owner()
        if owner is None or not call.is_plain:
            what = "a norm over dimensions, of a matrix, or of another order than p > 0" if owner else "a norm"
            raise _refusal(what, [self])
        if not self._is_current:
            raise RuntimeError(
                f"got a norm of a .grad of shape {tuple(self.shape)} that has been cleared or replaced since it was "
                f"read, expected one of the present .grad; ask for it before that, or keep optimizer.full_grad(p)"
            )
        return call.cast(owner.param_norm(self.record, call.norm_type))

    def __deepcopy__(self, memo: Any) -> Any:
        """Refuse, because a copy of one rank's part would be taken for the whole."""
        raise _refusal("deepcopy", [self])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to pickle, because one rank's part would be taken for the whole."""
        raise _refusal("pickle", [self])


class LocalGrad(_Gradient):
    """This rank's own sum of gradients, not reduced yet. An ordinary tensor, except for norms and scaling.

    If it was cleared before it was reduced, it is an ordinary tensor in every way. If a part of the gradient is in the
    shards, its values cannot be read, because they are neither this rank's sum nor the mean.
    """

    is_part = False  # a part of its gradient was in the shards when it left `.grad`, or it was reduced

    @staticmethod
    def wrap(grad: Tensor, record: ParamGrad, owner: weakref.ref[Any]) -> LocalGrad:
        """Make one over the same memory."""
        wrapped = grad.detach().as_subclass(LocalGrad)
        wrapped._attach(record, owner)
        return wrapped

    @property
    def _is_plain(self) -> bool:
        """See _Gradient."""
        return not self._is_current and not self._has_rest

    @property
    def _has_rest(self) -> bool:
        """Whether a part of its gradient is in the shards, and not in it."""
        return self.is_part or (self.generation == self.record.generation and self.record.has_reduced_values)

    def _in_place(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self._is_current:
            return NotImplemented
        current = self.record.param.grad
        if current is not self and isinstance(current, _Gradient):
            return func(current, *args[1:], **kwargs)  # it has been reduced since it was read from `.grad`
        owner = self.owner()
        if owner is None:
            return NotImplemented
        if func in _UNCHANGING:
            return self
        if func == _SET_DATA:
            return self.copy_(args[1])  # the sum that is sent lies in this memory
        if func is not Tensor.zero_:
            return NotImplemented
        owner.zero(self.record)  # the reduced part
        with torch._C.DisableTorchFunctionSubclass():
            func(*args, **kwargs)
        self.record.local_was_zeroed()
        return self


class ShardedGrad(_Gradient):
    """Stands for a reduced gradient. The averaged values lie in shards over the ranks; it has no storage.

    Norms, isfinite, isnan, zero_ and multiplication by one number apply to the whole gradient. Reading it is
    collective. Anything else raises RuntimeError: `optimizer.full_grad(p)` gathers the values, and
    `optimizer.set_full_grad(p, v)` writes them.
    """

    stands_for: _Gradient | None = None  # in `.grad` of a DTensor: the gradient of this rank's part

    @staticmethod
    def placeholder(param: Tensor, record: ParamGrad, owner: weakref.ref[Any]) -> ShardedGrad:
        """Make one with the parameter's shape, strides, dtype and device."""
        made: ShardedGrad = torch.Tensor._make_wrapper_subclass(
            ShardedGrad, param.shape, param.stride(), dtype=param.dtype, device=param.device, storage_size=0
        )
        made._attach(record, owner)
        return made

    def _in_place(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.stands_for, LocalGrad) and func not in (*_UNCHANGING, _SET_DATA):
            func(self.stands_for, *args[1:], **kwargs)
            return self
        owner = self.owner()
        if owner is None or func == _SET_DATA:
            raise _refusal("an assignment to .data" if func == _SET_DATA else func.__name__, args)
        if func in _UNCHANGING or not self._is_current:  # a dropped gradient belongs to nobody
            return self
        current = self.record.param.grad
        if isinstance(current, LocalGrad):  # more has come since it was read
            func(current, *args[1:], **kwargs)
        elif func is Tensor.zero_:
            owner.zero(self.record)
        elif kwargs.get("rounding_mode") is not None:
            raise _refusal("division with a rounding mode", args)
        else:
            factor = _checked_factor(args[1] if len(args) > 1 else kwargs.get("other"), self)
            owner.scale([self.record], factor, inverse=func in _INVERSE_SCALES)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it disabled
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse, because there are no values here."""
        raise _refusal(str(func).split(".")[-2], args, is_collective="c10d" in func.namespace)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name shape, dtype and device, because there are no values."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ShardedGrad(shape={tuple(self.shape)}, dtype={dtype}, device={self.device})"


class NormCall(NamedTuple):
    """The arguments of a call of a norm function."""

    norm_type: float  # p; NaN: a name other than "fro"
    dtype: torch.dtype | None = None  # of the result, if given
    is_plain: bool = True  # the p-norm of all elements, p > 0

    def cast(self, norm: Tensor) -> Tensor:
        """Return the norm in the dtype that was asked for."""
        return norm if self.dtype is None else norm.to(self.dtype)


def read_norm(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> NormCall:
    """Read the arguments of one of NORMS, or of torch._foreach_norm."""
    rest = dict(kwargs)
    given = args[1] if len(args) > 1 else next((rest.pop(n) for n in ("ord", "p") if n in rest), None)
    dtype = rest.pop("dtype", None)
    if given is None or given == "fro":
        norm_type = 2.0
    else:
        norm_type = math.nan if isinstance(given, str) else float(given)
    is_of_matrix = func is torch.linalg.norm and given not in (None, "fro") and args[0].dim() > 1
    asks_no_more = all(value is None or value is False for value in (*args[2:], *rest.values()))
    return NormCall(norm_type, dtype, norm_type > 0 and asks_no_more and not is_of_matrix)


def _check_whole(func: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
    """Raise if an op has read a LocalGrad with a part in the shards. The step's message refuses edits of one."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    has_values = func in _VALUES or any(isinstance(each, Tensor) for each in results)
    is_foreach = result is None and args and isinstance(args[0], (tuple, list))
    if func is _MEMORY or not (has_values or is_foreach):
        return
    written = args[:1] if result is None or result is args[0] else []
    for grad in _local_grads_in(args):
        is_edit = not grad.is_part and any(grad is each for each in _local_grads_in(written))
        if grad._has_rest and not is_edit:
            raise _refusal(func.__name__, [grad])


def _local_grads_in(args: Sequence[Any]) -> list[LocalGrad]:
    return [value for value in _flat(args) if isinstance(value, LocalGrad)]


def _flat(args: Sequence[Any]) -> list[Any]:
    return [value for arg in args for value in (arg if isinstance(arg, (tuple, list)) else (arg,))]


def _norm_of(tensor: Tensor, call: NormCall) -> Tensor:
    if isinstance(tensor, _Gradient):
        if not tensor._is_plain:
            return tensor._norm(call)
        tensor = tensor.as_subclass(torch.Tensor)
    norm: Tensor = torch.linalg.vector_norm(tensor, call.norm_type, dtype=call.dtype)
    return norm


def _scale_each(func: Callable[..., Any], tensors: Sequence[Tensor], factor: Any) -> None:
    """Run _foreach_mul_ or _foreach_div_, which clip_grad_norm_ calls."""
    factors = list(factor) if isinstance(factor, (list, tuple)) else [factor] * len(tensors)
    inverse = func is torch._foreach_div_
    together: dict[tuple[int, int], tuple[Any, list[ParamGrad], Any]] = {}  # by owner and factor
    for tensor, one in zip(tensors, factors, strict=True):
        if isinstance(tensor, ShardedGrad) and tensor.stands_for is not None:
            tensor = tensor.stands_for
        current: Any = tensor
        if isinstance(tensor, _Gradient) and tensor._is_current:
            current = tensor.record.param.grad
        if not isinstance(current, ShardedGrad) or not current._is_current:
            current.div_(one) if inverse else current.mul_(one)
            continue
        owner = current.owner()
        if owner is None:
            raise _refusal(func.__name__, [current])
        found = together.setdefault((id(owner), id(one)), (owner, [], _checked_factor(one, current)))
        found[1].append(current.record)
    for owner, records, value in together.values():
        owner.scale(records, value, inverse)


def _checked_factor(value: Any, grad: Tensor) -> Tensor | float:
    if isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, _Gradient):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise _refusal("multiplication by anything but one number", [grad])


def _refusal(what: str, args: Sequence[Any], is_collective: bool = False) -> RuntimeError:
    grad = next((arg for arg in _flat(args) if isinstance(arg, _Gradient)), None)
    shape = "" if grad is None else f" of shape {tuple(grad.shape)}"
    hint = ""
    if is_collective:
        hint = "It is averaged over the ranks already: leave the collective out. "
    elif torch._C._current_graph_task_id() != -1:
        hint = "A hook that is registered before the optimizer is built sees this rank's own gradient. "
    return RuntimeError(
        f"got {what} of a .grad{shape} whose values lie in shards over the ranks; expected norms, isfinite, isnan, "
        f"zero_ or multiplication by one number. {hint}optimizer.full_grad(p) gathers the averaged gradient, "
        f"optimizer.set_full_grad(p, value) writes it, optimizer.clip_grad_norm_(max_norm) clips it, "
        f"optimizer.zero_grad() drops it, as is needed before a model is converted or moved"
    )
