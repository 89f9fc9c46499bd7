"""Which bucket each parameter lies in. All ranks have the same plan, made again once gradients' order is known."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyzero.arguments.params import check_device, check_fsdp, check_not_gathered, check_trained, check_whole
from pyzero.comm.group import Group
from pyzero.comm.transport import Transport
from pyzero.ops.rounding import ceil_div
from pyzero.sharding import modules
from pyzero.sharding.agreement import Joining, ParamRecord, agree_on_params, tell_refused_params
from pyzero.sharding.aliases import refuse_aliases, tell_of_aliases
from pyzero.sharding.buckets import MASTER, STEP, Bucket, StateViews
from pyzero.sharding.fsdp import FsdpParamUse, find_fsdp_params
from pyzero.sharding.layout import BucketLayout, Key, ParamSpec, RunKey, plan
from pyzero.sharding.local_param import LocalParam, is_dtensor, is_same_part, local_of, user_param
from pyzero.sharding.topology import Topology
from pyzero.update_rule import Cut, UpdateRule

log = logging.getLogger("pyzero")


@dataclass(frozen=True)
class PlacementOptions:
    """How parameters are placed into buckets."""

    bucket_cap_bytes: int  # largest bytes of weights in a bucket
    reduces: bool  # the optimizer averages gradients over ranks
    init_sync: bool  # copy rank 0's weights, frozen parameters and buffers to all ranks
    cpu_offload: bool  # see Bucket


class Location(NamedTuple):
    """Where a parameter lies."""

    bucket: Bucket
    position: int  # in the bucket


class ParamBuckets:
    """The buckets of an optimizer, and the parameters in them. A parameter keeps its number in whatever bucket.

    Args:
        rules: The update rule of each parameter group. The optimizer appends to it.
        device: Where parameters must lie.
        group: The ranks that share the state.
        transport: Gives memory for weights.
        state: The optimizer's `state`. It shows this rank's part of each parameter's state.
        topology: Says which parameters count for the norm on this rank, and which are slices.
        options: How parameters are placed.
        logs: Whether this rank logs what is the same on all.
    """

    def __init__(
        self,
        rules: Sequence[UpdateRule],
        device: torch.device,
        group: Group,
        transport: Transport,
        state: MutableMapping[Tensor, Any],
        topology: Topology,
        options: PlacementOptions,
        logs: bool,
    ) -> None:
        self.buckets: list[Bucket] = []  # in launch order
        self.params: list[Tensor] = []  # by number
        self.specs: list[ParamSpec] = []  # by number
        self.locations: dict[Tensor, Location] = {}  # by the groups' parameter (not a LocalParam)
        # (num_params,) fp32: applied steps, bucket by bucket
        self.steps = torch.empty(0, dtype=torch.float32, device=device)
        self._group_of: dict[Tensor, int] = {}  # each parameter's index in param_groups
        self._fsdp_modules: list[weakref.ref[Any]] = []  # the fully_shard modules that gather these parameters
        self._known_ids: list[list[int]] | None = None  # ids of the groups' parameters when all were last looked at
        self._frozen: list[tuple[int, Tensor]] = []  # those in no bucket then, each with its group's index
        self._appended: list[int] = []  # the groups that had new parameters then
        self.num_groups = 0  # that have joined
        self._views: dict[Tensor, StateViews] = {}  # our entries of `state`
        self._views_ids: list[int] = []
        self.has_stepped = False
        self._rules = rules
        self._device = device
        self._group = group
        self._transport = transport
        self._state = state
        self._topology = topology
        self._options = options
        self._logs = logs
        self._joined_frozen: set[Tensor] = set()  # if weights are synced, they have rank 0's values
        self._module_names: dict[Tensor, list[str]] = {}  # each parameter's names in modules, with several ranks

    def unplaced(
        self, param_groups: Sequence[dict[str, Any]], state: MutableMapping[Tensor, Any], with_grads: bool
    ) -> list[int]:
        """Return the indices of groups with parameters that are new, or trained but in no bucket, frozen so far.

        state: The optimizer's present state.
        with_grads: Count a frozen parameter with a `.grad` as trained: torch's optimizers ignore requires_grad.

        Raises:
            ValueError: The caller took parameters out of their groups, or took out or replaced their state.
        """
        ids = [list(map(id, group["params"])) for group in param_groups]
        is_shown = state is self._state and list(map(id, state.values())) == self._views_ids
        if is_shown and ids == self._known_ids:
            return self._trained_groups(with_grads)
        frozen, num_seen = [], 0
        for index, group in enumerate(param_groups):
            for param in group["params"]:
                placed_in = self._group_of.get(param)
                num_seen += placed_in == index
                if placed_in is None:
                    frozen.append((index, param))
        num_again = num_seen - len(self.params) + len(frozen) - len({id(param) for _, param in frozen})
        if num_again > 0:
            raise ValueError(
                f"expected each parameter once in param_groups, got {num_again} that were appended though they were "
                f"there; take them out again"
            )
        if num_seen < len(self.params):
            raise ValueError(
                f"expected the parameters in the groups in which they were added, got {len(self.params) - num_seen} "
                f"taken out of param_groups or moved to another group; freeze those that are not to train "
                f"(requires_grad_(False)), set the hyper-parameters of their group, or build another optimizer"
            )
        if len(state) < len(self.params):
            raise ValueError(
                f"expected optimizer.state with {len(self.params)} entries, which show this rank's shards, got "
                f"{len(state)}; to start it anew, zero its tensors in place (state[p][name].zero_()) or build "
                f"another optimizer"
            )
        if any(state.get(param) is not views for param, views in self._views.items()):
            raise ValueError(
                "expected optimizer.state with the entries that show this rank's shards, got others assigned; write "
                "into them (optimizer.state[p].update(values)), or use optimizer.set_full_state(p, values)"
            )
        self._known_ids, self._frozen = ids, frozen
        self._appended = [index for index, param in frozen if self.is_new(param)]
        return self._trained_groups(with_grads)

    def _trained_groups(self, with_grads: bool) -> list[int]:
        """Return the indices of groups with a parameter that is new, or in no bucket and trained now."""
        return sorted({*self._appended, *(index for index, param in self._frozen if _is_trained(param, with_grads))})

    def is_new(self, param: Tensor) -> bool:
        """Whether a parameter has not joined yet, trained or frozen."""
        return param not in self._group_of and param not in self._joined_frozen

    # ---- weights and masters ----------------------------------------------------------------------------------------

    def follow_weights(self, every: bool = False, keep_masters: Collection[Tensor] = ()) -> None:
        """Make masters follow weights that others have written. If one cannot, raise before any is changed.

        keep_masters: See Bucket.refresh_masters.
        """
        written = [bucket.flat_params.foreign_writes(every) for bucket in self.buckets]
        num_written = sum(map(len, written))
        if num_written:
            with torch.no_grad():
                for bucket, positions in zip(self.buckets, written, strict=True):
                    self._tell_of_shared_memory([bucket.params[position] for position in positions])
                    bucket.refresh_masters(positions, keep_masters)
            if self._logs:
                log.info("%d parameters were written outside the optimizer; their masters follow", num_written)

    def _tell_of_shared_memory(self, params: Iterable[Tensor]) -> None:
        """Warn before weights move out of share_memory()'s memory, because other processes see no later step.

        Not with several ranks: there mp.spawn has shared the model that it was given.
        """
        if self._group.size == 1 and self._device.type == "cpu" and any(param.data.is_shared() for param in params):
            log.warning(
                "weights that share_memory() has put into shared memory are moved out of it, and other processes see "
                "no later step; let them read a copy of the model, which you write after each step: "
                "shared.load_state_dict(model.state_dict())"
            )

    def finish_weight_write(self, used: Sequence[bool] | None = None) -> None:
        """Note that the optimizer has written weights. In two passes, because views share a version counter."""
        some = None if used is None or all(used) else used
        for bucket in self.buckets:
            positions = None if some is None else [at for at, number in enumerate(bucket.numbers) if some[number]]
            bucket.flat_params.bump_versions(positions)
        for bucket in self.buckets:
            bucket.flat_params.note_all_written()
        self._reshard()

    def _reshard(self) -> None:
        """Drop outdated whole weights of fully_shard, which a forward without a backward leaves behind."""
        for ref in self._fsdp_modules:
            module = ref()
            if module is not None:
                module.reshard()

    def publish_masters(self) -> None:
        """Write the masters to the weights of all ranks. Collective."""
        gathers = []
        for bucket in self.buckets:
            if not bucket.is_master:
                bucket.weight_shard.copy_(bucket.master)
            gathers.append(self._group.all_gather_into(bucket.flat, bucket.weight_shard))
        for gather in gathers:
            gather.wait()
        self.finish_weight_write()

    # ---- placement --------------------------------------------------------------------------------------------------

    def rule_of(self, param: Tensor) -> UpdateRule:
        """Return a parameter's update rule."""
        return self._rules[self._group_of[param]]

    def shapes_of(self, param: Tensor) -> dict[str, torch.Size]:
        """Return the whole shapes of a parameter's master and of its rule's slots."""
        shapes = {MASTER: param.shape}
        for slot in self.rule_of(param).slots:
            per_value = slot.elements_per_value
            shapes[slot.name] = param.shape if per_value == 1 else torch.Size([ceil_div(param.numel(), per_value)])
        return shapes

    def add(
        self, param_groups: Sequence[dict[str, Any]], indices: Iterable[int], with_grads: bool = False
    ) -> list[Bucket]:
        """Have these groups join: move their trained parameters into new buckets. Collective.

        with_grads: See `unplaced`.

        Raises:
            ValueError: Ranks have different parameters, or one lies on another device, or shares memory with another
                tensor of its model.
        """
        first = len(self.params)
        everything = [param for group in param_groups for param in group["params"]]
        fsdp = find_fsdp_params() if any(map(is_dtensor, everything)) else {}
        try:
            params, specs, frozen = self._find_new(param_groups, indices, fsdp, with_grads)
            check_not_gathered(params, (use.record for use in fsdp.values()))
            for param, spec in zip(params, specs, strict=True):
                if spec.key.cut is Cut.WHOLE:
                    check_whole(param, spec.number, spec.key.rule, self._topology.is_slice(param))
            refuse_aliases(params, warns=self._logs)
            if self._options.reduces:
                has_frozen = any(param in fsdp and not param.requires_grad for param in everything)
                check_fsdp([*self.params, *params], self._group.members(), has_frozen)
        except (TypeError, ValueError) as error:
            if not (self.params or self._joined_frozen):  # later the others may do something else
                tell_refused_params(self._group, error)
            raise
        ours = {user_param(param): position for position, param in enumerate(params)}
        roots = self._find_roots({*ours, *frozen})
        order = self._agree(param_groups, params, specs, frozen, modules.order_of(ours, [] if first else roots))
        if self._options.init_sync and self._group.size > 1:
            self._sync_others(roots, frozen, {*ours})
        self._joined_frozen.update(frozen)
        if not params:
            self._known_ids, self.num_groups = None, len(param_groups)
            return []
        self._tell_of_shared_memory(params)
        arrival = None if order is None else [first + position for position in reversed(order)]
        layouts = plan(specs, self._options.bucket_cap_bytes, self._group.size, arrival)
        params, specs = [*self.params, *params], [*self.specs, *specs]
        made = [self._make(layout, len(self.buckets) + index, params, specs) for index, layout in enumerate(layouts)]
        for bucket in made:
            if self._options.init_sync:
                self._group.broadcast(bucket.flat)
            bucket.masters_from_weights()
        steps = self._new_steps([*self.buckets, *made])
        # Nothing is allocated after this. If memory ran out before, the next call finds everything unchanged.
        self.params, self.specs = params, specs
        owners = dict.fromkeys(fsdp[user_param(param)].owner for param in params[first:] if user_param(param) in fsdp)
        self._fsdp_modules += map(weakref.ref, owners)
        self._known_ids, self.num_groups = None, len(param_groups)
        self._group_of.update({param: spec.run.group_index for param, spec in zip(ours, specs[first:], strict=True)})
        self.buckets += made
        self._join_steps(steps)
        return made

    def _find_new(
        self,
        param_groups: Sequence[dict[str, Any]],
        indices: Iterable[int],
        fsdp: Mapping[Tensor, FsdpParamUse],
        with_grads: bool,
    ) -> tuple[list[Tensor], list[ParamSpec], dict[Tensor, int]]:
        """Return trained parameters in no bucket, their specs, and new frozen ones, with their groups."""
        params: list[Tensor] = []
        specs: list[ParamSpec] = []
        frozen: dict[Tensor, int] = {}
        in_groups = [(index, param) for index in indices for param in param_groups[index]["params"]]
        for group_index, param in in_groups:
            if param in self._group_of:
                continue
            if not _is_trained(param, with_grads):
                if param not in self._joined_frozen:
                    frozen[param] = group_index
                continue
            number = len(self.params) + len(params)
            check_device(param, self._device)
            check_trained(param, f"parameter {number}")
            rule = self._rules[group_index]
            key = Key(str(param.dtype), str(param.device), rule.name, rule.cut)
            run = RunKey(group_index, self._topology.in_norm(param))
            own = LocalParam.of(param, fsdp.get(param)) if is_dtensor(param) else param
            padded_numel = own.padded_numel if isinstance(own, LocalParam) else 0
            specs.append(ParamSpec(number, own.numel(), own.element_size(), key, run, padded_numel))
            params.append(own)
        return params, specs, frozen

    def _find_roots(self, joining: set[Tensor]) -> list[nn.Module]:
        """Return the modules of joining parameters, and learn their names. Empty on one rank, or if all are known."""
        if self._group.size == 1 or (self.params and joining <= self._module_names.keys()):
            return []
        roots = modules.find_roots(joining)
        names = modules.names_of(roots)
        self._module_names.update({param: names.get(param, []) for param in joining})
        return roots

    def _agree(
        self,
        param_groups: Sequence[dict[str, Any]],
        params: list[Tensor],
        specs: list[ParamSpec],
        frozen: Mapping[Tensor, int],
        order: list[int] | None,
    ) -> list[int] | None:
        """Raise if ranks have different parameters. Return rank 0's `order`."""
        if self._group.size == 1:
            return order
        named = (zip(group["params"], group.get("param_names", ()), strict=False) for group in param_groups)
        given = {param: [name] for group in named for param, name in group}

        def record(local: Tensor, param: Tensor, group: int, rule: str | None) -> ParamRecord:
            return ParamRecord.of(local, group, rule, given.get(param, []), self._module_names[param])

        trained = [record(p, user_param(p), s.run.group_index, s.key.rule) for p, s in zip(params, specs, strict=True)]
        synced = frozen if self._options.init_sync else {}
        untrained = [record(local_of(param), param, group, None) for param, group in synced.items()]
        return agree_on_params(self._group, Joining(trained, untrained, order))

    def _sync_others(self, roots: list[nn.Module], frozen: Collection[Tensor], ours: set[Tensor]) -> None:
        """Copy rank 0's frozen parameters, and buffers of the modules that hold the optimizer's parameters.

        Each is copied once: later, a graph may have saved it for backward. Leave alone modules that only some ranks
        have, or that one has twice, sparse and quantized tensors, and DTensors of other parts.
        """
        is_first = not self.params and not self._joined_frozen  # the same on all ranks; `roots` may differ
        if not (is_first or frozen):
            return
        ranks = self._group.members()
        found: dict[tuple[Any, ...], list[Tensor]] = {("group", str(i)): [param] for i, param in enumerate(frozen)}
        for root in roots if is_first else ():
            for name, tensor in modules.named_tensors(root).items():
                if tensor not in frozen and tensor not in ours and is_same_part(tensor, ranks):
                    key = (type(root).__qualname__, name, tuple(tensor.shape), str(tensor.dtype))
                    found.setdefault(key, []).append(tensor)
        unique = [key for key, tensors in found.items() if len(tensors) == 1 and _can_be_sent(tensors[0])]
        rows = self._group.gather_objects(unique)
        common = set.intersection(*(set(row) for row in rows))
        self._group.broadcast_all([local_of(found[key][0].detach()) for key in rows[0] if key in common])

    def _make(
        self, layout: BucketLayout, index: int, every_param: Sequence[Tensor], every_spec: Sequence[ParamSpec]
    ) -> Bucket:
        """Make a bucket, and move its parameters into it. every_param, every_spec: By number."""
        numbers = [slot.number for slot in layout.param_slots]
        params = [every_param[number] for number in numbers]
        rule = self._rules[every_spec[numbers[0]].run.group_index]
        weights = self._transport.weights(layout.numel, params[0].dtype, params[0].device)
        return Bucket(layout, params, numbers, index, self._group.rank, rule, weights, self._options.cpu_offload)

    def _new_steps(self, buckets: Sequence[Bucket]) -> Tensor:
        """Return room for the step counts of all these buckets: (num_params,) fp32."""
        return torch.empty(sum(len(b.numbers) for b in buckets), dtype=torch.float32, device=buckets[0].device)

    def _join_steps(self, steps: Tensor) -> None:
        """Put the step counts of all buckets into `steps`, because a step counts in one launch, and show all state."""
        self.steps = steps
        counts = [len(bucket.numbers) for bucket in self.buckets]
        for bucket, own in zip(self.buckets, steps.split(counts), strict=True):
            bucket.keep_steps_in(own)
            self._show(bucket)
        self._views = {param: self._state[param] for param in self.locations}
        self._views_ids = list(map(id, self._state.values()))

    def _show(self, bucket: Bucket) -> None:
        """Make a bucket's parameters be found in it, and show their state."""
        for position, param in enumerate(bucket.params):
            self.locations[user_param(param)] = Location(bucket, position)
            self._state[user_param(param)] = bucket.state_views(position)

    def plan_by_arrival(self, arrival: Sequence[int]) -> list[BucketLayout] | None:
        """Plan buckets in the order in which rank 0's gradients came. None if none came. Collective.

        Args:
            arrival: Numbers of the parameters, in this rank's order.
        """
        seen = self._group.first_ranks(arrival, len(self.params), "the broadcast of bucket order")
        if not seen:
            return None
        came = set(seen)
        rest = [number for bucket in self.buckets for number in bucket.numbers if number not in came]
        return plan(self.specs, self._options.bucket_cap_bytes, self._group.size, [*seen, *rest])

    def move_to(self, layouts: list[BucketLayout], keeps_state: bool = True) -> bool:
        """Move weights and state into other buckets of the same parameters. Return whether any moved. Collective.

        New buckets are made one by one, and old ones freed as soon as they are empty.

        keeps_state: False if the caller writes all state afterwards.
        """
        if [layout.param_slots for layout in layouts] == [bucket.layout.param_slots for bucket in self.buckets]:
            return False
        if self._logs:
            tell_of_aliases(self.params)
        is_fresh = keeps_state and self._is_fresh()
        old, self.buckets, self._views = self.buckets, [], {}
        moved: set[int] = set()
        for index, layout in enumerate(layouts):
            bucket = self._make(layout, index, self.params, self.specs)
            bucket.masters_from_weights()
            self._show(bucket)  # instead of the old bucket's state, so that its memory can be freed
            self.buckets.append(bucket)
            moved.update(bucket.numbers)
            empty = [other for other in old if moved.issuperset(other.numbers)]
            old = [other for other in old if other not in empty]
            for other in empty:
                if keeps_state:
                    self._move_state(other, is_fresh)
                other.release()
        self._join_steps(self._new_steps(self.buckets))
        return True

    def _is_fresh(self) -> bool:
        """Whether nobody can have written state yet, so masters equal weights and slots are zero. Collective.

        It does not look at the values, because the host would wait for the device.
        """
        was_read = any(views.was_read for views in self._views.values())
        written = self.has_stepped or was_read or any(bucket.state_was_written() for bucket in self.buckets)
        return not self._group.any_rank(written, "the agreement on state that was written")

    def _move_state(self, old: Bucket, is_fresh: bool) -> None:
        for name in () if is_fresh else old.state_names:
            flat, per_value = self._group.gather_shards(old.to_send(name)), old.elements_per_value(name)
            for param, slot in zip(old.params, old.layout.param_slots, strict=True):
                bucket, position = self.locations[user_param(param)]
                begin, num_values = slot.offset // per_value, ceil_div(slot.numel, per_value)
                bucket.write_state(position, {name: flat[begin : begin + num_values]})
        for param, steps in zip(old.params, old.steps, strict=True):
            bucket, position = self.locations[user_param(param)]
            bucket.write_state(position, {STEP: steps})


def _is_trained(param: Tensor, with_grads: bool) -> bool:
    return param.requires_grad or (with_grads and param.grad is not None)


def _can_be_sent(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized
