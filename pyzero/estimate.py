"""`python -m pyzero estimate` and `estimate(model)`: bytes per rank, before anything is built.

They count a rank's parameters, their gradients and FusedZeroAdam with its default transport; CPU ranks are assumed to
share one host. Activations, the allocator's slack and the rest of the process come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyzero.arguments.options import check_bucket_cap
from pyzero.gradients.reduced.accumulation import elements_compared_at_once
from pyzero.ops.rounding import ceil_div
from pyzero.optimizers.adam import AdamRule
from pyzero.sharding.blocks import blocks_of
from pyzero.sharding.layout import GRANULE, BucketLayout, Key, ParamSpec, cap_bytes, plan
from pyzero.update_rule import StateSlot, UpdateRule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MEBIBYTE = 2**20
_FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes on each rank."""

    weights: int  # in the dtype of the model
    state: int  # masters (fp32 weights have no extra ones), moments, step counts
    gradients: int  # held from the end of backward to zero_grad()
    shared: int  # held for gradients and weights that ranks exchange, if they share memory
    buckets: int  # needed in addition at the worst moment: gradients being sent, and in stage 3 whole blocks
    num_params: int
    host: int = 0  # masters and moments in host memory, with cpu_offload

    @property
    def idle(self) -> int:
        """Bytes after step() and zero_grad()."""
        return self.weights + self.state + self.shared

    @property
    def peak(self) -> int:
        """The most bytes at any moment of backward and step."""
        return self.idle + self.gradients + self.buckets


@dataclass(frozen=True)
class _Setup:
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
        if not self.accumulates or self.element_bytes[layout.key] == _FP32:
            return 0
        most = max(slot.numel for slot in layout.param_slots)
        return min(most, elements_compared_at_once(not self.on_gpu)) * (7 if self.on_gpu else 2)

    def local_sums(self, layout: BucketLayout) -> int:
        """Bytes of gradients, and of the fp32 sums of 16-bit gradients if those of several backwards wait."""
        size = self.element_bytes[layout.key]
        behind = _FP32 if self.accumulates and size < _FP32 else 0
        return self.grads(layout) // size * (size + behind)


def estimate(
    model: nn.Module | Iterable[Tensor],
    *,
    num_ranks: int = 1,
    stage: int = 2,
    bucket_cap_mb: float | None = None,
    reduce_grads: bool = True,
    rule: UpdateRule | None = None,
    cpu_offload: bool = False,
    transport: str = "auto",
    accumulates: bool = False,
) -> Estimate:
    """Estimate the bytes per rank of a model or its parameters with FusedZeroAdam, or with another rule's optimizer.

    Args:
        model: A module or its parameters; the meta device will do. Frozen parameters count only as weights.
        num_ranks: Ranks of the process group.
        stage: 1 to 3. Stage 3 needs a module, and counts it as initialize() shards it: fp32 shards that are their own
            masters. The model's dtypes are those that it computes in.
        bucket_cap_mb: See ZeroOptimizer.
        reduce_grads: See ZeroOptimizer.
        rule: The update rule; default: Adam's. Temporary memory of an update is not counted: ZeroLamb needs some 23
            bytes per element of the largest bucket's shard, ZeroMuon 4.
        cpu_offload: See ZeroOptimizer. Counts as for GPUs.
        transport: See ZeroOptimizer. "auto" counts as "peer" on CPUs.
        accumulates: Whether ranks sum gradients of several backwards before they reduce them: in stage 1 before step(),
            in stage 2 in no_sync(), as transformers' Trainer does.

    Raises:
        ValueError: An argument is out of range.
    """
    if stage == 3 and num_ranks > 1:
        return _of_blocks(model, num_ranks, bucket_cap_mb, rule or AdamRule(), cpu_offload)
    stage = 2 if stage == 3 else stage
    params = list(model.parameters() if isinstance(model, nn.Module) else model)
    shapes = [(param.numel(), param.element_size(), param.requires_grad) for param in params]
    setup = _Setup(
        num_ranks=num_ranks,
        stage=stage,
        bucket_cap_mb=bucket_cap_mb,
        rule=rule or AdamRule(),
        on_gpu=cpu_offload or any(param.device.type == "cuda" for param in params),
        reduces=reduce_grads,
        cpu_offload=cpu_offload,
        transport=transport,
        accumulates=accumulates,
    )
    return _estimate(shapes, setup)


