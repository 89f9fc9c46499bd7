"""Buckets: the flat memory of parameters, masters and an update rule's state."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyzero import memory
from pyzero.comm.transport import FlatWeights
from pyzero.ops.rounding import ceil_div
from pyzero.sharding.flat_params import FlatParams, flatten
from pyzero.sharding.layout import GRANULE, BucketLayout
from pyzero.sharding.local_param import user_param
from pyzero.update_rule import Part, RunShard, UpdateRule

MASTER, STEP = "master", "step"  # state that every parameter has besides the rule's slots


class StateViews(dict[str, Tensor]):
    """One parameter's state in `optimizer.state`: views of the shards. Assignment writes into the views.

    Attributes:
        was_read: Whether anybody has read more than the step count, and may write it unseen by version counters.
    """

    was_read = False

    def __getitem__(self, name: str) -> Tensor:
        self.was_read |= name != STEP
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """See dict."""
        return self[name] if name in self else default

    def __iter__(self) -> Iterator[str]:
        """See dict. Overridden so that dict(views) and {**views} read by `__getitem__` too."""
        return super().__iter__()

    def values(self) -> Any:
        """See dict."""
        self.was_read = True
        return super().values()

    def items(self) -> Any:
        """See dict."""
        self.was_read = True
        return super().items()

    def copy(self) -> dict[str, Tensor]:
        """Return a plain dict with the same tensors."""
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __setitem__(self, name: str, value: Any) -> None:
        own = self.get(name)
        if own is None:
            raise ValueError(
                f"expected one of {', '.join(self)}, in optimizer.state, got {name}; keep what is yours elsewhere"
            )
        if own is value:  # state[p]["step"] += 1
            return
        values = torch.as_tensor(value)
        if own.shape != values.shape:
            raise ValueError(
                f"expected {name} of shape {tuple(own.shape)}, this rank's, in optimizer.state, got it of shape "
                f"{tuple(values.shape)}; write whole values with optimizer.set_full_state(p, {{name: value}})"
            )
        with torch.no_grad():
            own.copy_(values)

    def update(self, *others: Any, **values: Any) -> None:
        """See dict. Assigns each value."""
        for name, value in dict(*others, **values).items():
            self[name] = value

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "expected optimizer.state to keep its entries, which show this rank's shards; to start anew zero them in "
            "place (state[p][name].zero_()) or build another optimizer"
        )

    def __reduce__(self) -> Any:
        """Copy and pickle as a plain dict."""
        return dict, (dict(self),)

    __delitem__ = clear = pop = popitem = setdefault = __ior__ = _refuse


class Bucket:
    """The memory of one bucket on this rank.

    Args:
        layout: Where parameters lie, and how the bucket is cut into shards.
        params: The parameters, in the order of layout.param_slots.
        numbers: Their numbers among the optimizer's, which do not depend on the bucket.
        index: The bucket's position among the optimizer's.
        rank: This rank in the group that shares the bucket.
        rule: The update rule.
        weights: Memory for the weights of all ranks, zeros.
        cpu_offload: Keep masters and state of a GPU in pinned host memory.
    """

    def __init__(
        self,
        layout: BucketLayout,
        params: list[Tensor],
        numbers: list[int],
        index: int,
        rank: int,
        rule: UpdateRule,
        weights: FlatWeights,
        cpu_offload: bool = False,
    ) -> None:
        self.layout = layout
        self.index = index
        self.rule = rule
        self.params = params
        self.numbers = numbers
        self.rank = rank
        self.dtype, self.device = params[0].dtype, params[0].device
        self.is_master = self.dtype == torch.float32  # fp32 weights are their own masters
        self._on_host = cpu_offload and self.device.type == "cuda"
        self._weights = weights  # keeps the memory alive
        self.flat = weights.flat  # (layout.numel,) the weights of all ranks
        self.flat_params = FlatParams(params, layout.param_slots, weights.flat)
        self.strides = self.flat_params.strides
        begin, end = layout.shard_bounds(rank)
        self.weight_shard = self.flat[begin:end]  # (shard_numel,) this rank's part of the weights
        self.peer_shards = [there[begin:end] for there in weights.peers]  # the same in other ranks' memory, or none

        # (shard_numel,) fp32
        self.master = self.weight_shard if self.is_master else self._zeros(layout.shard_numel, torch.float32)
        self._exported_version = 0  # version of the masters when a state dict last showed them
        self.state_slots = {slot.name: slot for slot in rule.slots}
        self.state = {  # by slot: (shard_numel,), or one value per granule
            slot.name: self._zeros(layout.shard_numel // slot.elements_per_value, slot.dtype) for slot in rule.slots
        }
        # (num_params,) applied steps of each parameter
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        # (num_params,) fp64, `numbers` for kernels
        self.numbers_on_device = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.segment_ids = self._segment_ids(rank)  # (shard_numel / GRANULE,) int32, position of the parameter
        self.runs = layout.shard_runs(rank)
        self._run_shards: dict[tuple[int, int], list[RunShard]] = {}

    def keep_steps_in(self, steps: Tensor) -> None:
        """Move the step counts to (num_params,) fp32 `steps`, a slice of the tensor for all buckets."""
        self.steps = steps.copy_(self.steps)
        self._run_shards.clear()

    def release(self) -> None:
        """Free all memory, after the parameters and their state have moved to other buckets."""
        del self._weights, self.flat, self.flat_params, self.weight_shard, self.peer_shards
        del self.master, self.state, self.steps, self.segment_ids
        self._run_shards.clear()

    def _zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return (memory.pinned if self._on_host else memory.zeros)(numel, dtype, self.device)

    # ---- masters ---------------------------------------------------------------------------------------------------

    def masters_from_weights(self) -> None:
        """Fill the masters for the first time."""
        if not self.is_master:
            self.master.copy_(self.weight_shard)
        self._first_versions = self._state_versions()

    def _state_versions(self) -> list[int]:
        return [tensor._version for tensor in self.state_tensors()]

    def state_tensors(self) -> list[Tensor]:
        """Return this rank's shards of masters and slots; without masters if fp32 weights are the masters."""
        own = [] if self.is_master else [self.master]
        return [*own, *self.state.values()]

    def state_was_written(self) -> bool:
        """Whether anybody but an op has written masters or state since `masters_from_weights`."""
        return self._state_versions() != self._first_versions

    def refresh_masters(self, positions: Sequence[int], keep_masters: Collection[Tensor] = ()) -> None:
        """Make flat memory and masters follow these parameters, which `FlatParams.foreign_writes` returned.

        keep_masters: Parameters whose masters do not follow, because they are about to be loaded.
        """
        for position in positions:
            self.flat_params.copy_into_flat(position)
            if not self.is_master and user_param(self.params[position]) not in keep_masters:
                in_shard, _ = self.shard_part(position)
                master, weights = self.master[in_shard], self.weight_shard[in_shard]
                # A master that rounds to the weight stays, because weights may have been loaded after their masters.
                master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.float()))

    def note_masters_exported(self) -> None:
        """Note that a state dict shows the masters, so that a checkpoint may be read into them."""
        self._exported_version = self.master._version

    def masters_were_written(self) -> bool:
        """Whether anybody but an op has written the masters since they were exported."""
        return self.master._version != self._exported_version

    # ---- shards and whole tensors ---------------------------------------------------------------------------------

    def _segment_ids(self, rank: int) -> Tensor:
        runs = self.layout.granule_owners(rank)
        positions = torch.tensor([position for position, _ in runs], dtype=torch.int32, device="cpu")
        counts = torch.tensor([count for _, count in runs], dtype=torch.int64, device="cpu")
        return positions.repeat_interleave(counts).to(self.device)

    def shard_part(self, position: int) -> tuple[slice, slice]:
        """Return this rank's part of one parameter: as a slice of the shard, and of the flat parameter."""
        slot = self.layout.param_slots[position]
        low, high = self.layout.overlap(slot, self.rank)
        at = slot.offset - self.rank * self.layout.shard_numel if high > low else -low
        return slice(at + low, at + high), slice(low, high)

    def shard_slot(self, position: int) -> slice:
        """Return this rank's part of one parameter and of the gap after it, as a slice of the shard."""
        begin, end = self.layout.shard_bounds(self.rank)
        low = min(max(self.layout.param_slots[position].offset, begin), end)
        return slice(low - begin, max(min(self.layout.slot_end(position), end), low) - begin)

    def shaped(self, flat: Tensor, position: int) -> Tensor:
        """View (numel,) elements in a parameter's memory order as a tensor of its shape and strides."""
        return flat.as_strided(self.flat_params.shapes[position], self.strides[position])

    def flat_of(self, tensor: Tensor, position: int) -> Tensor:
        """Return the elements of a tensor of a parameter's shape, (numel,), in the parameter's memory order."""
        return flatten(tensor, self.strides[position])

    # ---- state ----------------------------------------------------------------------------------------------------

    def run_shards(self, low: int, high: int) -> list[RunShard]:
        """Return views of elements [low, high) of this rank's shard, run by run."""
        found = self._run_shards.get((low, high))
        if found is None:
            cut = [(run.key.group_index, max(run.low, low), min(run.high, high)) for run in self.runs]
            found = [self._run_shard(*run) for run in cut if run[1] < run[2]]
            self._run_shards[low, high] = found
        return found

    def _run_shard(self, group_index: int, low: int, high: int) -> RunShard:
        return RunShard(
            group_index,
            low,
            high,
            self.master[low:high],
            None if self.is_master else self.weight_shard[low:high],
            [there[low:high] for there in self.peer_shards],
            {name: self.state[name][self._values(name, low, high)] for name in self.state},
            self.steps,
            self.segment_ids[low // GRANULE : ceil_div(high, GRANULE)],
            tuple(self._parts(low, high)),
        )

    def _parts(self, low: int, high: int) -> Iterable[Part]:
        for position in range(len(self.params)):
            in_shard, _ = self.shard_part(position)
            if in_shard.start < in_shard.stop and low <= in_shard.start < high:
                begin, end = in_shard.start - low, in_shard.stop - low
                yield Part(position, begin, end, self.flat_params.shapes[position], self.strides[position])

    def _values(self, name: str, low: int, high: int) -> slice:
        """Return which values of a slot belong to elements [low, high). low must be the start of a granule."""
        per_value = self.elements_per_value(name)
        first = low // per_value
        return slice(first, first + ceil_div(high - low, per_value))

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of state in shards: the master and the rule's slots."""
        return (MASTER, *self.state_slots)

    def sharded(self, name: str) -> Tensor:
        """Return this rank's shard of the masters, or of a slot."""
        return self.master if name == MASTER else self.state[name]

    def to_send(self, name: str) -> Tensor:
        """Return `sharded(name)` in device memory, because collective libraries may not read pinned host memory."""
        return self.sharded(name).clone() if self._on_host else self.sharded(name)

    def elements_per_value(self, name: str) -> int:
        """Return how many elements share one value of the masters, or of a slot."""
        return 1 if name == MASTER else self.state_slots[name].elements_per_value

    def is_flat(self, name: str) -> bool:
        """Whether whole values of that name are flat instead of in the parameter's shape."""
        return self.elements_per_value(name) > 1

    def whole_shape(self, name: str, position: int) -> torch.Size:
        """Return the shape of one parameter's whole master, or of its whole values of a slot."""
        shape = self.flat_params.shapes[position]
        return torch.Size([ceil_div(shape.numel(), self.elements_per_value(name))]) if self.is_flat(name) else shape

    def whole_stride(self, name: str, position: int) -> tuple[int, ...]:
        """Return the strides for `whole_shape`."""
        return (1,) if self.is_flat(name) else tuple(self.strides[position])

    def whole_of(self, name: str, flat: Tensor, position: int) -> Tensor:
        """Return one parameter's values on the CPU. flat: Masters, or a slot's values, of the whole bucket."""
        slot, per_value = self.layout.param_slots[position], self.elements_per_value(name)
        begin = slot.offset // per_value
        own = flat[begin : begin + ceil_div(slot.numel, per_value)].to("cpu", copy=True)
        return own if self.is_flat(name) else self.shaped(own, position)

    def shard_values(self, name: str, position: int) -> tuple[slice, slice]:
        """Return `shard_part` in values of a slot instead of elements."""
        in_shard, in_param = self.shard_part(position)
        return self._values(name, in_shard.start, in_shard.stop), self._values(name, in_param.start, in_param.stop)

    def state_views(self, position: int) -> StateViews:
        """Return views of one parameter's state: in its shape on one rank, with several ranks this rank's flat part."""
        views = {STEP: self.steps[position]}
        for name in (*self.state_slots, MASTER):
            in_shard, _ = self.shard_values(name, position)
            flat = self.sharded(name)[in_shard]
            views[name] = self.shaped(flat, position) if self.layout.num_ranks == 1 and not self.is_flat(name) else flat
        return StateViews(views)

    def write_state(self, position: int, state: dict[str, Tensor]) -> None:
        """Write one parameter's state. state: The step count, and whole flat values in the parameter's memory order."""
        for name, value in state.items():
            if name == STEP:
                self.steps[position] = value
            else:
                in_shard, in_param = self.shard_values(name, position)
                self.sharded(name)[in_shard].copy_(value[in_param])
