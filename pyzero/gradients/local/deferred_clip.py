"""The coefficient of clip_grad_norm_ if `.grad` is left unchanged. It is kept beside `.grad` until a step uses it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyzero.gradients.norms import have_values
from pyzero.sharding.local_param import LocalParam

_SAME_NORM = 1e-6  # relative difference of sums of squares of the same gradients, on other threads


class DeferredClip:
    """A factor that is kept until `.grad` is used, added to, or replaced."""

    def __init__(self) -> None:
        self.factor: Tensor | None = None  # 0-D
        self._applies_to: dict[Tensor, tuple[Any, int]] = {}  # (a weak reference to `.grad`, its version) as clipped
        self._sumsq: Tensor | None = None  # 0-D, of all gradients as clipped, without the factor
        self._is_used = False  # a step has multiplied by it
        self._is_captured = False  # a CUDA graph computes it in each replay

    def multiply(self, factor: Tensor, params: Iterable[Tensor], sumsq: Tensor) -> None:
        """Multiply the gradients that these parameters have now. Call check() first. sumsq: As in `factor_of`."""
        before = self.factor_of(sumsq)
        self.factor = factor if before is None else before * factor
        self._sumsq = sumsq.clone()
        self._applies_to = {p: (weakref.ref(p.grad), p.grad._version) for p in params if p.grad is not None}
        self._is_used = False
        self._is_captured = _is_capturing(sumsq)
        if any(isinstance(param, LocalParam) for param in self._applies_to):  # some edits of DTensors cannot be seen
            self.apply()

    def check_capture(self) -> None:
        """Raise RuntimeError if a CUDA graph is to capture the use of a factor that it does not compute itself.

        In a replay it would read the memory that the factor had.
        """
        if self.factor is not None and not self._is_captured:
            raise RuntimeError(
                "expected optimizer.clip_grad_norm_ in the CUDA graph that captures step(), got it called before the "
                "capture; call it in the capture too, or pass max_grad_norm to the optimizer"
            )

    def factor_of(self, sumsq: Tensor) -> Tensor | None:
        """Return the factor for the gradients (0-D), or None. Call check() first.

        After a step has used the factor, new gradients may have come that no version shows (a replayed CUDA graph, a
        collective). If their norm is another one, the factor does not apply to them. If it is the same, the same factor
        clips them to the same norm.

        Args:
            sumsq: 0-D: the present sum of squares of all gradients, without the factor.
        """
        if self.factor is None or self._sumsq is None or not self._is_used:
            return self.factor
        is_same = torch.isclose(sumsq, self._sumsq, rtol=_SAME_NORM, atol=0.0, equal_nan=True)
        return torch.where(is_same, self.factor, torch.ones_like(self.factor))

    def check(self, params: Iterable[Tensor]) -> bool:
        """Whether all gradients that were clipped are still there and unchanged.

        If some are gone, or others have come that the factor does not apply to, multiply it into the rest.

        Raises:
            RuntimeError: One has been edited since, or others with values have come before a step.
        """
        is_whole, edited, new = True, [], []
        for param in params:
            grad, (seen, version) = param.grad, self._applies_to.get(param, (None, 0))
            if grad is None:
                is_whole &= seen is None
            elif seen is None or grad is not seen():
                new.append(grad)
            elif grad._version != version:
                edited.append(grad)
        # Before a step, an assigned gradient may be made of a clipped one. After it, it is a gradient of its own.
        if have_values(edited if self._is_used else edited + new):
            raise RuntimeError(
                "expected .grad unedited from optimizer.clip_grad_norm_ until it is cleared, got one that was edited "
                "or assigned, while the clip coefficient is kept beside it; call torch.nn.utils.clip_grad_norm_, which "
                "multiplies .grad at once, or optimizer.zero_grad() before new gradients"
            )
        if edited or new or not is_whole:
            self.apply()
            return False
        return True

    @torch.no_grad()
    def apply(self) -> None:
        """Multiply the factor into those gradients that are still the ones that were clipped."""
        now = [(p.grad, *state) for p, state in self._applies_to.items() if p.grad is not None]
        same = [grad for grad, seen, version in now if grad is seen() and grad._version == version]
        factor = self.factor
        self.clear()
        if same and factor is not None:
            torch._foreach_mul_(same, factor)

    def note_used(self) -> None:
        """Note that a step has multiplied by the factor."""
        self._is_used = True

    def clear(self) -> None:
        """Forget the factor."""
        self.factor = self._sumsq = None
        self._applies_to = {}


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