def estimate_numel(
    num_params: int,
    dtype: torch.dtype,
    num_ranks: int,
    stage: int,
    bucket_cap_mb: float | None,
    tensor_parallel: int = 1,
    num_blocks: int = 32,
    cpu_offload: bool = False,
    on_gpu: bool = True,
    accumulates: bool = False,
) -> Estimate:
    """Estimate the same for a number of parameters of one dtype, in tensors that fill the buckets evenly.

    Args:
        num_params: Parameters of the whole model.
        dtype: dtype that the model computes in.
        num_ranks: Ranks that hold the same part of the model.
        stage: 1 to 3. Stage 3 is fully_shard: shards of weights are in fp32, and are their own masters.
        bucket_cap_mb: See ZeroOptimizer.
        tensor_parallel: Ranks that all weights are split over first.
        num_blocks: Number of equal blocks that fully_shard gathers one by one, each ahead of its use (stage 3).
        cpu_offload: See ZeroOptimizer. Counts as for GPUs.
        on_gpu: Whether ranks train on GPUs, with larger buckets, or on CPUs, which share memory.
        accumulates: As in `estimate`.

    Raises:
        ValueError: An argument is out of range.
    """
    if min(tensor_parallel, num_blocks) < 1:
        raise ValueError(
            f"expected tensor_parallel and num_blocks from 1, got {tensor_parallel} and {num_blocks}; correct them"
        )
    check_bucket_cap(bucket_cap_mb)
    own, on_gpu = ceil_div(num_params, tensor_parallel), cpu_offload or on_gpu
    on_one = _Setup(
        num_ranks=1,
        stage=2,
        bucket_cap_mb=bucket_cap_mb,
        rule=AdamRule(),
        on_gpu=on_gpu,
        cpu_offload=cpu_offload,
    )
    if stage != 3 or num_ranks <= 1:  # on one rank stage 3 is 2
        cap = cap_bytes(bucket_cap_mb, num_ranks, on_gpu)
        setup = replace(on_one, num_ranks=num_ranks, stage=2 if stage == 3 else stage, accumulates=accumulates)
        return replace(_estimate(_evenly(own, dtype.itemsize, cap), setup), num_params=num_params)
    found = _estimate(_evenly(ceil_div(own, num_ranks), _FP32, cap_bytes(bucket_cap_mb, 1, on_gpu)), on_one)
    numel = ceil_div(own, num_blocks)
    whole = numel * dtype.itemsize
    block = _Gathered(whole, whole, numel * _FP32, ceil_div(numel, num_ranks) * _FP32)
    worst = _walk([block] * num_blocks, _Gathered(0, 0, 0, 0), 0)
    return replace(found, buckets=max(found.buckets, worst - found.gradients), num_params=num_params)


def _of_blocks(
    model: nn.Module | Iterable[Tensor], num_ranks: int, bucket_cap_mb: float | None, rule: UpdateRule, offload: bool
) -> Estimate:
    """Estimate stage 3: the shards of one rank, and what a backward gathers beside them."""
    if not isinstance(model, nn.Module):
        raise ValueError("expected a module for stage 3, whose blocks count, got parameters; pass the module")
    params = list(model.parameters())
    setup = _Setup(
        num_ranks=1,
        stage=2,
        bucket_cap_mb=bucket_cap_mb,
        rule=rule,
        on_gpu=offload or any(param.device.type == "cuda" for param in params),
        cpu_offload=offload,
    )
    found = _estimate([(_rows(param, num_ranks), _FP32, param.requires_grad) for param in params], setup)
    worst = _gathered_at_most(model, num_ranks)
    held = found.gradients
    return replace(found, buckets=max(found.buckets, worst - held), num_params=sum(param.numel() for param in params))


