"""The one message of a step: gathers each rank's statistics of its gradients into those of all ranks."""

from __future__ import annotations

import logging
import math
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyzero.comm import process
from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.gradients.nonfinite import RankNames
from pyzero.gradients.stats_rows import FIRST_BAD, FLAG, STATS_COLUMNS, SUMSQ, first_bad_of
from pyzero.ops.rounding import round_up

log = logging.getLogger("pyzero")

# What the message is gathered for. If a rank read a norm while others step, it would go on to another collective.
_OF_GRAD = "a norm of .grad"
PURPOSES = (
    *("step", "clip_grad_norm_", "full_grad", "set_full_grad", "local_grad", "set_local_grad", "sum_tied_grads"),
    *(_OF_GRAD, "unscale_ of GradScaler"),
)

_ROUNDING = 1e-5  # relative difference allowed in a factor that each rank computes itself
_NUM_BITS = 48  # per number; fp64 holds 53 exactly
_SHIFTS = np.arange(_NUM_BITS)
_BITS = 2.0**_SHIFTS


class Unsent(IntEnum):
    """The kind of gradients on a rank that no round has reduced."""

    NONE = 0
    PLAIN = 1
    SCALED = 2  # they carry the loss scale
    ZEROS = 3  # zeros fit any scale


class _HostRow(NamedTuple):
    """What a host tells the others of its group in each message. A bit per parameter follows it; see `_packed`."""

    purpose: int  # an index of PURPOSES
    num_rounds: int
    unsent: int  # an Unsent
    num_skips: int  # in a row
    num_exports: int  # calls of state_dict() since the last message
    hyper_parameters: int  # their checksum
    has_error: int  # 1: this rank cannot go on
    half_edited: int  # the number of a parameter; -1: none
    edits: int  # the checksum of edits and factors


_COLUMN = _HostRow(*range(len(_HostRow._fields)))  # where each lies in a row


class HostFacts(NamedTuple):
    """What this rank's host tells the others in each message."""

    num_skips_in_a_row: int  # as far as this host knows
    hyper_parameters: int  # their checksum


class LocalGradStats(NamedTuple):
    """What one rank knows about its gradients."""

    rows: Tensor  # (n, 3) fp64, n the same on all ranks; see pyzero/gradients/stats_rows.py
    used: Sequence[bool]  # by parameter number: this rank had a part in its gradient
    purpose: str  # one of PURPOSES
    edits: Sequence[int] = ()  # by parameter number: how often its reduced gradient was edited
    products: Sequence[float] = ()  # by parameter number: product of the known factors; empty if all are 1
    unsent: Unsent = Unsent.NONE  # gradients that no round has reduced
    num_rounds: int = 0  # since the optimizer was built
    half_edited: int | None = None  # number of a parameter whose unsent part was edited while another part is reduced
    has_error: bool = False  # this rank cannot go on


@dataclass
class GlobalGradStats:
    """What all ranks know. It is the same on each. The host has not read the tensors."""

    rows: Tensor  # (n, 3) fp64, of all ranks
    rows_of_same_params: Tensor  # (n, 3) fp64, of the ranks that have the same parameters, or parts of them
    used: tuple[bool, ...]  # by parameter number: some rank has a gradient
    has_unsent: bool  # some rank has gradients that no round has reduced: make one, and gather again
    unsent_is_scaled: bool  # the unsent gradients carry the loss scale
    num_skips_in_a_row: int  # the most that any host knows of
    unscale: Tensor | None  # 0-D fp32, a factor that the update must apply

    @cached_property
    def first_bad(self) -> Tensor:
        """The code of the first bad parameter: (1,) fp64."""
        rows = self.rows_of_same_params
        return first_bad_of(rows[0]) if len(rows) == 1 else rows[:, FIRST_BAD].amin().reshape(1)

    # step() gets these from ops.step_scalars_. For callers before it they are computed in separate launches.

    @cached_property
    def found_inf(self) -> Tensor:
        """1 if any gradient on any rank is inf or NaN, else 0: (1,) fp32."""
        return (self.rows[:, FLAG] != 0).any().to(torch.float32).reshape(1)

    @cached_property
    def norm(self) -> Tensor:
        """The global 2-norm of the gradients, averaged and unscaled, before clipping: 0-D fp32."""
        norm = self.rows[:, SUMSQ].sum().sqrt()
        return (norm if self.unscale is None else norm * self.unscale).to(torch.float32)


