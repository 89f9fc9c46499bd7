"""The base of ZeroOptimizer: its parameter groups, how parameters get buckets, and what the ranks collect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyzero.arguments.groups import check_group, check_members, have_grads_error
from pyzero.arguments.options import ZeroOptions
from pyzero.arguments.params import check_disjoint
from pyzero.comm.group import Group
from pyzero.comm.transport import Transport
from pyzero.comm.work import CollectiveError
from pyzero.gradients import amp
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange
from pyzero.gradients.interface import Gradients
from pyzero.gradients.reduced.arrival_order import ArrivalOrder
from pyzero.gradients.reduced.stage2_reducer import take_over
from pyzero.loss_scale.scaled_backward import ScaledBackward
from pyzero.loss_scale.scaler import Scaler
from pyzero.profiling import profile_range
from pyzero.sharding.agreement import Unfrozen
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import BucketLayout
from pyzero.sharding.param_buckets import ParamBuckets
from pyzero.sharding.topology import Topology
from pyzero.update_rule import UpdateRule


class ZeroBase(Optimizer):
    """What all parts of ZeroOptimizer share. ZeroOptimizer's constructor sets the attributes."""

    # No class attributes: Lightning's wrappers inherit the class, and would find them before the optimizer's own.
    _param_groups: list[dict[str, Any]]
    _model_names: dict[Tensor, str]
    _options: ZeroOptions
    _rule: UpdateRule
    _rules: list[UpdateRule]  # by parameter group
    _device: torch.device
    _topology: Topology
    _group: Group
    _transport: Transport
    _param_buckets: ParamBuckets
    _gradients: Gradients
    _arrival_order: ArrivalOrder
    _stats_exchange: GradStatsExchange
    _scaler: Scaler
    _scaled_backward: ScaledBackward
    _grad_scaler_proxy: amp.GradScalerProxy
    _is_ready: bool  # constructed

    # ---- parameter groups -------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, as in torch. On several ranks torch.amp.GradScaler gets stand-ins; see gradients/amp.py."""
        if amp.grad_scaler_is_asking() and (self._gradients.reduces or self._topology.model_dims):
            self._place_unfrozen("unscale_ of GradScaler")
            with torch.no_grad():
                found_inf = self._collect("unscale_ of GradScaler").found_inf
                if self._gradients.reduces:
                    return self._grad_scaler_proxy.groups(found_inf)
                return amp.with_flag((param.grad for param in self._param_buckets.params), found_inf)
        return self._param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. It gets its own buckets. Collective over several ranks."""
        given = [*param_group] if isinstance(param_group, dict) else []  # torch refuses anything else
        new = self._take_appended() if self._is_ready else []
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # torch warns of a parameter that comes twice. The first one counts.
        kept = {param: position for position, param in reversed([*enumerate(group["params"])])}
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][position] for position in sorted(kept.values())]
        try:
            self._take_group(len(self.param_groups) - 1, given)
            if self._is_ready:
                self._gradients.finish_broken_round()
                self._place([*new, len(self.param_groups) - 1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            del self._rules[len(self.param_groups) :]
            raise

    def _take_group(self, index: int, given: Iterable[str]) -> None:
        """Check a new group, and choose its rule. given: The names that the caller gave."""
        group = self._param_groups[index]
        check_group(group, given, self.defaults)
        rule = self._rule_of(group)
        rule.check(group)
        if self._is_ready:
            self._check_new(group["params"])
        self._rules[index:] = [rule]

    def _check_new(self, params: Iterable[Tensor]) -> None:
        """Check parameters that are about to join."""
        check_disjoint(self._named_params())
        self._topology.check_meshes(params)

    def _take_appended(self) -> list[int]:
        """Take the groups that others appended to `param_groups`, as a wrapper's add_param_group does.

        Returns:
            Their indices.
        """
        indices = [*range(self._param_buckets.num_groups, len(self._param_groups))]
        for index in indices:
            earlier = {param for group in self._param_groups[:index] for param in group["params"]}
            if not earlier.isdisjoint(self._param_groups[index]["params"]):
                raise ValueError(
                    f"some parameters appear in more than one parameter group: expected new ones in "
                    f"param_groups[{index}], got one of an earlier group; take it out of one of them"
                )
            try:
                self._take_group(index, self._param_groups[index])
            except KeyError as error:
                raise ValueError(
                    f"expected all hyper-parameters in param_groups[{index}], which was appended, got it without "
                    f"{error}; call optimizer.add_param_group(optimizer.param_groups.pop({index})), which fills them in"
                ) from None
        return indices

    def _rule_of(self, group: dict[str, Any]) -> UpdateRule:
        """Return the update rule for a new group. Optimizers with several rules override it."""
        return self._rule

    def _options_for_rule(self, group_index: int) -> dict[str, Any]:
        """Return the options that a copy of the group needs, beside its present ones, to take the group's rule."""
        return {}

    def _is_of_rule(self, group_index: int, options: dict[str, Any]) -> bool:
        """Whether the group keeps its update rule if it takes these options, which a saved group has."""
        return self._rule_of({**self._param_groups[group_index], **options}) is self._rules[group_index]

    def _named_params(self) -> dict[Tensor, str]:
        """Return all parameters, with their names for messages."""
        groups = enumerate(self._param_groups)
        return {p: self._name(index, position) for index, group in groups for position, p in enumerate(group["params"])}

    def _name(self, group_index: int, position: int) -> str:
        """Return a name for messages: the caller's, the one in the model, or the position in the group."""
        group = self._param_groups[group_index]
        if position < len(group.get("param_names", ())):  # one that was appended has none
            return str(group["param_names"][position])
        return self._model_names.get(group["params"][position]) or f"parameter {position} of group {group_index}"

    def _take_names(self, model: nn.Module) -> None:
        """Use the parameters' names in a model for messages, unless the caller gave names."""
        self._model_names = {param: name for name, param in model.named_parameters()}

    # ---- buckets ----------------------------------------------------------------------------------------------------

    @property
    def _buckets(self) -> list[Bucket]:
        return self._param_buckets.buckets

    @torch.inference_mode(False)
    def _place(self, group_indices: Iterable[int], with_grads: bool = False) -> None:
        """Move the trained parameters of these groups into buckets, and watch the frozen ones."""
        group_indices = list(group_indices)
        own_errors = TypeError, ValueError  # raised on all ranks after a comparison, or before this rank begins
        with self._group.lockstep(self._topology.model_groups, "the placement of parameters", own_errors):
            if self._is_ready and self._scaler.enabled:
                self._refuse_grads(group_indices)
            for bucket in self._param_buckets.add(self._param_groups, group_indices, with_grads):
                take_over(bucket.params)
                self._gradients.add(bucket)
            params = [param for index in group_indices for param in self._param_groups[index]["params"]]
            self._gradients.watch([param for param in params if not param.requires_grad], self._place_unfrozen)
            self._reserve()

    def _refuse_grads(self, group_indices: Iterable[int]) -> None:
        """Refuse gradients of new parameters, which may carry the loss scale. Collective if there are any new."""
        in_groups = (param for index in group_indices for param in self._param_groups[index]["params"])
        new = [param for param in in_groups if self._param_buckets.is_new(param)]
        if not new:
            return
        first = next((param for param in new if param.grad is not None), None)
        what = "the look for gradients of new parameters"
        if self._group.any_rank(first is not None, what):
            name = "one on another rank" if first is None else self._named_params()[first]
            raise have_grads_error(name)

    def _reserve(self) -> None:
        """Have the transport make room for all buckets. Collective."""
        sizes = []
        for bucket in self._buckets:
            dtype = self._options["grad_reduce_dtype"] or bucket.dtype
            num_sent_bytes = bucket.layout.numel * dtype.itemsize if self._gradients.reduces else 0
            sizes.append((num_sent_bytes, bucket.weight_shard.nbytes))
        with self._group.lockstep():  # without room for its buckets an optimizer cannot go on
            self._transport.reserve(sizes, len(self._param_buckets.params))

    def _place_unfrozen(self, purpose: str | None = None) -> None:
        """Give buckets to parameters that are no longer frozen. Collective if there are any.

        purpose: What the ranks collect gradients for next, if they do. An error is then told to those who wait.
        """
        try:
            self._place_found(self._find_unfrozen())
        except CollectiveError:  # the other ranks raise it too
            raise
        except Exception as error:
            if purpose is not None:
                self._tell_error(error, purpose)
            raise

    def _find_unfrozen(self) -> list[int]:
        """Return the indices of groups with parameters that are no longer frozen: the argument of `_place_found`.

        Groups and parameters that others appended to `param_groups` count as well.

        It may raise on one rank alone, so call it before any collective. If an exception has ended a backward, finish
        its round first: the other ranks have sent their part of it, and may have placed those parameters.
        """
        self._gradients.finish_broken_round()
        unfrozen = self._param_buckets.unplaced(self._param_groups, self.state, self._trains_by_grad())
        appended = self._take_appended()
        for index in sorted({*unfrozen} - {*appended}):
            params = self._param_groups[index]["params"]
            if any(map(self._param_buckets.is_new, params)):
                check_members(params)
                self._check_new(params)
        return sorted({*appended, *unfrozen}) if appended else unfrozen

    def _describe_unfrozen(self, found: list[int]) -> Unfrozen:
        """Return what the ranks compare before they place the parameters found."""
        return {
            (index, position): self._name(index, position)
            for index in found
            for position, param in enumerate(self._param_groups[index]["params"])
            if param.requires_grad and param not in self._param_buckets.locations
        }

    def _place_found(self, group_indices: list[int]) -> None:
        """Give buckets to the unfrozen parameters of these groups. Collective if there are any."""
        if group_indices:
            self._place(group_indices, self._trains_by_grad())

    def _trains_by_grad(self) -> bool:
        """Whether a frozen parameter with a `.grad` counts as trained. Only on one rank: others cannot see `.grad`."""
        return self._group.size == 1 and not self._topology.model_dims

    def _learn_arrival(self) -> None:
        """In the first step, move parameters to buckets in the order in which their gradients arrived."""
        if self._arrival_order.is_learning:
            layouts = self._param_buckets.plan_by_arrival(self._arrival_order.order())
            if layouts is not None:
                self._arrival_order.finish()
                self._move_to(layouts)

    @torch.inference_mode(False)
    def _move_to(self, layouts: list[BucketLayout], keeps_state: bool = True) -> None:
        if self._param_buckets.move_to(layouts, keeps_state):
            self._gradients.move_to(self._buckets)
            self._reserve()

    # ---- what all ranks do together ---------------------------------------------------------------------------------

    def _collect(self, purpose: str) -> GlobalGradStats:
        """Finish the reduction, and exchange the step's message. Call it under no_grad, with one of PURPOSES."""
        with profile_range("pyzero::collect"):
            found_inf = self.__dict__.get("found_inf")  # set by torch's GradScaler, which has checked `.grad`
            if found_inf is not None:
                found_inf = (found_inf != 0).to(torch.float32).reshape(1)
            return self._gradients.collect(found_inf, purpose)

    def _raise_on_all_ranks(self, error: Exception, purpose: str) -> NoReturn:
        """Raise this rank's error, and have the other ranks raise too: they are about to collect gradients.

        purpose: What they collect them for, one of grad_stats.PURPOSES.
        """
        try:
            with torch.no_grad():
                self._tell_error(error, purpose)
            raise error
        finally:
            del error  # its traceback holds this frame, and the callers'

    def _tell_error(self, error: Exception, purpose: str) -> None:
        """Make the ranks that collect gradients for `purpose` raise because of this rank's error."""
        try:
            self._gradients.tell_error(purpose)
        except Exception:  # the one that all others raise, or a consequence of this rank's error
            raise error from None
        finally:
            del error
