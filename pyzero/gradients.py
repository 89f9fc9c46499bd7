"""Where a step's gradients come from, and those that are in `.grad` as it is. pyzero/reduction.py has the others."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.buckets import NO_SUSPECT, Bucket
from pyzero.comm import Group


class Stats(NamedTuple):
    """What this rank knows of its part of the gradients."""

    found_inf: Tensor  # (1,) fp32, 1 where one of them is inf or NaN
    sumsq: Tensor  # (1,) fp64, of those that count for the norm
    suspect: Tensor  # (1,) fp64, code of the first bad parameter, inf where none was found; see Bucket.suspect


def is_set(flag: Tensor) -> bool:
    """Whether a flag that lies in the host's own memory is set; False on a GPU, where to look would be to wait."""
    return flag.device.type == "cpu" and bool(flag.numpy().any())


class Watch:
    """Hooks on parameters that call `arrived(param)` after each gradient, and keep nothing alive."""

    def __init__(self, arrived: Callable[[Tensor], None]) -> None:
        self._arrived = weakref.WeakMethod(arrived)
        self._hooks: list[Any] = []

    def add(self, params: Iterable[Tensor]) -> None:
        """Watch these too."""
        arrived = self._arrived

        def hook(param: Tensor) -> None:
            method = arrived()
            if method is not None:
                method(param)

        self._hooks += [param.register_post_accumulate_grad_hook(hook) for param in params]

    def add_before(self, bucket: Bucket, before: Callable[[Bucket, int], None]) -> None:
        """Call `before(bucket, position)` ahead of each of these parameters' gradients."""
        method, bucket_of = weakref.WeakMethod(before), weakref.ref(bucket)

        def hook_at(position: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                alive, bucket = method(), bucket_of()
                if alive is not None and bucket is not None:
                    alive(bucket, position)

            return hook

        self._hooks += [param.register_hook(hook_at(position)) for position, param in enumerate(bucket.params)]

    def __del__(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Gradients(ABC):
    """The gradients of one step, bucket by bucket.

    `stats()` finishes what is under way; after it `of(bucket)` is this rank's gradient of a bucket, `unscale` is what
    it is still to be multiplied by, and `norm_power` serves norms other than the 2-norm.
    """

    def __init__(self, group: Group, device: torch.device, backend: str) -> None:
        self.sync = True  # False inside no_sync
        self.search = False  # look for the first bad parameter in every step: the last one was skipped
        self.unscale: Tensor | None = None  # 0-D, 1 / loss scale, where the gradients carry it
        self._group = group
        self._device = device
        self._backend = backend
        self._buckets: list[Bucket] = []

    @abstractmethod
    def add(self, bucket: Bucket, scales: bool) -> None:
        """Append a bucket; `scales`: the optimizer has a loss scale."""

    @property
    @abstractmethod
    def has_news(self) -> bool:
        """Gradients may have changed since the last stats()."""

    @abstractmethod
    def scaled_by(self, inv_scale: Tensor) -> Any:
        """A context in which gradients arrive that carry the loss scale whose inverse this is."""

    @abstractmethod
    def stats(self) -> Stats:
        """Finish what is under way. Collective where gradients are reduced."""

    @abstractmethod
    def of(self, bucket: Bucket) -> Tensor:
        """(shard_numel,) this rank's gradient of a bucket; not defined where no rank has a gradient. After stats()."""

    @abstractmethod
    def parts(self, bucket: Bucket) -> list[Tensor]:
        """The same in pieces, with what is not defined left out or zero."""

    @abstractmethod
    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """(numel,) fp32: one parameter's gradient, in its memory order. Collective where gradients are reduced."""

    @abstractmethod
    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """Take (numel,) `value` for one parameter's gradient, in its memory order, as if it had been computed."""

    @abstractmethod
    def after_step(self) -> None:
        """Forget what a second step() without a backward must not see again."""

    @abstractmethod
    def reset(self) -> None:
        """After zero_grad(): forget all."""

    def norm_power(self, norm_type: float) -> Tensor:
        """(1,) fp64: the sum of |g|^p over this rank's part, or the largest |g| for inf. After stats()."""
        parts = [part for bucket in self._buckets if bucket.counts for part in self.parts(bucket) if part.numel()]
        if not parts:
            return torch.zeros(1, dtype=torch.float64, device=self._device)
        wide = [part.float() for part in parts]
        norms = torch.stack(torch._foreach_norm(wide, norm_type)).double()
        return (norms.max() if math.isinf(norm_type) else norms.pow(norm_type).sum()).reshape(1)


class LocalGradients(Gradients):
    """`.grad` as it is at step(): one rank, or gradients that somebody else has averaged."""

    def __init__(self, group: Group, device: torch.device, backend: str) -> None:
        super().__init__(group, device, backend)
        self._pieces: dict[Bucket, tuple[list[Tensor], list[int]]] = {}  # from stats() on
        self._inv_scale: Tensor | None = None  # inside a scaled backward
        self._watch = Watch(self._on_gradient)

    def add(self, bucket: Bucket, scales: bool) -> None:
        """Its parameters are watched only where a loss scale makes it matter who called backward."""
        self._buckets.append(bucket)
        if scales:
            self._watch.add(bucket.params)

    def _on_gradient(self, param: Tensor) -> None:
        self.unscale = self._inv_scale

    @property
    def has_news(self) -> bool:
        """Always: `.grad` may be edited without our knowing."""
        return True

    @contextmanager
    def scaled_by(self, inv_scale: Tensor) -> Iterator[None]:
        """See Gradients."""
        self._inv_scale = inv_scale
        try:
            yield
        finally:
            self._inv_scale = None

    def stats(self) -> Stats:
        """One pass that only reads."""
        found = torch.zeros(1, device=self._device)
        sumsq = torch.zeros(1, dtype=torch.float64, device=self._device)
        counted: list[Tensor] = []
        others: list[Tensor] = []
        for bucket in self._buckets:
            bucket.forget_gradients()
            self._pieces[bucket] = bucket.gradients(*bucket.layout.shard_bounds(self._group.rank))
            (counted if bucket.counts else others).extend(self._pieces[bucket][0])
        ops.unscale_(counted, 1.0, found_inf=found, sumsq=sumsq, backend=self._backend)
        ops.unscale_(others, 1.0, found_inf=found, backend=self._backend)
        return Stats(found, sumsq, self._suspect(found))

    def _suspect(self, found: Tensor) -> Tensor:
        if not (self.search or is_set(found)):
            return torch.full((1,), NO_SUSPECT, dtype=torch.float64, device=self._device)
        codes = [bucket.suspect_in_grads(self._group.rank, self._group.size) for bucket in self._buckets]
        return torch.stack(codes).min().reshape(1)

    def of(self, bucket: Bucket) -> Tensor:
        """In the dtype of the weights."""
        pieces, offsets = self._pieces[bucket]
        if len(pieces) == 1 and pieces[0].numel() == bucket.layout.shard_numel:
            return pieces[0].view(-1)  # one parameter, no gaps: no copy
        packed = memory.empty(bucket.layout.shard_numel, bucket.flat.dtype, bucket.device)
        if self._group.size > 1:
            packed.zero_()  # a parameter may have a gradient on another rank alone
        ops.pack_(packed, pieces, offsets=offsets, backend=self._backend)
        return packed

    def parts(self, bucket: Bucket) -> list[Tensor]:
        """See Gradients."""
        return self._pieces[bucket][0]

    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """See Gradients."""
        grad = bucket.flat_grad(position)
        assert grad is not None
        return grad.float()

    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """Into `.grad`, carrying the loss scale that it carries."""
        param = bucket.params[position]
        if self.unscale is not None:
            value = value / self.unscale
        grad = torch.empty_like(param)
        bucket.as_flat(grad, position).copy_(value)
        param.grad = grad

    def after_step(self) -> None:
        """Nothing is kept: `.grad` is the caller's."""
        self._pieces.clear()

    def reset(self) -> None:
        """See Gradients."""
        self._pieces.clear()
        self.unscale = None