class GradStatsExchange:
    """Gathers what the ranks know about their gradients.

    Args:
        group: The ranks that share the optimizer's state.
        model_groups: The groups of ranks with other parts of the same model, one for each dimension. They skip steps
            together and share one norm.
        same_params: Whether these ranks have other parts of the same parameters, by number.
        name_of: The optimizer's method that returns a parameter's name for messages, by its number.
        facts: The optimizer's method that returns its HostFacts, called for each message.
    """

    def __init__(
        self,
        group: Group,
        model_groups: Sequence[Group],
        same_params: bool,
        name_of: Callable[[int], str],
        facts: Callable[[], HostFacts],
    ) -> None:
        self.same_params = same_params
        self._name_of = weakref.WeakMethod(name_of)
        self._facts = weakref.WeakMethod(facts)
        self.names = _names(group, shares_params=same_params and bool(model_groups))
        self._num_exports = 0  # calls of state_dict() on this rank since the last message
        self._may_warn = group.rank == 0
        self._group = group
        self._model_groups = model_groups
        self.has_parts = bool(model_groups)  # other ranks hold other parts of the model
        self.is_alone = group.size == 1 and not self.has_parts  # nothing is sent

    def name_of(self, number: int) -> str:
        """Return a parameter's name for messages, by its number."""
        name_of = self._name_of()
        return f"parameter {number}" if name_of is None else name_of(number)

    def note_export(self) -> None:
        """Note a call of state_dict(), which each rank should make."""
        self._num_exports += 1

    def gather(self, mine: LocalGradStats, unscale: Tensor | None) -> GlobalGradStats:
        """Exchange the message. Collective.

        Raises:
            CollectiveError: The ranks ran backward a different number of times, or called different methods.
            RuntimeError: A reduced gradient was edited on some ranks only, or in part; unsent gradients carry the loss
                scale on some ranks only; the ranks step with different hyper-parameters; or a rank has an error. All
                ranks raise, those with other parts of the model too.
        """
        used, num_skips, hyper_parameters = tuple(mine.used), 0, 0
        unsent = {int(mine.unsent)}
        rows = mine.rows
        error: RuntimeError | None = None
        if not self.is_alone:
            facts = self._facts()
            assert facts is not None
            num_skips, hyper_parameters = facts()
        if self._group.size > 1:
            row = self._host_row(mine, num_skips, hyper_parameters)
            self._num_exports = 0
            with self.lockstep(CollectiveError):
                told, rows = self._group.gather_with_host([*row, *_packed(used)], rows.view(-1))
            rows = rows.view(-1, STATS_COLUMNS)
            hosts = told.numpy()
            with self.lockstep(RuntimeError):
                error = self._error_in(hosts, mine)
            self._warn_of_lost_shards(hosts[:, _COLUMN.num_exports].tolist())
            used = _union(hosts[:, len(row) :], len(used))
            unsent = {int(kind) for kind in hosts[:, _COLUMN.unsent].tolist()}
            num_skips = int(max(hosts[:, _COLUMN.num_skips].tolist()))
        elif mine.has_error and not self.is_alone:
            error = _other_error(mine.purpose, [self._group.members()[0]])
        own_rows = rows
        has_unsent = bool(unsent - {Unsent.NONE})
        # Not before the round for unsent gradients: model-parallel ranks without any gather once, so these must too.
        if error is not None or not has_unsent:
            try:
                rows, num_skips = self._gather_over_model_groups(mine.purpose, rows, num_skips, hyper_parameters, error)
            finally:
                error = None  # its traceback holds this frame, and the callers'
        return GlobalGradStats(
            rows=rows,
            rows_of_same_params=rows if self.same_params else own_rows,
            used=used,
            has_unsent=has_unsent,
            unsent_is_scaled=Unsent.SCALED in unsent,
            num_skips_in_a_row=num_skips,
            unscale=unscale,
        )

    def _host_row(self, mine: LocalGradStats, num_skips: int, hyper_parameters: int) -> _HostRow:
        return _HostRow(
            purpose=PURPOSES.index(mine.purpose),
            num_rounds=mine.num_rounds,
            unsent=mine.unsent,
            num_skips=num_skips,
            num_exports=self._num_exports,
            hyper_parameters=hyper_parameters,
            has_error=int(mine.has_error),
            half_edited=-1 if mine.half_edited is None else mine.half_edited,
            edits=_checksum(mine.edits, mine.products),
        )

    def _gather_over_model_groups(
        self, purpose: str, rows: Tensor, num_skips: int, hyper_parameters: int, error: RuntimeError | None
    ) -> tuple[Tensor, int]:
        """Return the rows and the most skips in a row, of the ranks with other parts of the model too.

        error: The error that this rank's group has found. All of these ranks raise one.
        """
        for group in self._model_groups:
            found, sumsq = (rows[:, FLAG] != 0).any(), rows[:, SUMSQ].sum()
            row = torch.stack([found.double(), sumsq, rows[:, FIRST_BAD].amin()])
            head = [PURPOSES.index(purpose), num_skips, self.same_params and hyper_parameters, error is not None]
            with self.lockstep(CollectiveError):
                told, rows = group.gather_with_host(head, row)
            purposes, skips, hyper, has_error = told.t().tolist()
            num_skips = int(max(skips))
            error = error or _difference(purposes, hyper, group)
            if error is None and any(has_error):
                ranks = [rank for rank, has in zip(group.members(), has_error, strict=True) if has]
                error = _other_error(purpose, ranks)
        try:
            if error is not None:
                raise error
        finally:
            del error
        return rows, num_skips

    def _error_in(self, hosts: np.ndarray[Any, Any], mine: LocalGradStats) -> RuntimeError | None:
        """Return the error if the messages of this group's ranks do not fit each other, or None."""
        try:
            self._check(hosts)
            self._check_edits(hosts[:, _COLUMN.edits], mine)
        except RuntimeError as error:
            return error.with_traceback(None)  # it would hold a frame that holds the error
        return None

    def lockstep(self, but: type[Exception]) -> AbstractContextManager[None]:
        """A context around a message that the others wait for or act upon. If it breaks off, the groups are broken.

        but: Exceptions that the others raise or are told of.
        """
        return self._group.lockstep(self._model_groups, "the step's message", but)

    def _check(self, hosts: np.ndarray[Any, Any]) -> None:
        """Raise if the hosts' parts of the message do not fit. hosts: (size, n) fp64, each a _HostRow and bits."""
        error = _difference(
            hosts[:, _COLUMN.purpose].tolist(), hosts[:, _COLUMN.hyper_parameters].tolist(), self._group
        )
        if isinstance(error, CollectiveError):
            raise error
        if hosts[:, _COLUMN.has_error].any():
            ranks = [self._group.members()[place] for place in hosts[:, _COLUMN.has_error].nonzero()[0]]
            raise _other_error(PURPOSES[int(hosts[0, _COLUMN.purpose])], ranks)
        rounds = [int(num) for num in hosts[:, _COLUMN.num_rounds].tolist()]
        if len(set(rounds)) > 1:
            raise CollectiveError(
                f"expected every rank to run backward equally often in stage 2, got {rounds} backwards by rank; run as "
                f"many on each, or put those that only some ranks run inside no_sync() on all of them"
            )
        if {Unsent.PLAIN, Unsent.SCALED} <= set(hosts[:, _COLUMN.unsent].tolist()):
            raise mixed_scale_error()
        if error is not None:
            raise error
        half_edited = hosts[:, _COLUMN.half_edited].max()
        if half_edited >= 0:
            raise RuntimeError(
                f"expected .grad of {self.name_of(int(half_edited))} unedited, for a part of it has been reduced "
                f"already and is not in it, got an edit in place; call zero_grad(), and from then on "
                f"optimizer.clip_grad_norm_ or optimizer.set_full_grad(p, value), which see all of it"
            )

    def _check_edits(self, checksums: np.ndarray[Any, Any], mine: LocalGradStats) -> None:
        """Raise if ranks have edited reduced gradients differently. checksums: (size,), of every rank's edits."""
        if (checksums == checksums[0]).all():
            return
        told = self._group.gather_objects(
            (list(mine.edits), list(mine.products) or [1.0] * len(mine.edits)), "the comparison of edits"
        )  # all ranks see that checksums differ
        edits, products = (np.array(rows) for rows in zip(*told, strict=True))
        number = int((edits != edits[0]).any(0).argmax())
        nums = edits[:, number].tolist()
        if len(set(nums)) == 1:  # hosts may round differently
            is_other = ~np.isclose(products, products[0], rtol=_ROUNDING, atol=0.0, equal_nan=True).all(0)
            if not is_other.any():
                return
            number = int(is_other.argmax())
            raise RuntimeError(
                f"expected the reduced gradient of {self.name_of(number)} multiplied by the same number on every rank, "
                f"got products {products[:, number].tolist()} by rank; it is the mean over ranks already: multiply "
                f"each rank's loss before backward, or take a number that all share, such as the total of all_reduce"
            )
        ranks = [rank for rank, num in enumerate(nums) if num != min(nums)]
        raise RuntimeError(
            f"expected the reduced gradient of {self.name_of(number)} edited alike on every rank, got .grad "
            f"assigned, cleared or scaled on ranks {ranks} of {len(edits)} only; do the same on each, step() "
            f"equally often included, or call zero_grad() on all of them"
        )

    def _warn_of_lost_shards(self, num_exports: list[float]) -> None:
        """Warn once if only some ranks called state_dict(): the parts of the others are not saved."""
        without = [rank for rank, num in enumerate(num_exports) if not num]
        if self._may_warn and 0 < len(without) < len(num_exports):
            self._may_warn = False
            log.warning(
                "state_dict() was called on some ranks only, and not on ranks %s of %d: each holds a part, and theirs "
                "is not saved, so that what was saved cannot be resumed from; call pyzero.save_checkpoint() or "
                "full_state_dict() on all ranks (transformers: from pyzero.transformers import Trainer)",
                without,
                len(num_exports),
            )

    def norm(self, power: Tensor, norm_type: float, unscale: Tensor | None) -> Tensor:
        """Return global p-norms, (n,) fp32, of every rank's (n,) fp64 sums of |g|^p (inf: largest |g|). Collective."""
        for group in (self._group, *self._model_groups):
            rows = group.gather_rows(power)
            power = rows.amax(0) if math.isinf(norm_type) else rows.sum(0)
        norm = power if math.isinf(norm_type) else power.pow(1 / norm_type)
        return (norm if unscale is None else norm * unscale).to(torch.float32)


