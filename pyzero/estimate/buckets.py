"""Bytes of an optimizer of stage 1 or 2: its shards, and the gradients of a round of buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyzero.arguments.options import check_bucket_cap
from pyzero.estimate.figures import Estimate
from pyzero.gradients.reduced.accumulation import elements_compared_at_once
from pyzero.memory import pooled_bytes
from pyzero.sharding.layout import GRANULE, BucketLayout, Key, ParamSpec, cap_bytes, plan
from pyzero.update_rule import StateSlot, UpdateRule

FP32 = 4  # bytes


class Shape(NamedTuple):
    """What is counted of a parameter."""

    numel: int
    element_bytes: int
    is_trained: bool


@dataclass(frozen=True)
class Setup:
    """How an optimizer is built."""

    num_ranks: int
    stage: int  # 1 or 2
    bucket_cap_mb: float | None
    rule: UpdateRule
    on_gpu: bool
    reduces: bool = True
    cpu_offload: bool = False
    transport: str = "auto"
    accumulates: bool = False


@dataclass(frozen=True)
class _Plan:
    """The facts that decide how long a gradient lives."""

    layouts: Sequence[BucketLayout]  # in launch order
    element_bytes: dict[Key, int]
    stage: int
    reduces: bool
    reads_lists: bool  # the rule
    shares_memory: bool
    accumulates: bool
    on_gpu: bool

    @property
    def defers(self) -> bool:
        """Whether all gradients wait on their rank until they are reduced, not only those of one bucket."""
        return self.stage == 1 or self.accumulates

    def shared(self) -> int:
        """Bytes of room for two buckets, or for two shards if no gradients are sent."""
        sent = [self.weights(layout) // (1 if self.reduces else layout.num_ranks) for layout in self.layouts]
        return 2 * max(sent, default=0) if self.shares_memory else 0

    def kept(self) -> int:
        """Bytes of gradient shards whose pages stay between steps."""
        if not self.reduces or self.on_gpu:
            return 0
        return sum(pooled_bytes(layout.shard_numel, torch.float32, torch.device("cpu")) for layout in self.layouts)

    def weights(self, layout: BucketLayout) -> int:
        return layout.numel * self.element_bytes[layout.key]

    def grads(self, layout: BucketLayout) -> int:
        return sum(slot.numel for slot in layout.param_slots) * self.element_bytes[layout.key]

    def arriving(self) -> int:
        """Bytes of the largest gradient, which exists beside its sum when it arrives."""
        sizes = [slot.numel * self.element_bytes[layout.key] for layout in self.layouts for slot in layout.param_slots]
        return max(sizes, default=0) if self.accumulates else 0

    def comparing(self, layout: BucketLayout) -> int:
        """Bytes needed to compare a 16-bit gradient with its fp32 sum, before the sum is sent."""
        if not self.accumulates or self.element_bytes[layout.key] == FP32:
            return 0
        most = max(slot.numel for slot in layout.param_slots)
        return min(most, elements_compared_at_once(not self.on_gpu)) * (7 if self.on_gpu else 2)

    def local_sums(self, layout: BucketLayout) -> int:
        """Bytes of gradients, and of the fp32 sums of 16-bit gradients if those of several backwards wait."""
        size = self.element_bytes[layout.key]
        behind = FP32 if self.accumulates and size < FP32 else 0
        return self.grads(layout) // size * (size + behind)


def of_shapes(shapes: Sequence[Shape], setup: Setup) -> Estimate:
    """Estimate an optimizer of parameters of these shapes.

    Raises:
        ValueError: The number of ranks, the stage or the bucket size is out of range.
    """
    num_ranks, stage, rule = setup.num_ranks, setup.stage, setup.rule
    if num_ranks < 1 or stage not in (1, 2):
        raise ValueError(f"expected num_ranks from 1 and stage 1 to 3, got {num_ranks} and {stage}; correct them")
    check_bucket_cap(setup.bucket_cap_mb)
    keys = {size: Key(str(size), "", cut=rule.cut) for size in (2, 4)}
    trained = [shape for shape in shapes if shape.is_trained]
    specs = [ParamSpec(index, numel, size, keys[size]) for index, (numel, size, _) in enumerate(trained)]
    layouts = plan(specs, cap_bytes(setup.bucket_cap_mb, num_ranks, setup.on_gpu), num_ranks)
    sizes = {key: size for size, key in keys.items()}
    shares_memory = num_ranks > 1 and not setup.on_gpu and setup.transport in ("auto", "peer")
    reduces = setup.reduces and num_ranks > 1
    chosen = _Plan(layouts, sizes, stage, reduces, rule.reads_lists, shares_memory, setup.accumulates, setup.on_gpu)
    frozen = sum(shape.numel * shape.element_bytes for shape in shapes if not shape.is_trained)
    held, worst = _gradients(chosen)
    sharded = sum(_sharded(layout, sizes[layout.key], rule.slots) for layout in layouts)
    return Estimate(
        weights=frozen + sum(chosen.weights(layout) for layout in layouts),
        state=(0 if setup.cpu_offload else sharded) + sum(map(_counters, layouts)),
        gradients=held,
        shared=chosen.shared(),
        buckets=max(worst - held, 0),
        num_params=sum(shape.numel for shape in shapes),
        host=sharded if setup.cpu_offload else 0,
        kept=chosen.kept(),
    )


def _sharded(layout: BucketLayout, element_bytes: int, slots: Sequence[StateSlot]) -> int:
    """Return the bytes of masters and the rule's slots."""
    masters = 0 if element_bytes == FP32 else FP32 * layout.shard_numel
    values = sum(slot.dtype.itemsize * layout.shard_numel // slot.elements_per_value for slot in slots)
    return masters + values


def _counters(layout: BucketLayout) -> int:
    """Return the bytes of the map from granules to parameters, and of step counts."""
    per_granule, per_param = 4, 4
    return per_granule * (layout.shard_numel // GRANULE) + per_param * len(layout.param_slots)


def _gradients(chosen: _Plan) -> tuple[int, int]:
    """Return the bytes (held after backward, the most at any moment), from a walk through a round of buckets."""
    layouts = chosen.layouts
    if not chosen.reduces:  # for a rule that reads no lists, gradients are packed, one run of a shard at a time
        runs = [(layout.key, run) for layout in layouts for run in layout.shard_runs(0)]
        all_grads = sum(chosen.grads(layout) for layout in layouts)
        packed = [(run.high - run.low) * chosen.element_bytes[key] for key, run in runs]
        return all_grads, all_grads + max(chosen.arriving(), 0 if chosen.reads_lists else max(packed, default=0))

    shards = [FP32 * layout.shard_numel for layout in layouts]
    # Sent and received. Shared memory needs nothing in addition.
    moving = [0 if chosen.shares_memory else 2 * chosen.weights(layout) for layout in layouts]
    grads = [chosen.local_sums(layout) for layout in layouts]
    worst = sum(shards) + (moving[-1] if moving else 0)
    for index in range(len(layouts)):
        # All gradients wait for the round, or in stage 2 those of one bucket. Each bucket frees its own.
        waiting = sum(grads[index + 1 :]) if chosen.defers else 0
        in_front = moving[index - 1] if index else 0  # the bucket before is still being sent
        sending = moving[index] // 2 + chosen.comparing(layouts[index])
        packing = waiting + grads[index] + sending + in_front + sum(shards[: max(index - 1, 0)])
        worst = max(worst, packing, waiting + moving[index] + in_front + sum(shards[:index]))
    if chosen.defers:
        worst = max(worst, sum(grads) + chosen.arriving())
    return sum(grads) if chosen.stage == 1 else sum(shards), worst
