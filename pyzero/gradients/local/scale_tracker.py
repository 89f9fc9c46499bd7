"""Tracks which loss scale `.grad` carries, if gradients are used directly from `.grad`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyzero.gradients.grad_stats import mixed_scale_error
from pyzero.gradients.norms import have_values
from pyzero.sharding.local_param import LocalParam, local_of

_GradState = tuple[Any, int]  # a weak reference to the tensor, and how often it has been written
_NO_SCALE = (None, None)


def _state_of(grad: Any) -> _GradState:
    """Return the state of a DTensor gradient. Writes to it and to its local tensor both count."""
    return weakref.ref(grad), grad._version + local_of(grad)._version


class ScaleTracker:
    """The one loss scale of all gradients. Hooks tell it what backward adds to `.grad`.

    An epoch is a number that stays the same as long as the scale cannot have changed; None: no scale.

    Args:
        scales: Whether the optimizer has a loss scale.
    """

    def __init__(self, scales: bool) -> None:
        self.scales = scales
        self.unscale: Tensor | None = None  # 0-D, 1 / loss scale, if `.grad` carries it
        self._memory: Tensor | None = None  # of `unscale`: never another, because a CUDA graph of the step reads it
        self.fsdp_param: LocalParam | None = None  # any one of the parameters that fully_shard has sharded
        self._params: list[Tensor] = []
        self._arriving: tuple[Tensor | None, int | None] = _NO_SCALE  # (0-D 1 / loss scale, epoch) that arrives
        self._is_taken = False  # `.grad` carries the arriving scale
        self._epoch: int | None = None  # of the scale that `.grad` carries
        self._arrived: dict[LocalParam, _GradState] = {}  # fully_shard's gradients after the last backward
        self._zeroed: dict[Tensor, _GradState] = {}  # gradients that the optimizer has filled with zeros
        self._stepped: list[weakref.ref[Tensor] | None] = []  # gradients of the last step, if none has come since

    def add(self, params: Sequence[Tensor]) -> None:
        """Track these parameters too."""
        self._params += params
        fsdp = (param for param in params if isinstance(param, LocalParam) and param.is_fsdp)
        self.fsdp_param = next(fsdp, self.fsdp_param)

    def begin(self, inv_scale: Tensor, epoch: int) -> None:
        """Note that arriving gradients carry a loss scale from now on. inv_scale: Its inverse."""
        self._arriving, self._is_taken = (inv_scale, epoch), False

    def take_over_if_empty(self) -> None:
        """Take the arriving scale if there is no gradient yet: maybe only another rank gets one."""
        if all(param.grad is None for param in self._params):
            self._take()

    def _take(self) -> None:
        """Note that `.grad` carries the arriving scale from now on."""
        inv_scale, self._epoch = self._arriving
        if inv_scale is None:
            self.unscale = None
        elif self._memory is None:
            self.unscale = self._memory = inv_scale.clone()
        else:
            self.unscale = self._memory if self._is_taken else self._memory.copy_(inv_scale)
        self._is_taken = True

    def end(self) -> None:
        """Note that arriving gradients carry no scale from now on."""
        self._arriving = _NO_SCALE

    def before_gradient(self) -> None:
        """Called before backward adds to any `.grad`.

        Raises:
            RuntimeError: `.grad` holds gradients with another scale, or with none.
        """
        self._check_epoch(self._params)

    def missed_gradient(self, param: Tensor) -> None:
        """Called after backward has added to `.grad`, if before_gradient() was not called. Raises as that does."""
        self._check_epoch([other for other in self._params if other is not param])

    def _check_epoch(self, params: Sequence[Tensor]) -> None:
        epoch = self._arriving[1]
        if not self.scales or epoch == self._epoch:
            return
        if have_values([grad for param in params if (grad := param.grad) is not None and self._is_new(param)]):
            raise mixed_scale_error()
        self._epoch = epoch  # zeros fit any scale

    def after_gradient(self, param: Tensor) -> None:
        """Called when backward has added to the parameter's `.grad`. Raises as before_gradient()."""
        if self._arriving[1] != self._epoch and self.fsdp_param is not None:
            self._check_kept_gradients()
        self._stepped.clear()
        self._take()
        if isinstance(param, LocalParam) and param.is_fsdp:
            self._arrived[param] = _state_of(param.dtensor.grad)

    def _is_new(self, param: Tensor) -> bool:
        """Whether `.grad` is other than the zeros that zero_grad(set_to_none=False) has put there."""
        grad, version = self._zeroed.get(param, (None, 0))
        return grad is None or grad() is not param.grad or param.grad._version != version

    def _check_kept_gradients(self) -> None:
        """Raise if fully_shard has added a gradient to a kept one of another scale. No hook runs before it adds.

        If a gradient is as it arrived, or one in-place op later, it has not been cleared since.
        """
        kept = []
        for param, (grad, version) in self._arrived.items():
            now = param.dtensor.grad
            if now is not None and now is grad() and _state_of(now)[1] - version <= 1:
                kept.append(local_of(now))
        if have_values(kept):
            raise mixed_scale_error()

    def after_step(self) -> None:
        """Called after a step: `.grad` stays, with its scale, until the caller clears it."""
        if self.unscale is not None:
            grads = [param.grad for param in self._params]
            self._stepped = [None if grad is None else weakref.ref(grad) for grad in grads]

    def follow(self) -> None:
        """Called before gradients are used.

        Raises:
            RuntimeError: All gradients of the last step were replaced by other tensors, with an unknown scale.
        """
        if not self._stepped:
            return
        both = zip(self._stepped, self._params, strict=False)
        if any(kept is not None and kept() is param.grad for kept, param in both):
            return
        if any(param.grad is not None for param in self._params):
            raise RuntimeError(
                "expected the gradients of the last step, which carry its loss scale, or those of another backward, "
                "got other tensors in every .grad; call optimizer.zero_grad() before you assign gradients without a "
                "scale, and edit those with one in place (p.grad.mul_(0.5))"
            )
        self.clear()

    def forget_if_empty(self) -> None:
        """Called before the caller's gradient is written: with no gradient there, no scale has to be kept."""
        if all(param.grad is None for param in self._params):
            self.clear()

    def clear(self) -> None:
        """Called when the optimizer has cleared `.grad` of all parameters, or filled it with zeros."""
        self.unscale = self._epoch = None
        self._arrived = {}
        self._stepped.clear()
        left = ((param, param.grad) for param in self._params if self.scales)
        self._zeroed = {param: (weakref.ref(grad), grad._version) for param, grad in left if grad is not None}