def _difference(purposes: Sequence[float], hyper: Sequence[float], group: Group) -> RuntimeError | None:
    """Return the error if ranks have called different methods, or step with different hyper-parameters, or None."""
    calls = [PURPOSES[int(purpose)] for purpose in purposes]
    if len(set(calls)) > 1 or len(set(hyper)) > 1:
        ranks = group.members()
    if len(set(calls)) > 1:
        called = ", ".join(f"{purpose} on rank {rank}" for rank, purpose in zip(ranks, calls, strict=True))
        kept = (
            "; where all did, a backward ran on some ranks only between two norms, and the others took the one that "
            "they had: run as many on each"
        )
        return CollectiveError(
            f"expected the same call on every rank, got {called}; steps, norms and whole tensors are collective: call "
            f"them on all ranks, and print on one{kept * (_OF_GRAD in calls)}"
        )
    if calls[0] == "step" and len(set(hyper)) > 1:
        others = [rank for rank, checksum in zip(ranks, hyper, strict=True) if checksum != hyper[0]]
        return RuntimeError(
            f"expected the same hyper-parameters in param_groups on every rank, got others on ranks {others} of "
            f"{len(hyper)} than on rank {ranks[0]}; call the scheduler's step() on all, with one metric, and set lr "
            f"on all"
        )
    return None