def _rows(param: Tensor, num_ranks: int) -> int:
    """Return the elements of a shard, with padding."""
    num_rows = param.shape[0] if param.dim() else 1
    return ceil_div(num_rows, num_ranks) * (param.numel() // max(num_rows, 1))


@dataclass(frozen=True)
class _Gathered:
    """Bytes of what fully_shard gathers at once."""

    weights: int  # whole
    grads: int  # whole, in the same dtype
    sent: int  # the same in fp32, padded
    shards: int  # of gradients

    @staticmethod
    def of(params: Iterable[Tensor], num_ranks: int) -> _Gathered:
        held = list(params)
        trained = [param for param in held if param.requires_grad]
        return _Gathered(
            weights=sum(param.numel() * param.element_size() for param in held),
            grads=sum(param.numel() * param.element_size() for param in trained),
            sent=_FP32 * num_ranks * sum(_rows(param, num_ranks) for param in trained),
            shards=_FP32 * sum(_rows(param, num_ranks) for param in trained),
        )


def _gathered_at_most(model: nn.Module, num_ranks: int) -> int:
    """Return the most bytes in a backward, with gradients. Parameters outside of blocks stay whole from forward on."""
    blocks = blocks_of(model)
    in_blocks = {param for block in blocks for param in block.parameters()}
    params = list(model.parameters())
    first = next((place for place, param in enumerate(params) if param in in_blocks), len(params))
    rest = _Gathered.of((param for param in params if param not in in_blocks), num_ranks)
    after_blocks = _Gathered.of((param for param in params[first:] if param not in in_blocks), num_ranks)
    return _walk([_Gathered.of(block.parameters(), num_ranks) for block in reversed(blocks)], rest, after_blocks.grads)


def _walk(blocks: Sequence[_Gathered], rest: _Gathered, early: int) -> int:
    """Return the most bytes in a backward, block by block from the last one.

    Either a block computes with its gradient, while the next is gathered ahead. Or its gradient lies beside the fp32
    copy that is sent, while fully_shard still keeps the copy of the block before.

    Args:
        blocks: The blocks in the order of backward.
        rest: The parameters that the root gathers.
        early: Bytes of the rest's gradients that come before those of the blocks.
    """
    worst = shards = sent = 0
    for place, block in enumerate(blocks):
        ahead = blocks[place + 1].weights if place + 1 < len(blocks) else 0
        always = rest.weights + early + shards + block.grads + ahead
        worst = max(worst, always + sent + max(block.weights, block.sent), always + block.sent + block.shards)
        shards, sent = shards + block.shards, block.sent
    sending = rest.grads + rest.sent + max(sent, rest.shards)
    return max(worst, shards + max(rest.weights + rest.grads + sent, sending))


def _evenly(num_params: int, element_bytes: int, bucket_bytes: int) -> list[tuple[int, int, bool]]:
    """Return shapes of parameters that fill the buckets."""
    whole = max(bucket_bytes // element_bytes // GRANULE * GRANULE, GRANULE)
    sizes = [whole] * (num_params // whole) + [num_params % whole] * (num_params % whole > 0)
    return [(size, element_bytes, True) for size in sizes]


def _estimate(shapes: Sequence[tuple[int, int, bool]], setup: _Setup) -> Estimate:
    """Estimate from shapes: each parameter's elements, bytes per element, and whether it is trained."""
    num_ranks, stage, rule = setup.num_ranks, setup.stage, setup.rule
    if num_ranks < 1 or stage not in (1, 2):
        raise ValueError(f"expected num_ranks from 1 and stage 1 to 3, got {num_ranks} and {stage}; correct them")
    check_bucket_cap(setup.bucket_cap_mb)
    keys = {size: Key(str(size), "", cut=rule.cut) for size in (2, 4)}
    trained = [(numel, size) for numel, size, requires_grad in shapes if requires_grad]
    specs = [ParamSpec(index, numel, size, keys[size]) for index, (numel, size) in enumerate(trained)]
    layouts = plan(specs, cap_bytes(setup.bucket_cap_mb, num_ranks, setup.on_gpu), num_ranks)
    sizes = {key: size for size, key in keys.items()}
    shares_memory = num_ranks > 1 and not setup.on_gpu and setup.transport in ("auto", "peer")
    reduces = setup.reduces and num_ranks > 1
    chosen = _Plan(layouts, sizes, stage, reduces, rule.reads_lists, shares_memory, setup.accumulates, setup.on_gpu)
    frozen = sum(numel * size for numel, size, requires_grad in shapes if not requires_grad)
    held, worst = _gradients(chosen)
    sharded = sum(_sharded(layout, sizes[layout.key], rule.slots) for layout in layouts)
    return Estimate(
        weights=frozen + sum(chosen.weights(layout) for layout in layouts),
        state=(0 if setup.cpu_offload else sharded) + sum(map(_counters, layouts)),
        gradients=held,
        shared=chosen.shared(),
        buckets=max(worst - held, 0),
        num_params=sum(numel for numel, _, _ in shapes),
        host=sharded if setup.cpu_offload else 0,
    )


def _sharded(layout: BucketLayout, element_bytes: int, slots: Sequence[StateSlot]) -> int:
    """Return the bytes of masters and the rule's slots."""
    masters = 0 if element_bytes == _FP32 else _FP32 * layout.shard_numel
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

    shards = [_FP32 * layout.shard_numel for layout in layouts]
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


def table(found: Estimate, where: str = "") -> str:
    """Format the estimate as a table. where: Added to the head, as in "on GPUs"."""
    rows = {
        "weights": found.weights,
        "masters and moments": found.state,
        "memory shared with other ranks": found.shared,
        "after step and zero_grad": found.idle,
        "gradients, after backward": found.gradients,
        "buckets or blocks on their way, at most": found.buckets,
        "peak, without activations": found.peak,
        "masters and moments on the host": found.host,
    }
    lines = [f"{' '.join(['bytes per rank', where]).strip():<40}{'MiB':>12}{'per parameter':>16}"]
    for name, num_bytes in rows.items():
        gib = f"{num_bytes / 1024 / _MEBIBYTE:>12,.1f} GiB" if name.startswith("peak") else ""
        lines.append(f"{name:<40}{num_bytes / _MEBIBYTE:>12,.1f}{num_bytes / max(found.num_params, 1):>14.2f} B{gib}")
    return "\n".join(lines)
