"""The interface of a step's gradients. local/unreduced.py and reduced/reduction.py implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, Unsent
from pyzero.gradients.hooks import GradientHooks
from pyzero.sharding.buckets import Bucket
from pyzero.update_rule import GradList

_NO_OTHERS = nullcontext()


class Gradients(ABC):
    """The gradients of one step, bucket by bucket.

    `collect()` finishes what is under way. After it, `spans(bucket)` yields this rank's gradients of a bucket. The
    caller multiplies them by `unscale` of the stats and by `factor()`.
    """

    reduces = False  # averages over the ranks; otherwise somebody else does, or there is one rank
    hooks: GradientHooks  # of the parameters
    norm_before_clip: Tensor | None = None  # 0-D fp32, if clip() was called since the last gradient came

    def __init__(self, group: Group, stats_exchange: GradStatsExchange, device: torch.device) -> None:
        self._group = group
        self._stats_exchange = stats_exchange
        self._device = device

    @abstractmethod
    def add(self, bucket: Bucket) -> None:
        """Append a bucket."""

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:  # noqa: B027
        """Call `place_unfrozen()` after the first backward in which some of these parameters are trained.

        So their gradients are averaged too before anybody reads them. The call is collective, as backward is.
        """

    @abstractmethod
    def move_to(self, buckets: list[Bucket]) -> None:
        """Take other buckets of the same parameters. Collective over several ranks."""

    @abstractmethod
    def scaled_by(self, inv_scale: Tensor, epoch: int) -> Any:
        """A context in which arriving gradients carry a loss scale. inv_scale: Its inverse.

        epoch: The same number as long as the scale cannot have changed.
        """

    def renew_scale(self, inv_scale: Tensor, epoch: int) -> None:  # noqa: B027
        """Called after a step inside `scaled_by`, because the step may have changed the scale."""

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward sends nothing."""
        return nullcontext()

    def in_backward(self) -> AbstractContextManager[None]:
        """A context around a backward. If it raises before the first gradient, the backward is broken off too."""
        return nullcontext()

    def expect_scales(self) -> None:  # noqa: B027
        """Hook all parameters, because gradients may carry another optimizer's loss scale."""

    def check_arrived(self) -> None:  # noqa: B027
        """Raise RuntimeError if something other than backward wrote `.grad`, so that its loss scale is unknown.

        Unless gradients are reduced, nothing is checked: such values count as carrying the scale of `.grad`.
        """

    @abstractmethod
    def collect(self, scaler_found_inf: Tensor | None, purpose: str) -> GlobalGradStats:
        """Finish what is under way, and exchange the step's message. Collective over several ranks.

        Args:
            scaler_found_inf: (1,) fp32, the flag of torch's GradScaler if it has checked `.grad`; or None.
            purpose: One of grad_stats.PURPOSES, the same on all ranks.
        """

    @abstractmethod
    def tell_error(self, purpose: str) -> None:
        """Send the message of a rank that cannot go on, instead of collect(). All ranks raise. Gradients are kept."""

    def _telling_errors(self, purpose: str) -> AbstractContextManager[None]:
        """A context around work that the others wait for in collect(). If it raises here, all ranks raise."""
        return _NO_OTHERS if self._stats_exchange.is_alone else self._telling(purpose)

    @contextmanager
    def _telling(self, purpose: str) -> Iterator[None]:
        with self._stats_exchange.lockstep(but=Exception):
            try:
                yield
            except CollectiveError:  # the other ranks raise it too
                raise
            except Exception as error:
                try:
                    self.tell_error(purpose)
                except Exception:
                    raise error from None
                raise

    @abstractmethod
    def spans(self, bucket: Bucket) -> Iterator[tuple[int, Tensor | GradList]]:
        """Yield this rank's gradients of a bucket, after collect(): where a span begins in the shard, and (n,) values.

        The gradients of one run may come as a list. Parameters without a gradient on any rank are left out, or
        undefined. A span is freed before the next one is made.
        """

    @abstractmethod
    def factor(self) -> Tensor | None:
        """Return the factor that the gradients still need (0-D), or None. Call it after collect().

        Raises:
            RuntimeError: `.grad` has been edited since it was clipped.
        """

    def unscale(self, factor: Tensor) -> Tensor | None:
        """Multiply all gradients by a 0-D tensor, or return it if the update must apply it."""
        return factor

    def clip(self, coefficient: Tensor, norm: Tensor) -> None:
        """Multiply all gradients by a 0-D tensor, now or when they are used, after collect(). norm: Their 2-norm."""
        before = self.norm_before_clip
        self._multiply(coefficient)
        self.norm_before_clip = norm if before is None else before

    @abstractmethod
    def _multiply(self, factor: Tensor) -> None:
        """Multiply all gradients, for clip()."""

    @abstractmethod
    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """Return one parameter's gradient, (numel,) fp32, in memory order, without factors. Collective if reduced."""

    @abstractmethod
    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """Replace one parameter's gradient by (numel,) `value`, in memory order."""

    @abstractmethod
    def norm_power(self, norm_type: float) -> Tensor:
        """Return the sum of |g|^p over this rank's part, or the largest |g| for inf: (1,) fp64. After collect()."""

    @abstractmethod
    def locate_nonfinite(self, always: bool) -> None:
        """Look for the first bad parameter: in every step (always), or only if the host knows that there is one."""

    @abstractmethod
    def after_step(self, used: Sequence[bool]) -> None:
        """Called after a step. The gradients stay. used: By parameter number, whether some rank had a gradient."""

    @abstractmethod
    def has_pending_gradients(self) -> bool:
        """Whether this rank knows of gradients that no step has taken."""

    def finish_broken_round(self) -> None:  # noqa: B027
        """If gradients are reduced, finish the round of a backward that an exception has ended."""

    def unsent(self) -> Unsent:
        """Return the kind of gradients that this rank has not reduced; NONE without a loss scale."""
        return Unsent.NONE

    def send_unsent(self, kinds: set[Unsent]) -> None:  # noqa: B027
        """Reduce the gradients that have not been reduced. Collective. kinds: Each rank's `unsent()`.

        Raises:
            RuntimeError: Some of them carry the loss scale, and some do not.
        """

    def check_capture(self) -> None:  # noqa: B027
        """Called before a CUDA graph captures a step, on one rank. Raise RuntimeError if it would replay wrongly."""

    @abstractmethod
    def reset(self) -> None:
        """Called when the optimizer has cleared `.grad` of all parameters, or filled it with zeros."""


def sparse_error(param: Tensor, name: str) -> TypeError:
    """Make the error for a sparse gradient, which no bucket can hold."""
    return TypeError(
        f"expected dense gradients, got a sparse one for {name}, shape {tuple(param.shape)}; "
        f"build its embedding with sparse=False, or leave its weight out of the parameters and give it to "
        f"torch.optim.SparseAdam"
    )
