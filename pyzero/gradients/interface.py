"""Where a step's gradients come from: the interface that local/unreduced.py and reduced/reduction.py implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyzero.comm.group import CollectiveError, Group
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, Unsent
from pyzero.gradients.hooks import GradientHooks
from pyzero.sharding.buckets import Bucket
from pyzero.update_rule import GradList

_NOBODY = nullcontext()  # waits


class Gradients(ABC):
    """The gradients of one step, bucket by bucket.

    `collect()` finishes what is under way; after it `spans(bucket)` are this rank's gradients of a bucket, to be
    multiplied by `unscale` of the stats and by `factor()`.
    """

    reduces = False  # averages over the ranks; else another does, or there is one
    hooks: GradientHooks  # of the parameters
    norm_before_clip: Tensor | None = None  # 0-D fp32, where clip() was called since the last gradient came

    def __init__(self, group: Group, stats_exchange: GradStatsExchange, device: torch.device, backend: str) -> None:
        self._group = group
        self._stats_exchange = stats_exchange
        self._device = device
        self._backend = backend
        self._buckets: list[Bucket] = []

    @abstractmethod
    def add(self, bucket: Bucket) -> None:
        """Append a bucket."""

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:  # noqa: B027
        """Have `place_unfrozen()` called after the first backward in which some of these parameters are trained.

        Their gradients, too, are then the averaged ones before anybody reads them. Collective there, as backward is.
        """

    @abstractmethod
    def move_to(self, buckets: list[Bucket]) -> None:
        """Take other buckets of the same parameters. Collective over several ranks."""

    @abstractmethod
    def scaled_by(self, inv_scale: Tensor, epoch: int) -> Any:
        """A context in which gradients arrive that carry the loss scale whose inverse this is.

        epoch: The same number as long as the scale cannot have changed.
        """

    def renew_scale(self, inv_scale: Tensor, epoch: int) -> None:  # noqa: B027
        """Called after a step inside `scaled_by`, which may have changed what that was given."""

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward sends nothing."""
        return nullcontext()

    def in_backward(self) -> AbstractContextManager[None]:
        """Around a backward: one that raises before the first gradient counts as broken off, too."""
        return nullcontext()

    def expect_scales(self) -> None:  # noqa: B027
        """Called where gradients may come that carry another optimizer's loss scale: all parameters get hooks."""

    @abstractmethod
    def check_arrived(self) -> None:
        """Raise RuntimeError where someone other than backward wrote `.grad`, so that its loss scale is not known."""

    @abstractmethod
    def collect(self, scaler_found_inf: Tensor | None, purpose: str) -> GlobalGradStats:
        """Finish what is under way, and exchange the step's message. Collective over several ranks.

        Args:
            scaler_found_inf: (1,) fp32, the flag of torch's GradScaler, which has checked `.grad`; or None.
            purpose: One of grad_stats.PURPOSES, the same on all ranks.
        """

    @abstractmethod
    def tell_error(self, purpose: str) -> None:
        """In place of collect(): the message of a rank that cannot go on; all ranks raise. What it holds is kept."""

    def _telling_errors(self, purpose: str) -> AbstractContextManager[None]:
        """Around what the others wait for in collect(): an exception of this rank's own is raised by all."""
        return _NOBODY if self._stats_exchange.is_alone else self._telling(purpose)

    @contextmanager
    def _telling(self, purpose: str) -> Iterator[None]:
        with self._stats_exchange.lockstep(but=Exception):
            try:
                yield
            except CollectiveError:  # which they have, too
                raise
            except Exception as error:
                try:
                    self.tell_error(purpose)
                except Exception:
                    raise error from None
                raise

    @abstractmethod
    def spans(self, bucket: Bucket) -> Iterator[tuple[int, Tensor | GradList]]:
        """This rank's gradients of a bucket, after collect(): where each span begins in the shard, and (n,) values.

        Those of one run may come as a list. What no rank has a gradient for is left out, or undefined. A span is freed
        before the next one is made.
        """

    @abstractmethod
    def factor(self) -> Tensor | None:
        """0-D: the factor that the gradients are still to be multiplied by, or None. After collect().

        Raises:
            RuntimeError: `.grad` has been edited since it was clipped.
        """

    def unscale(self, factor: Tensor) -> Tensor | None:
        """Multiply all gradients by a 0-D tensor, or return it, where the update is to."""
        return factor

    def clip(self, coefficient: Tensor, norm: Tensor) -> None:
        """Multiply all gradients by a 0-D tensor, now or when they are used. After collect(). norm: Their 2-norm."""
        before = self.norm_before_clip
        self._multiply(coefficient)
        self.norm_before_clip = norm if before is None else before

    @abstractmethod
    def _multiply(self, factor: Tensor) -> None:
        """Of clip()."""

    @abstractmethod
    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """(numel,) fp32: one parameter's gradient, in memory order, without factors. Collective where reduced."""

    @abstractmethod
    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """Replace one parameter's gradient by (numel,) `value`, in memory order."""

    @abstractmethod
    def norm_power(self, norm_type: float) -> Tensor:
        """(1,) fp64: the sum of |g|^p over this rank's part, or the largest |g| for inf. After collect()."""

    @abstractmethod
    def locate_nonfinite(self, always: bool) -> None:
        """always: Look for the first bad parameter in every step, not only where the host knows that there is one."""

    @abstractmethod
    def after_step(self, used: Sequence[bool]) -> None:
        """Called after a step; the gradients stay. used: by parameter number, whether some rank had a gradient."""

    @abstractmethod
    def has_pending_gradients(self) -> bool:
        """Whether this rank knows of gradients that no step has taken."""

    @abstractmethod
    def finish_broken_round(self) -> None:
        """Finish the round of a backward that an exception has ended, where gradients are reduced."""

    def unsent(self) -> Unsent:
        """What this rank holds that carries a loss scale, or would, and has not been reduced."""
        return Unsent.NONE

    def send_unsent(self, kinds: set[Unsent]) -> None:  # noqa: B027
        """Reduce it. Collective. kinds: What the ranks hold.

        Raises:
            RuntimeError: Some of it carries the loss scale, and some does not.
        """

    @abstractmethod
    def reset(self) -> None:
        """Called when the optimizer has cleared `.grad` of all parameters, or filled it with zeros."""


def sparse_error(param: Tensor, name: str) -> TypeError:
    """The error for a sparse gradient, which no bucket can hold."""
    return TypeError(
        f"expected dense gradients, got a sparse one for {name}, shape {tuple(param.shape)}; "
        f"build its embedding with sparse=False, or leave its weight out of the parameters and give it to "
        f"torch.optim.SparseAdam"
    )
