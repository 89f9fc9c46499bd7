"""What a ZeroOptimizer saves and loads: its state dicts, and what a checkpoint asks of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyzero.comm.group import CollectiveError, Group
from pyzero.gradients.grad_stats import Unsent
from pyzero.gradients.reduced.arrival_order import ArrivalOrder
from pyzero.loss_scale.overflow import OverflowMonitor
from pyzero.sharding import rank_state
from pyzero.sharding.agreement import Unfrozen, check_unfrozen
from pyzero.sharding.buckets import MASTER, STEP
from pyzero.sharding.layout import BucketLayout
from pyzero.status import Status
from pyzero.streams import on_device

log = logging.getLogger("pyzero")

_T = TypeVar("_T")


class StateDicts(Status):
    """The part of ZeroOptimizer that its state goes out by and comes in by."""

    _overflow: OverflowMonitor
    _arrival_order: ArrivalOrder
    # No values here: Lightning's wrappers inherit the class and look up in the optimizer what they do not have.
    _checkpoint_group: Group | None
    _is_torn: bool  # a step or a load has begun to write

    def _move_to(self, layouts: list[BucketLayout], keeps_state: bool = True) -> None:
        raise NotImplementedError

    def _find_unfrozen(self) -> list[int]:
        raise NotImplementedError

    def _place_found(self, group_indices: list[int]) -> None:
        raise NotImplementedError

    # ---- for checkpoints --------------------------------------------------------------------------------------------

    def checkpoint_group(self) -> Group:
        """All ranks that hold a part of the model, over a process group that training does not use.

        So a save in a thread meets no collective of a step. Collective when it is first called.

        Raises:
            ValueError: No group that the optimizer knows has all ranks that DTensors' meshes reach.
        """
        if self._checkpoint_group is None:
            what = "the lease of a process group for checkpoints"
            self._group.check_unbroken(what)
            # Ranks agree on it over the optimizer's own, which the next optimizer must not get half-way through that.
            with on_device(self._device), self._group.lockstep(what=what, but=ValueError):
                self._checkpoint_group = self._topology.make_group_of_all()
        return self._checkpoint_group

    def find_unfrozen(self) -> list[int]:
        """What `place_unfrozen` takes; apart from that, for it may raise on one rank alone. Before any collective."""
        return self._find_unfrozen()

    def describe_unfrozen(self, found: list[int]) -> Unfrozen:
        """What the ranks compare of it before they place them."""
        return {
            (index, position): self._name(index, position)
            for index in found
            for position, param in enumerate(self._param_groups[index]["params"])
            if param.requires_grad and param not in self._param_buckets.locations
        }

    def members(self) -> list[int]:
        """The ranks that share this optimizer's state, and so train the same parameters."""
        return self._group.members()

    def place_unfrozen(self, found: list[int]) -> None:
        """Give parameters that are no longer frozen their state now, not in the next step. Collective then."""
        self._place_found(found)

    def check_between_steps(self, with_gradients: bool = True) -> None:
        """Raise RuntimeError where gradients wait for step(), which a checkpoint does not hold, or state is torn.

        with_gradients: False: gradients may be left out.
        """
        self._check_whole()
        if with_gradients and self._gradients.has_pending_gradients():
            raise RuntimeError(
                "expected a save after step() or zero_grad(), got one after a backward, whose gradients would be lost; "
                "save after the step that they belong to"
            )

    @contextmanager
    def _writing(self, replaces_all: bool = False) -> Iterator[None]:
        """Around what writes weights and state on all ranks: broken off on one, nothing is sent or saved after it.

        replaces_all: As a load does: what an earlier step has torn is whole again.
        """
        was_torn, self._is_torn = self._is_torn, True
        try:
            yield
        except BaseException as error:
            self._group.break_off(error, "a step or a load", self._topology.model_groups)
            raise
        self._is_torn = was_torn and not replaces_all

    def _check_whole(self) -> None:
        """Raise RuntimeError where a step or a load was broken off."""
        if self._is_torn:
            raise RuntimeError(
                "expected weights and state of one step to save, got those of a step() or load_state_dict() that was "
                "broken off, which has written a part of them; load the last checkpoint into a new optimizer"
            )

    # ---- state dicts ------------------------------------------------------------------------------------------------

    def _hook_state_dict(self) -> None:
        """Extend torch's own `state_dict()` by hooks that run before and after it."""
        self.register_state_dict_pre_hook(_follow_weights)
        self.register_state_dict_post_hook(_export_state, prepend=True)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave on the same rank of as many ranks, a full_state_dict(), or a torch optimizer's.

        Every rank calls it; the latter two are given whole to each. Where it does not fit on one rank, nothing is
        changed on any. Gradients stay; with a loss scale those that were held back are reduced first.
        A fixed loss scale stays as it was built; a dynamic one becomes the saved one, inside its bounds.

        Raises:
            ValueError: Another rank's, another number of ranks', or other parameters; or another rule's.
        """
        state_dict = {} if state_dict is None else state_dict.copy()  # a rank that has none says so to all
        state_dict = self._prepare_load(state_dict)
        saved, cut, unsent = self._parse(state_dict)
        self._gradients.send_unsent(unsent)  # before the loss scale that they carry changes
        with self._writing(replaces_all=True):
            self._load(saved, cut)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _prepare_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What hooks make of it, once parameters and weights have been found fit on all ranks. Collective."""
        problem, unfrozen = None, []
        told: Unfrozen = {}
        try:
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = before(self, state_dict) or state_dict
            unfrozen = self._find_unfrozen()
            told = self.describe_unfrozen(unfrozen)
            for bucket in self._buckets:
                bucket.flat_params.foreign_writes()  # raises where it cannot follow them
        except CollectiveError:  # which the others have, too
            raise
        except Exception as error:
            problem = error
        try:
            check_unfrozen(self.members(), self._tell(problem, told))
        finally:
            problem = None  # its traceback holds this frame, and the callers'
        self._place_found(unfrozen)
        return state_dict

    def _tell(self, problem: Exception | None, answer: _T) -> list[_T]:
        """Every rank's answer; where one has a problem, all raise. Collective."""
        kind = "" if problem is None or isinstance(problem, ValueError) else f"{type(problem).__name__}: "
        told = self._group.gather_objects(
            (None if problem is None else f"{kind}{problem}", answer), "the agreement on a load"
        )
        try:
            if problem is not None:
                raise problem
        finally:
            problem = None
        for rank, (text, _) in enumerate(told):
            if text is not None:
                raise ValueError(f"nothing was loaded, for rank {rank} could not: {text}")
        return [one for _, one in told]

    def _load(self, saved: rank_state.RankState, cut: rank_state.SavedCut | None) -> None:
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

    def _parse(
        self, state_dict: dict[str, Any]
    ) -> tuple[rank_state.RankState, rank_state.SavedCut | None, set[Unsent]]:
        """The state, once all ranks have found that theirs fits, the buckets that its parts are of, and what gradients
        the ranks have not sent. Collective.
        """
        saved, problem, unsent = None, None, Unsent.NONE
        try:
            saved = rank_state.RankState.parse(
                self, self._as_ours(state_dict), self._param_buckets, self._group.rank, self._group.size
            )
            summary, unsent = saved.summary(), self._gradients.unsent()
        except Exception as error:  # of any kind: the other ranks wait to hear of it
            problem, summary = error, None
        try:
            told = self._tell(problem, (summary, unsent))
        finally:
            problem = None
        assert saved is not None
        summaries = [of_rank for of_rank, _ in told if of_rank is not None]
        return saved, rank_state.agreed_cut(summaries), {kind for _, kind in told}

    def _as_ours(self, state_dict: Any) -> Any:
        """Hook for subclasses: add what torch's optimizer of this rule does not save, such as step counts."""
        return state_dict

    def _as_state_dict(self, values: dict[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
        """Whole values by parameter, in torch's layout."""
        state: dict[int, dict[str, Tensor]] = {}
        groups, first = [], 0
        for group in self._param_groups:
            params = group["params"]
            state.update({first + i: values[param] for i, param in enumerate(params) if param in values})
            others = {key: value for key, value in group.items() if key not in ("params", rank_state.ZERO)}
            groups.append({**others, "params": list(range(first, first + len(params)))})
            first += len(params)
        groups[0][rank_state.SCALER] = self._scaler.saved().cpu()
        groups[0][rank_state.RULE] = self.rule_name
        steps = [float(state[i][STEP]) if i in state else -1.0 for i in range(first)]
        rank_state.note_master_steps(groups[0], steps)
        return {"state": state, "param_groups": groups}

    def _zero_state(self) -> str:
        """Which rank's a state dict is, and from which buckets its parts are cut."""
        learned = self.reduces_grads and not self._arrival_order.is_learning
        params = (param for group in self._param_groups for param in group["params"])
        param_ids = {param: i for i, param in enumerate(params)}
        return rank_state.describe(self._group.rank, self._group.size, self._buckets, param_ids, learned)


def with_step_counts(state_dict: Any) -> Any:
    """A copy in which every parameter with a momentum buffer has a step count: torch.optim.SGD and Muon keep none.

    1 stands for any number: these rules ask at most whether a step is a parameter's first. A buffer of None, as older
    torch saved it without momentum, is no state. What is no state dict is returned as it is, for load_state_dict to
    refuse.
    """
    state = state_dict.get("state") if isinstance(state_dict, dict) else None
    if not isinstance(state, dict):
        return state_dict
    counted = {
        index: {STEP: torch.ones(()), **values} if isinstance(values, dict) and "momentum_buffer" in values else values
        for index, values in state.items()
        if values != {"momentum_buffer": None}
    }
    return {**state_dict, "state": counted}


def _follow_weights(optimizer: Optimizer) -> None:
    """A state_dict hook: have masters follow weights that were written since the last step."""
    assert isinstance(optimizer, StateDicts)
    if optimizer._group.size > 1:  # on one rank it may be loaded into, and goes on
        optimizer._check_whole()
    optimizer._param_buckets.follow_weights()


def _export_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A state_dict hook: add the loss scale's five numbers and the rule, and give tensors the parameters' shapes.

    The five are a copy: what is read into them counts only once it is loaded, for other values depend on them.
    """
    assert isinstance(optimizer, StateDicts)
    state_dict["param_groups"][0][rank_state.SCALER] = optimizer._scaler.saved()
    state_dict["param_groups"][0][rank_state.ZERO] = optimizer._zero_state()
    state_dict["param_groups"][0][rank_state.RULE] = optimizer.rule_name
    rank_state.export_state(optimizer, state_dict, optimizer._param_buckets, optimizer._group)
    optimizer._stats_exchange.note_export()
