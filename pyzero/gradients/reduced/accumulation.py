"""Where a parameter's gradient is: in this rank's own sum, in the shards with the mean, or in both.

It has one of four states (see the picture in docs/design.md). `has_local` and `is_reduced` distinguish them:

    none      `.grad` is None
    local     `.grad` is a LocalGrad: this rank's sum of one or more backwards, not sent yet
    reduced   `.grad` is a ShardedGrad: the mean over ranks lies in the shards
    both      `.grad` is a LocalGrad: gradients that came after the part in the shards

`.grad` is the truth. If the caller assigns or clears it, the state changes, and `observe()` notices before anything
else happens. A gradient lives until it is cleared, as in torch; step() does not change it.
"""

from __future__ import annotations

import weakref
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from pyzero import memory
from pyzero.gradients.interface import sparse_error
from pyzero.sharding.flat_params import conversion_error, flatten
from pyzero.sharding.local_param import LocalParam, awaited, user_param
from pyzero.sharding.sharded_grad import LocalGrad, ShardedGrad

_MOST_EDITS = 2**16  # of a gradient between two rounds; with more, a difference between ranks may be missed


class InShards(Enum):
    """Which part of a parameter's gradient the shards hold."""

    NOTHING = auto()
    ZEROS = auto()  # known to be zeros, on all ranks
    VALUES = auto()


_NOTHING, _ZEROS, _VALUES = InShards  # to read one of an enum's class takes as long as ten names do


