"""What a ZeroOptimizer saves and loads: its state dicts, and the methods that checkpoints call."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyzero.comm.group import Group
from pyzero.comm.work import CollectiveError
from pyzero.full_access import FullAccess
from pyzero.gradients.grad_stats import Unsent
from pyzero.gradients.hooks import can_be_trained, trained
from pyzero.loss_scale.overflow import OverflowMonitor
from pyzero.ops.rows import FLOAT_DTYPES
from pyzero.rank_state.export import describe, export_state
from pyzero.rank_state.load import RankState, check_form
from pyzero.rank_state.notes import RULE, SCALER, ZERO, note_master_steps
from pyzero.rank_state.saved_cut import SavedCut, Summary, agreed_cut
from pyzero.sharding.agreement import Unfrozen, check_unfrozen
from pyzero.sharding.buckets import MASTER, STEP
from pyzero.sharding.gather import widen
from pyzero.sharding.local_param import LocalParam, user_param
from pyzero.status import Status
from pyzero.streams import on_device

log = logging.getLogger("pyzero")

SAVE_OR_LOAD = "a save or load (every rank must call it)"  # in the errors of ranks of which some alone call one

_T = TypeVar("_T")


class StateDicts(FullAccess, Status):
    """The part of ZeroOptimizer that saves and loads its state."""

    _overflow: OverflowMonitor
    _group_of_all: Group | None
    _is_torn: bool  # a step or a load has begun to write

    # ---- for checkpoints --------------------------------------------------------------------------------------------

    def _checkpoint_group(self) -> Group:
        """Return a group of all ranks that hold a part of the model, over a process group that training does not use.

        A save in a thread then cannot meet a collective of a step. The first call is collective.

        Raises:
            ValueError: No group that the optimizer knows contains all ranks of the DTensors' meshes.
            RuntimeError: The process group was destroyed.
        """
        self._group.check_exists()
        if self._group_of_all is None:
            what = "the lease of a process group for checkpoints"
            self._group.check_unbroken(what)
            # Ranks agree over the optimizer's own group, which no other optimizer may get before they are done.
            with on_device(self._device), self._group.lockstep(what=what, but=ValueError):
                self._group.any_rank(False, f"the start of {SAVE_OR_LOAD}")  # in this group the other ranks see it
                self._group_of_all = self._topology.make_group_of_all()
        return self._group_of_all

    def _check_between_steps(self, with_gradients: bool = True) -> None:
        """Raise RuntimeError if gradients wait for step(), because a checkpoint has none, or if the state is torn.

        with_gradients: False allows gradients to wait.
        """
        self._check_whole()
        if with_gradients and self._gradients.has_pending_gradients():
            raise RuntimeError(
                "expected a save after step() or zero_grad(), got one after a backward, whose gradients would be lost; "
                "save after the step that they belong to"
            )

    @contextmanager
    def _writing(self, replaces_all: bool = False) -> Iterator[None]:
        """A context around a write of weights and state on all ranks. If one rank fails in it, all later sends fail.

        A save then raises, too. replaces_all: The write is a load, so state that was torn before is whole after it.
        """
        was_torn, self._is_torn = self._is_torn, True
        try:
            yield
        except BaseException as error:
            self._group.break_off(error, "a step or a load", self._topology.model_groups)
            raise
        self._is_torn = was_torn and not replaces_all

    def _check_whole(self) -> None:
        """Raise RuntimeError if a step or a load was broken off."""
        if self._is_torn:
            raise RuntimeError(
                "expected weights and state of one step to save, got those of a step() or load_state_dict() that was "
                "broken off, which has written a part of them; load the last checkpoint into a new optimizer"
            )

    # ---- state dicts ------------------------------------------------------------------------------------------------

    def _hook_state_dict(self) -> None:
        """Extend torch's `state_dict()` by hooks that run before and after it."""
        self.register_state_dict_pre_hook(_follow_weights)
        self.register_state_dict_post_hook(_export_state, prepend=True)

    @torch.no_grad()
    def full_state_dict(self, to: int | None = None) -> dict[str, Any]:
        """Return all state, whole and on the CPU, in the layout of a torch optimizer's state_dict. Collective.

        `load_state_dict` accepts it on any number of ranks, in any stage and with any buckets, and training continues
        bit for bit. torch.optim.Adam and AdamW load it too, without the masters and the loss scale. It needs device
        memory for one bucket's values of one slot.

        Args:
            to: The rank of the group that gets it (with DTensors, of all ranks that hold a part). The others get an
                empty dict. None: all ranks get it.

        Raises:
            ValueError: There is no such rank.
        """
        rank, size = self._topology.rank_and_size()
        if to is not None and not 0 <= to < size:
            raise ValueError(f"expected to as a rank from 0 to {size - 1}, or None, got {to}; pass one")
        self._place_unfrozen()
        is_wanted = to is None or to == rank
        values: dict[Tensor, dict[str, Tensor]] = {}
        self._follow("the full state dict", self._mesh_groups())
        for bucket in self._buckets:
            for name in bucket.state_names:
                flat = self._group.gather_shards(bucket.to_send(name), "the all-gather of a full state dict")
                for position, param in enumerate(bucket.params):
                    if is_wanted or isinstance(param, LocalParam):
                        values.setdefault(user_param(param), {})[name] = bucket.whole_of(name, flat, position)
        for param in self._param_buckets.params:  # in order of number: ranks may have parts in different buckets
            bucket, position = self._param_buckets.locations[user_param(param)]
            for name, local in values[user_param(param)].items() if isinstance(param, LocalParam) else ():
                values[user_param(param)][name] = widen(bucket, name, position, local)
        for bucket in self._buckets if is_wanted else ():
            for param, step in zip(bucket.params, bucket.steps.cpu(), strict=True):
                values[user_param(param)][STEP] = step.clone()
        return self._as_state_dict(values) if is_wanted else {}

    def consolidate_state_dict(self, to: int = 0) -> dict[str, Any]:
        """Return `full_state_dict(to)`, under the name that torch's ZeroRedundancyOptimizer uses."""
        return self.full_state_dict(to)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()` of the same rank of as many ranks, a `full_state_dict()`, or a torch optimizer's.

        Every rank calls it. A full or torch state dict is passed whole to each rank. If it does not fit on one rank,
        nothing changes on any rank. Gradients stay; with a loss scale, gradients that were held back are reduced first.
        A fixed loss scale stays. A dynamic one becomes the saved one, inside its bounds.

        Raises:
            ValueError: It is another rank's, or of another number of ranks, other parameters or another update rule.
        """
        state_dict = copy.copy(state_dict)  # as torch; what is no dict is refused on all ranks
        state_dict, frozen = self._prepare_load(state_dict)
        saved, cut, unsent = self._parse(state_dict)
        self._gradients.send_unsent(unsent)  # before the loss scale that they carry changes
        weights = [param.detach().clone() for param in frozen]
        with self._writing(replaces_all=True):
            self._load(saved, cut)
            for param, weight in zip(frozen, weights, strict=True):
                param.copy_(weight)  # masters that round to it stay
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _prepare_load(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """Return what the pre-hooks make of the state dict, and frozen parameters that have got buckets for its state.

        Raise if any rank's parameters do not fit. Collective.
        """
        frozen: list[Tensor] = []
        unfrozen: list[int] = []

        def prepare() -> Unfrozen:
            nonlocal state_dict, frozen, unfrozen
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = before(self, state_dict) or state_dict
            check_form(state_dict)
            frozen = self._frozen_with_state(state_dict)
            with trained(*frozen):
                unfrozen = self._find_unfrozen()
                told = self._describe_unfrozen(unfrozen)
            for bucket in self._buckets:
                bucket.flat_params.foreign_writes()  # raises if masters cannot follow the writes
            return told

        check_unfrozen(self._group.members(), self._on_all_ranks(prepare))
        with trained(*frozen):
            self._place_found(unfrozen)
        return state_dict, frozen

    def _frozen_with_state(self, state_dict: dict[str, Any]) -> list[Tensor]:
        """Return the frozen parameters without buckets that the state dict has state for, from when they trained."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        saved_ids = [saved_id for group in groups for saved_id in group["params"]]
        params = [param for group in self._param_groups for param in group["params"]]
        if len(saved_ids) != len(params):
            return []  # refused by what comes next
        has_state = [any(map(torch.is_tensor, state.get(saved_id, {}).values())) for saved_id in saved_ids]
        return self._could_have_state([param for param, has in zip(params, has_state, strict=True) if has])

    def _could_have_state(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return those of these parameters that have no buckets because they are frozen, and could have some."""
        return [
            param
            for param in params
            if not param.requires_grad
            and param not in self._param_buckets.locations
            and param.dtype in FLOAT_DTYPES
            and can_be_trained(param)
        ]

    def _on_all_ranks(self, act: Callable[[], _T]) -> list[_T]:
        """Call `act`, as all ranks do. Return the results of the ranks that share the state. If one fails, all raise.

        Collective over all ranks that hold a part of the model.
        """
        problem, mine, answer = None, None, None
        try:
            answer = act()
        except CollectiveError:  # the other ranks raise it too
            raise
        except Exception as error:  # any other error: the other ranks wait for this rank's answer
            problem = error
            mine = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        what = "the agreement on a load"
        try:
            told = self._group.gather_objects((mine, answer), what)
            texts = zip(self._group.members(), told, strict=True)
            problems = {rank: text for rank, (text, _) in texts if text is not None}
            for group in self._topology.model_groups:
                for found in group.gather_objects(problems, what):
                    problems = {**problems, **found}
            if problem is not None:
                raise problem
        finally:
            problem = None  # its traceback holds this frame, and the callers'
        for rank, text in sorted(problems.items()):
            raise ValueError(f"nothing was loaded, for rank {rank} could not: {text}")
        return [one for _, one in told]

    def _load(self, saved: RankState, cut: SavedCut | None) -> None:
        saved.forget_unloaded_masters(self, self._param_buckets)
        self._param_buckets.follow_weights(keep_masters={one.param for one in saved.params if one.has(MASTER)})
        if cut is not None:
            self._move_to(cut.layouts(self, self._param_buckets, self._group.size), keeps_state=False)
            if cut.has_learned:
                self._arrival_order.finish()
        saved.reorder(self._param_buckets, self._group)
        saved.copy_into(self)
        has_scale = saved.scaler is not None and self._scaler.load(saved.scaler)
        if saved.scaler is not None:
            self._overflow.start_from(self.skipped_steps)
        if self._scaler.enabled and not has_scale and self._topology.rank_and_size()[0] == 0:
            log.warning("the state that was loaded has no loss scale; it stays at %g", self.loss_scale)
        self._param_buckets.publish_masters()

    def _parse(self, state_dict: dict[str, Any]) -> tuple[RankState, SavedCut | None, set[Unsent]]:
        """Return the state, the buckets of its parts, and which gradients the ranks have not sent.

        Raise on all ranks if it does not fit on one. Collective.
        """
        saved: RankState | None = None

        def parse() -> tuple[Summary, Unsent]:
            nonlocal saved
            saved = RankState.parse(
                self, self._complete_torch_state(state_dict), self._param_buckets, self._group.rank, self._group.size
            )
            return saved.summary(), self._gradients.unsent()

        told = self._on_all_ranks(parse)
        assert saved is not None
        return saved, agreed_cut([summary for summary, _ in told]), {kind for _, kind in told}

    def _complete_torch_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add what torch's optimizer of this rule does not save, such as step counts. A hook for subclasses."""
        return state_dict

    def _as_state_dict(self, values: dict[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
        """Return whole values, given by parameter, in the layout of torch's state dicts."""
        state: dict[int, dict[str, Tensor]] = {}
        groups, first = [], 0
        for group in self._param_groups:
            params = group["params"]
            state.update({first + i: values[param] for i, param in enumerate(params) if param in values})
            others = {key: _on_host(value) for key, value in group.items() if key not in ("params", ZERO)}
            groups.append({**others, "params": list(range(first, first + len(params)))})
            first += len(params)
        groups[0][SCALER] = self._scaler.saved().cpu()
        groups[0][RULE] = self.rule_name
        steps = [float(state[i][STEP]) if i in state else -1.0 for i in range(first)]
        note_master_steps(groups[0], steps)
        return {"state": state, "param_groups": groups}

    def _zero_state(self) -> str:
        """Describe the rank that a state dict belongs to, and the buckets that its parts are cut from."""
        learned = self.reduces_grads and not self._arrival_order.is_learning
        params = (param for group in self._param_groups for param in group["params"])
        param_ids = {param: i for i, param in enumerate(params)}
        return describe(self._group.rank, self._group.size, self._buckets, param_ids, learned)


def _on_host(value: Any) -> Any:
    """Copy a tensor, such as a learning rate that a schedule writes to, to host memory."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def with_step_counts(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that has a step count for each momentum buffer, because torch.optim.SGD and Muon save none.

    The count is 1: these rules ask at most whether a step is a parameter's first. A buffer of None, which older torch
    saved without momentum, is dropped.
    """
    counted = {
        index: {STEP: torch.ones(()), **values} if "momentum_buffer" in values else values
        for index, values in state_dict["state"].items()
        if values != {"momentum_buffer": None}
    }
    return {**state_dict, "state": counted}


def _follow_weights(optimizer: Optimizer) -> None:
    """Make masters follow weights that were written since the last step. A hook of state_dict()."""
    assert isinstance(optimizer, StateDicts)
    if optimizer._group.size > 1:  # on one rank a torn optimizer may load a state dict and continue
        optimizer._check_whole()
    elif not optimizer._topology.model_dims:  # what was unfrozen has state from now on, for get_state_dict
        optimizer._place_found(optimizer._find_unfrozen())
    optimizer._param_buckets.follow_weights()


def _export_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add the loss scale's five numbers and the rule, and give tensors the parameters' shapes. A hook of state_dict().

    The five are a copy, because other values depend on them: new values count only once they are loaded.
    """
    assert isinstance(optimizer, StateDicts)
    state_dict["param_groups"][0][SCALER] = optimizer._scaler.saved()
    state_dict["param_groups"][0][ZERO] = optimizer._zero_state()
    state_dict["param_groups"][0][RULE] = optimizer.rule_name
    export_state(optimizer, state_dict, optimizer._param_buckets, optimizer._group)
    optimizer._stats_exchange.note_export()