def _other_error(purpose: str, ranks: Sequence[int]) -> RuntimeError:
    """Make the error for a failure on other ranks."""
    return RuntimeError(
        f"expected every rank to finish {purpose}, got an error on ranks {list(ranks)}; nothing was changed on any "
        f"rank. Their output says what the error is"
    )


def _checksum(edits: Sequence[int], products: Sequence[float]) -> int:
    """Return a checksum of edits and products; 0 if nothing was edited."""
    if not any(edits):
        return 0
    return zlib.crc32(np.array(products, np.float64).tobytes(), zlib.crc32(np.array(edits, np.int64).tobytes()))


def _packed(used: Sequence[bool]) -> list[float]:
    """Pack one bit per parameter, _NUM_BITS in a number."""
    flags = np.zeros(round_up(len(used), _NUM_BITS))
    flags[: len(used)] = used
    words: list[float] = (flags.reshape(-1, _NUM_BITS) @ _BITS).tolist()
    return words


def _union(words: np.ndarray[Any, Any], num_params: int) -> tuple[bool, ...]:
    """Return the flags that any rank has set. words: (size, n), a row of `_packed` for each rank."""
    anyones = np.bitwise_or.reduce(words.astype(np.int64), 0)
    return tuple((anyones[:, None] >> _SHIFTS & 1).astype(bool).ravel()[:num_params].tolist())


def _names(group: Group, shares_params: bool) -> RankNames:
    """Return the numbers of the group's ranks. shares_params: Other ranks hold other parts of the same parameters."""
    if not shares_params:
        return RankNames(tuple(range(group.size)), group.size)
    return RankNames(tuple(group.members()), process.rank_and_size()[1])


def mixed_scale_error() -> RuntimeError:
    """Make the error for a sum of gradients with different loss scales, or with and without one."""
    return RuntimeError(
        "expected all gradients of one sum to carry the same loss scale, got one from another backward on top of those "
        "in .grad; call optimizer.backward(loss) for every loss, and optimizer.zero_grad() after optimizer.step()"
    )


def clip_coefficient(max_norm: float, norm: Tensor) -> Tensor:
    """Return the coefficient of torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), 0-D."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