class ParamGrad:
    """One parameter's gradient on this rank."""

    def __init__(self, param: Tensor, number: int, stride: tuple[int, ...], owner: weakref.ref[Any]) -> None:
        self._param = weakref.ref(param)  # weak: `.grad` holds this record, and the collector cannot see that cycle
        self.number = number  # among the optimizer's parameters
        self.position = 0  # in its bucket
        self.is_used = False  # this rank has contributed to it
        self._is_arriving = False  # from before_arrival() to after_arrival(); a hook that raises prevents the latter
        self.is_in_backward = False  # from then until the backward ends; the caller's hooks may run
        self.generation = 0  # grows with every dropped gradient, so that tensors of an earlier one are recognised

        # The part in the shards:
        self.in_shards = _NOTHING
        self.shard_is_stale = False  # the shards still hold a part of a cleared gradient
        self.num_edits = 0  # by the caller; should be the same on all ranks
        self.product = 1.0  # of the caller's factors, as far as the host knows them
        self.is_half_edited = False  # the other part was edited in place: refused when gradients are read
        self.factor: Tensor | None = None  # 0-D: a factor that this part still needs

        # This rank's own sum, not sent yet:
        self.main_grad: Tensor | None = None  # (numel,) fp32: the sum behind a 16-bit `_local`
        self._local: Tensor | None = None  # the plain tensor behind a LocalGrad, in the parameter's dtype
        self._version = 0  # of `_local` when it was last seen
        self._zeroed_version = -1  # of `_local` when it was filled with zeros

        self._published: Tensor | None = None  # the tensor that was put in `.grad` last
        self._owner = owner
        self._dtype, self._device, self._shape = param.dtype, param.device, param.shape
        self._stride = stride  # in the bucket; the parameter's own may have changed

    @property
    def has_local(self) -> bool:
        """Whether this rank holds gradients that have not been sent."""
        return self._local is not None

    @property
    def has_values(self) -> bool:
        """Whether this rank holds unsent gradients that are not known to be zeros. Zeros fit any loss scale."""
        return self._local is not None and self._local._version != self._zeroed_version

    def local_was_zeroed(self) -> None:
        """Called when `.grad.zero_()` has filled the local sum with zeros."""
        if self._local is not None:
            self.main_grad = None
            self._version = self._zeroed_version = self._local._version

    def local_is_zeros(self) -> bool:
        """Whether the local sum is all zeros. Reads the values, so it waits for a GPU."""
        if self._local is None or self._local.any():
            return False
        self.local_was_zeroed()
        return True

    @property
    def is_cleared(self) -> bool:
        """Whether `.grad` was set to None since it was last seen."""
        return self.param.grad is None and self._published is not None

    @property
    def was_reassigned_or_edited(self) -> bool:
        """Whether `.grad` was assigned or edited since it was last seen."""
        grad = self.param.grad
        is_new = grad is not None and grad is not self._published
        return is_new or (self._local is not None and self._local._version != self._version)

    @property
    def is_reduced(self) -> bool:
        """Whether a part of the gradient, maybe zeros, lies in the shards."""
        return self.in_shards is not _NOTHING

    @property
    def has_reduced_values(self) -> bool:
        """Whether a part that is not known to be zeros lies in the shards."""
        return self.in_shards is _VALUES

    @property
    def param(self) -> Tensor:
        """The parameter. It lives as long as the optimizer."""
        return self._param()  # type: ignore[return-value]

    def is_current(self, generation: int) -> bool:
        """Whether `.grad` is still the gradient of that generation: neither cleared nor replaced since."""
        return generation == self.generation and self._param() is not None and self.param.grad is self._published

    def restore(self) -> None:
        """Put the tensor that the caller has cleared back into `.grad`."""
        self.param.grad = self._published

    def observe(self) -> bool:
        """Follow what the caller has done to `.grad`. Return whether that drops the part in the shards.

        Raises:
            RuntimeError: `.grad` is the ShardedGrad of another gradient, or the unreduced rest of one.
            TypeError: `.grad` is sparse.
        """
        self.finish_arrival()
        grad = self.param.grad
        if grad is self._published:
            if self._local is not None and self._local._version != self._version:
                self.is_half_edited |= self.has_reduced_values
                self.main_grad = None  # .grad was edited, so .grad is the sum
                self._version = self._local._version
            return False
        if isinstance(grad, ShardedGrad) or (isinstance(grad, LocalGrad) and grad.is_part):
            what = "a ShardedGrad" if isinstance(grad, ShardedGrad) else "what was not reduced"
            raise RuntimeError(
                f"expected a tensor or None in .grad of the parameter of shape {tuple(self._shape)}, got {what} "
                f"of another gradient (an earlier one, another parameter's, or of another optimizer over this one); "
                f"keep optimizer.full_grad(p) and assign that, or delete the other optimizer and call model.zero_grad()"
            )
        if grad is not None and grad.layout != torch.strided:
            raise sparse_error(self.param, "a parameter")
        is_half_edited = self.is_in_backward and self.has_reduced_values  # by a hook, which saw only this rank's part
        was_reduced = self.drop()
        if grad is not None:
            self.is_half_edited = is_half_edited
            self._set_local(grad.as_subclass(torch.Tensor) if isinstance(grad, LocalGrad) else awaited(grad), grad)
            self.publish()
        return was_reduced

    def drop(self) -> bool:
        """Drop the gradient. Return whether the shards still hold a part of it."""
        was_reduced = self.is_reduced
        if was_reduced:
            self.count_clear()
        self.shard_is_stale |= was_reduced
        self._leave_published(self.has_reduced_values)
        self.generation += 1
        self.in_shards, self.is_used = _NOTHING, False
        self.factor = self.main_grad = self._published = self._local = None
        return was_reduced

    def count_clear(self) -> None:
        """Count that the reduced part is gone. The count depends only on the round, so it forgets earlier edits."""
        owner = self._owner()
        self.num_edits = _MOST_EDITS * (1 + owner.num_rounds if owner else 0)
        self.product = 1.0
        self.is_half_edited = False

    def _leave_published(self, has_rest: bool) -> None:
        """Called when `.grad` gets another tensor. has_rest: The former one was not the whole gradient."""
        if isinstance(self._published, LocalGrad) and self._published.record is self:
            self._published.is_part |= has_rest

    def _set_local(self, plain: Tensor, shown: Tensor) -> None:
        self._local, self._published, self._version = plain, shown, plain._version
        self._zeroed_version = -1
        self.is_used = True

    def publish(self) -> None:
        """Put a tensor for the caller into `.grad`: a LocalGrad, or a ShardedGrad if only other ranks have a part."""
        if self.param.grad is not self._published:
            return  # the caller has cleared or assigned it, and observe() will follow
        if self._local is not None:
            if not isinstance(self._published, LocalGrad) or self._published.record is not self:
                self._published = LocalGrad.wrap(self._local, self, self._owner)
                self.param.grad = self._published
            self._published.generation = self.generation  # it may have been taken out and put back
        elif self._published is None and self.param.requires_grad:
            self._published = ShardedGrad.placeholder(self.param, self, self._owner)
            self.param.grad = self._published

    @property
    def has_sparse_grad(self) -> bool:
        """Whether a sparse gradient is in `.grad`."""
        grad = self.param.grad
        # A LocalGrad, which is dense, is not asked: each question to it is a Python call.
        return grad is not None and grad is not self._published and grad.layout != torch.strided

    def check_grad_dtype(self) -> None:
        """Raise TypeError if gradients will come in another dtype."""
        param = self.param
        dtype = getattr(user_param(param), "grad_dtype", None)  # newer torch
        if dtype is not None and dtype != param.dtype:
            raise self._dtype_error(dtype)

    def _dtype_error(self, dtype: torch.dtype) -> TypeError:
        return TypeError(
            f"expected the gradient of a parameter in its dtype, {self.param.dtype}, got {dtype} for the one of shape "
            f"{tuple(self._shape)}; leave its grad_dtype alone (sums over backwards and ranks are in fp32 anyway) and "
            f"pass grad_reduce_dtype to send in another dtype"
        )

    def before_arrival(self) -> None:
        """Called before backward adds to `.grad`. Take a ShardedGrad or a 16-bit sum out of `.grad`."""
        self._is_arriving = True
        if self._local is None:
            self.param.grad = None
        elif self._dtype != torch.float32:
            if self.main_grad is None:
                self.main_grad = memory.empty(self._local.numel(), torch.float32, self._device)
                self.main_grad.copy_(flatten(self._local, self._stride))
            self.param.grad = None

    def after_arrival(self) -> None:
        """Called after backward has added to `.grad`. Take the gradient into the local sum.

        Raises:
            TypeError: The gradient is in another dtype, or the parameter was converted after the optimizer was built.
        """
        self._is_arriving = False
        param = self.param
        grad = param.grad
        if grad is None:  # another hook has taken it away
            return
        if grad is self._published and self._local is not None:  # added in place
            self.is_in_backward = True
            self._set_local(self._local, grad)
            return
        if grad.dtype != param.dtype:
            raise self._dtype_error(grad.dtype)
        if grad.dtype != self._dtype or grad.shape != self._shape or grad.device != self._device:
            raise conversion_error(param, self._dtype, self._device, self._shape)
        self.is_in_backward = True
        if self.main_grad is not None and self._local is not None and self._published is not None:
            self.main_grad.add_(flatten(grad, self._stride))
            self._local.copy_(self.main_grad.as_strided(self._shape, self._stride))
            param.grad = self._published
            self._set_local(self._local, self._published)
        else:
            self._set_local(awaited(grad), grad)

    def set_aside(self) -> Tensor | None:
        """Called if backward has added already. Return `.grad`, and clear it unless backward added in place."""
        grad = self.param.grad
        if grad is not self._published:
            self.param.grad = None
        return grad

    def take_unannounced(self, grad: Tensor | None) -> None:
        """Called after set_aside() and before_arrival(). Put the sum into `.grad`."""
        self._is_arriving = False
        self.main_grad = None
        self.param.grad = grad

    def finish_arrival(self) -> None:
        """Take the gradient of a backward that ended before after_arrival(), because another hook raised.

        Not if it was cleared since: set to None, or filled with zeros.
        """
        if not self._is_arriving:
            return
        self._is_arriving = False
        if isinstance(self.param, LocalParam):
            self.param.unpark()
        grad = self.param.grad
        if grad is None or grad.layout != torch.strided or (grad._version and not grad.any()):
            return
        self.after_arrival()

    def local_sum(self) -> Tensor | None:
        """Return this rank's unsent sum: in the parameter's shape, or (numel,) in the bucket's memory order."""
        if self.main_grad is None or self._local is None:
            return self._local
        self._take_unseen_writes(self.main_grad, self._local)
        return self.main_grad

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the unsent sum until this stream has read it: all that local_sum() reads."""
        for tensor in (self._local, self.main_grad):
            if tensor is not None:
                tensor.record_stream(stream)

    def _take_unseen_writes(self, main_grad: Tensor, local: Tensor) -> None:
        """Make the fp32 sum follow `.grad` if a collective has written to it, because no version shows that."""
        size = elements_compared_at_once(main_grad.is_cpu)
        for ours, theirs in zip(main_grad.split(size), flatten(local, self._stride).split(size), strict=True):
            rounded = ours.to(theirs.dtype)
            if not ours.is_cpu or not _are_same_bits(rounded, theirs):
                torch.where(rounded == theirs, ours, theirs.float(), out=ours)

    def mark_reduced(self) -> None:
        """Called when the local sum, if any, has been sent. `.grad` becomes a ShardedGrad."""
        if not isinstance(self._published, ShardedGrad):
            self._leave_published(has_rest=True)
            self._published = ShardedGrad.placeholder(self.param, self, self._owner)
        self.main_grad = self._local = None
        self.in_shards = _VALUES
        self.param.grad = self._published

    def mark_sent_as_zeros(self) -> None:
        """Called when a round has sent zeros for this parameter. A later one will send the local sum."""
        had_values = self.has_reduced_values
        if self._local is None:
            grad, was_seen = self.param.grad, self.param.grad is self._published
            self.mark_reduced()
            if not was_seen:  # observe() has not followed it yet
                self.param.grad = grad
        self.in_shards = _VALUES if had_values else _ZEROS

    def mark_replaced(self) -> None:
        """Called when the caller's value has been written into the shards, on every rank."""
        self._leave_published(has_rest=True)
        self._published = self.factor = None
        self.mark_reduced()
        self.is_used = True
        self.num_edits += 1


def elements_compared_at_once(on_cpu: bool) -> int:
    """Return how many elements of 16-bit and fp32 sums to compare at once: few launches, but in a CPU's caches."""
    return 2**18 if on_cpu else 2**24


def _are_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two flat 16-bit tensors on a CPU have the same bits. torch.equal of bf16 takes seven times as long."""
    is_wide = not any(n % 4 for n in (one.numel(), one.storage_offset(), other.storage_offset()))
    wide = torch.int64 if is_wide else torch.int16
    return torch.equal(one.view(wide), other.view(wide))
