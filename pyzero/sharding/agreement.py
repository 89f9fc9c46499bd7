"""Checks that ranks agree, because each holds a part: on an optimizer's options, and on the parameters that join it.

All ranks gather what each has, reach the same verdict, and raise the same error.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyzero.arguments.options import ZeroOptions
from pyzero.comm.group import Group
from pyzero.sharding.flat_params import strides_in_slot

# Options that ranks with other parts of the model must share too, because they share the norm and skip together.
_OF_WHOLE_MODEL = ("max_grad_norm", "loss_scale", "max_consecutive_skips")
_MAY_DIFFER = ("backend",)  # all give the same bits
_MOST_RANKS_NAMED = 8
_REFUSAL = "refusal"  # a rank's error, in place of its options


def agree_on_options(group: Group, rule: str, options: ZeroOptions, model_groups: Sequence[Group] = ()) -> None:
    """Raise on all ranks if their options differ. Collective. Call it before anything that depends on an option.

    model_groups: The groups of ranks with other parts of the model, one for each dimension.
    """
    mine = {"rule": _spell(rule), **{name: _spell(value) for name, value in options.items() if name not in _MAY_DIFFER}}
    problem = _problem_with_options(group, mine, model_groups)
    if problem is not None:
        raise ValueError(problem)


def tell_refusal(group: Group, error: Exception, model_groups: Sequence[Group] = ()) -> None:
    """Make agree_on_options raise on the other ranks, because this rank refuses its own arguments. Collective."""
    _problem_with_options(group, {_REFUSAL: f"{type(error).__name__}: {error}"}, model_groups)


def _problem_with_options(group: Group, mine: dict[str, str], model_groups: Sequence[Group]) -> str | None:
    problem = _differing_option(group, mine)
    for others in model_groups:  # a rank that has seen a difference tells these too
        of_model = {name: mine[name] for name in _OF_WHOLE_MODEL if name in mine}
        told = others.gather_objects(problem, "the comparison of options")
        problem = problem or next(filter(None, told), None) or _differing_option(others, of_model)
    return problem


def _differing_option(group: Group, mine: dict[str, str]) -> str | None:
    rows = group.gather_objects(mine, "the comparison of options")
    refusals = [row.get(_REFUSAL) for row in rows]
    first = next(filter(None, refusals), None)
    if first is not None:
        ranks = [rank for rank, text in zip(group.members(), refusals, strict=True) if text == first]
        return f"no optimizer was built, for its arguments are refused on {_spell_ranks(ranks)}: {first}"
    differing = [name for name in mine if any(row[name] != mine[name] for row in rows)]
    if not differing:
        return None
    told = "; ".join(f"{name}={_by_value(group, [row[name] for row in rows])}" for name in differing)
    return f"expected the same options on every rank, got {told}; pass the same to the optimizer on every rank"


def _by_value(group: Group, values: list[str]) -> str:
    """Name each value, with the ranks that have it."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in zip(group.members(), values, strict=True):
        ranks_of.setdefault(value, []).append(rank)
    return " and ".join(f"{value} on {_spell_ranks(ranks)}" for value, ranks in ranks_of.items())


def _spell_ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_RANKS_NAMED]))
    rest = f" and {len(ranks) - _MOST_RANKS_NAMED} more" if len(ranks) > _MOST_RANKS_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {named}{rest}"


def _spell(value: object) -> str:
    """Return a text that is equal for equal options. 1, 1.0 and a tensor of 1 are equal."""
    is_number = isinstance(value, (numbers.Real, Tensor)) and not isinstance(value, bool)
    if not is_number:
        return repr(value)
    number = float(value)  # type: ignore[arg-type]
    return repr(int(number) if number.is_integer() else number)


class ParamRecord(NamedTuple):
    """What ranks compare about a parameter that joins."""

    shape: tuple[int, ...]
    dtype: str
    group: int  # its index in param_groups
    rule: str | None  # the name of its update rule; None if frozen
    strides: tuple[int, ...]  # in its slot, of the dimensions longer than 1; () if frozen
    given_names: tuple[str, ...]  # the caller's, if the group has names
    module_names: tuple[str, ...]  # in each outermost module that holds it

    @staticmethod
    def of(
        param: Tensor, group: int, rule: str | None, given_names: Sequence[str], module_names: Sequence[str]
    ) -> ParamRecord:
        """Make this rank's record. param: A local tensor."""
        shape = tuple(param.shape)
        orders = rule is not None and bool(param.numel())  # strides matter only if trained and not empty
        strides = zip(shape, strides_in_slot(param), strict=True) if orders else ()
        laid_out = tuple(stride for size, stride in strides if size > 1)
        dtype = str(param.dtype).removeprefix("torch.")
        return ParamRecord(shape, dtype, group, rule, laid_out, tuple(given_names), tuple(sorted(module_names)))


class Joining(NamedTuple):
    """The parameters that join an optimizer, in the order of their groups."""

    trained: list[ParamRecord]
    frozen: list[ParamRecord]  # those that get rank 0's values
    order: list[int] | None  # places of the trained ones in the order of one module that holds all, if there is one


def agree_on_params(group: Group, mine: Joining) -> list[int] | None:
    """Raise on all ranks if different parameters join. Return rank 0's `order`. Collective.

    Digests are compared first, because the records of many parameters are long, and usually the same.
    """
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len({*group.gather_objects(digest)}) == 1:
        return mine.order
    rows = group.gather_objects(mine)
    for rank, theirs in zip(group.members(), rows, strict=True):
        if isinstance(theirs, str):
            raise ValueError(f"no parameter was taken, for rank {rank} refuses its own: {theirs}")
    for rank, theirs in zip(group.members(), rows, strict=True):
        found = _difference(rows[0], theirs)
        if found is not None:
            what, first, other, remedy = found
            raise ValueError(
                f"expected the same parameters on every rank, got {what} as {first} on rank {group.members()[0]} and "
                f"{other} on rank {rank}; {remedy}"
            )
    rank_0s: list[int] | None = rows[0].order
    return rank_0s


Unfrozen = dict[tuple[int, int], str]  # names of parameters that are no longer frozen, by group and position in it


def tell_refused_params(group: Group, error: Exception) -> None:
    """Make agree_on_params raise on the other ranks, because this rank refuses its own parameters. Collective."""
    group.gather_objects("refused")
    group.gather_objects(f"{type(error).__name__}: {error}")


def check_unfrozen(ranks: Sequence[int], told: Sequence[Unfrozen]) -> None:
    """Raise ValueError if only some of these ranks have unfrozen a parameter. told: What each of them has found."""
    for position, name in {position: name for unfrozen in told for position, name in unfrozen.items()}.items():
        those = [rank for rank, unfrozen in zip(ranks, told, strict=True) if position in unfrozen]
        if len(those) < len(ranks):
            raise ValueError(
                f"expected the same parameters to be trained on every rank, got {name} no longer frozen on "
                f"{_spell_ranks(those)} of {len(ranks)} alone; unfreeze it on all ranks, or freeze it again"
            )


class _Difference(NamedTuple):
    what: str  # what differs
    first: str  # its value on the first rank
    other: str  # its value on the other rank
    remedy: str


_BUILD_ALIKE = "build the model and its groups alike on every rank"
_LAY_OUT_ALIKE = (
    "its elements lie in another order in memory, as load_state_dict(assign=True) may leave them; lay it out alike on "
    "every rank (p.data = p.data.contiguous())"
)
_ORDER_ALIKE = (
    "the groups list their parameters in another order, as Python's sets do in each process; build them from lists or "
    "dicts in the order of model.named_parameters() on every rank"
)


def _difference(first: Joining, other: Joining) -> _Difference | None:
    """Return the first difference between two ranks, or None."""
    pairs = (("parameter", first.trained, other.trained), ("frozen parameter", first.frozen, other.frozen))
    for kind, ours, theirs in pairs:
        found = _differing_record(kind, ours, theirs)
        if found is not None:
            return found
    for kind, ours, theirs in pairs:
        for field in ("given_names", "module_names"):
            found = _exchanged(kind, [getattr(r, field) for r in ours], [getattr(r, field) for r in theirs])
            if found is not None:
                return found
    return _reordered(first, other)


def _differing_record(kind: str, ours: list[ParamRecord], theirs: list[ParamRecord]) -> _Difference | None:
    """Find the first position at which shape, dtype, group, rule or strides differ, or only one rank has something."""
    both = zip(ours, theirs, strict=False)
    where = next((i for i, (a, b) in enumerate(both) if a[:5] != b[:5]), min(len(ours), len(theirs)))
    if where == len(ours) == len(theirs):
        return None
    a, b = (rows[where] if where < len(rows) else None for rows in (ours, theirs))
    first, other = ("nothing" if r is None else f"{r.shape} {r.dtype} in group {r.group}" for r in (a, b))
    remedy = _BUILD_ALIKE
    if a is not None and b is not None and a[:3] == b[:3]:
        if a.rule != b.rule:
            first, other = f"{first} of the rule {a.rule}", f"{other} of the rule {b.rule}"
        else:
            first, other = f"{first} with strides {a.strides}", f"{other} with strides {b.strides}"
            remedy = _LAY_OUT_ALIKE
    return _Difference(f"{kind} {where}", first, other, remedy)


def _exchanged(kind: str, ours: list[tuple[str, ...]], theirs: list[tuple[str, ...]]) -> _Difference | None:
    """Find the first position with a name that another position has on the other rank.

    If only one rank knows some names, names are not compared at all: a module may be wrapped on that rank only, and its
    second layer may then have the name of the other rank's first.
    """
    known = {name for names in ours for name in names} & {name for names in theirs for name in names}
    if not all({*names} & known for names in (*ours, *theirs)):
        return None
    for position, (mine, others) in enumerate(zip(ours, theirs, strict=True)):
        if not {*mine} & {*others}:
            return _Difference(f"{kind} {position}", " or ".join(mine), " or ".join(others), _ORDER_ALIKE)
    return None


def _reordered(first: Joining, other: Joining) -> _Difference | None:
    """Find the first place in the module's order at which two ranks have different parameters.

    Look only if one module holds all parameters and some parameter has no module name in common on the two ranks.
    """
    both = zip(first.trained, other.trained, strict=True)
    if first.order is None or other.order is None or all({*a.module_names} & {*b.module_names} for a, b in both):
        return None
    for position, (mine, others) in enumerate(zip(first.order, other.order, strict=True)):
        if mine != others:
            return _Difference(
                f"number {position} of the model", f"parameter {mine}", f"parameter {others}", _ORDER_ALIKE
            )
    return None
