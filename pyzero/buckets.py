"""Buckets: the flat memory that parameters, masters and moments live in, and the reduction that fills gradient shards."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from pyzero import ops
from pyzero.comm import Exchange, Group, Transport
from pyzero.layout import BucketLayout, Slot

_MAX_IN_FLIGHT = 1  # exchanges under way while the next bucket is packed: two buckets of memory in all


def flat_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """(numel,) elements of a gradient in the memory order of its parameter; a view where the strides agree."""
    if grad.is_contiguous() and param.is_contiguous():
        return grad.view(-1)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))


class Bucket:
    """The memory of one bucket on this rank."""

    def __init__(self, layout: BucketLayout, params: list[Tensor], group: Group, group_index: int) -> None:
        self.layout = layout
        self.group_index = group_index  # of the optimizer's param_groups
        self.params = params  # in the order of layout.slots
        begin, end = layout.shard_bounds(group.rank)
        dtype, self.device = params[0].dtype, params[0].device
        self.flat = torch.zeros(layout.numel, dtype=dtype, device=self.device)  # what the parameters are views of
        self._move_in()
        group.broadcast(self.flat)

        self.own = self.flat[begin:end]  # (shard_numel,) this rank's part of the weights
        self.is_master = dtype == torch.float32  # fp32 weights are their own masters
        self.master = self.own if self.is_master else self.own.float()  # (shard_numel,) fp32
        self.exp_avg = torch.zeros_like(self.master)  # (shard_numel,) fp32
        self.exp_avg_sq = torch.zeros_like(self.master)  # (shard_numel,) fp32
        self.steps = torch.zeros(len(params), device=self.device)  # (num_params,) applied steps of each parameter
        self.segment_ids = self._segment_ids(group.rank)  # (shard_numel / GRANULE,) int32, position of the parameter

        self.shard: Tensor | None = None  # (shard_numel,) fp32 gradient, averaged over ranks, unscaled
        self.sumsq = torch.zeros(1, dtype=torch.float64, device=self.device)  # of the shard
        self.used = [False] * len(params)  # which had a gradient on this rank
        self._pads = self._find_pads()
        self._zeros = torch.zeros(max((n for _, n in self._pads), default=0), dtype=dtype, device=self.device)

    def _move_in(self) -> None:
        """Make each parameter a view of the flat buffer; its own memory is freed one parameter at a time."""
        self.versions: list[int] = []
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            param.data = self._view(slot, param).copy_(param.data)
            self.versions.append(param._version)

    def _view(self, slot: Slot, param: Tensor) -> Tensor:
        strides = torch.empty_like(param.data, device="meta").stride()  # param's own where it is dense
        return self.flat[slot.offset : slot.offset + slot.numel].as_strided(
            param.shape, strides, self.flat.storage_offset() + slot.offset
        )

    def _segment_ids(self, rank: int) -> Tensor:
        runs = self.layout.granule_owners(rank)
        positions = torch.tensor([position for position, _ in runs], dtype=torch.int32)
        counts = torch.tensor([count for _, count in runs], dtype=torch.int64)
        return positions.repeat_interleave(counts).to(self.device)

    def _find_pads(self) -> list[tuple[int, int]]:
        """(offset, numel) of the gap behind each slot; numel may be 0."""
        stops = [slot.offset for slot in self.layout.slots[1:]] + [self.layout.numel]
        ends = [slot.offset + slot.numel for slot in self.layout.slots]
        return [(end, stop - end) for end, stop in zip(ends, stops, strict=True)]

    def adopt_writes(self, rank: int) -> int:
        """Follow parameters that someone else wrote, or moved elsewhere; returns how many."""
        num_written = 0
        for position, (slot, param) in enumerate(zip(self.layout.slots, self.params, strict=True)):
            moved = param.numel() > 0 and param.data_ptr() != self.flat[slot.offset :].data_ptr()
            if param._version == self.versions[position] and not moved:
                continue
            if moved:
                param.data = self._view(slot, param).copy_(param.data)
            self.versions[position] = param._version
            low, high = self.layout.overlap(slot, rank)
            at = slot.offset - rank * self.layout.shard_numel
            if not self.is_master:
                self.master[at + low : at + high].copy_(self.own[at + low : at + high])
            num_written += 1
        return num_written

    def state_views(self, position: int, rank: int) -> dict[str, Tensor]:
        """This rank's part of one parameter's state, as flat views."""
        slot = self.layout.slots[position]
        low, high = self.layout.overlap(slot, rank)
        at = slot.offset - rank * self.layout.shard_numel if high > low else 0
        part = slice(at + low, at + high)
        return {
            "step": self.steps[position],
            "exp_avg": self.exp_avg[part],
            "exp_avg_sq": self.exp_avg_sq[part],
            "master": self.master[part],
        }

    def gradients(self, low: int, high: int) -> tuple[list[Tensor], list[int]]:
        """The pieces of `.grad` in [low, high) of the bucket, zeros for the gaps, and their offsets from low.

        A parameter without a gradient is left out: what lies there is not defined.
        """
        pieces, offsets = [], []
        for position, (slot, (pad_at, pad_numel)) in enumerate(zip(self.layout.slots, self._pads, strict=True)):
            grad = self.params[position].grad
            if grad is not None:
                self.used[position] = True
                begin, end = max(low, slot.offset), min(high, slot.offset + slot.numel)
                if begin < end:
                    flat = flat_gradient(grad, self.params[position])
                    pieces.append(flat[begin - slot.offset : end - slot.offset])
                    offsets.append(begin - low)
            begin, end = max(low, pad_at), min(high, pad_at + pad_numel)
            if begin < end:
                pieces.append(self._zeros[: end - begin])
                offsets.append(begin - low)
        return pieces, offsets

    def pack(self, low: int, high: int, dtype: torch.dtype, backend: str) -> Tensor:
        """(high - low,) gradients of [low, high), zero where a parameter has none."""
        out = torch.empty(high - low, dtype=dtype, device=self.device)
        for slot, param in zip(self.layout.slots, self.params, strict=True):
            if param.grad is None:
                out[max(slot.offset - low, 0) : max(slot.offset + slot.numel - low, 0)].zero_()
        pieces, offsets = self.gradients(low, high)
        ops.pack_(out, pieces, offsets=offsets, backend=backend)
        return out

    def forget_gradients(self) -> None:
        """Free the gradient shard."""
        self.shard = None
        self.used = [False] * len(self.params)
        self.sumsq.zero_()

    def num_state_bytes(self) -> int:
        """Bytes of masters (none of their own for fp32 weights) and moments."""
        num_copies = 2 if self.is_master else 3
        return num_copies * self.layout.shard_numel * self.master.element_size()


class Reducer:
    """Turns the gradients of all ranks into this rank's shards.

    One round sends every bucket once, in the order of `buckets`, which is the same on all ranks; a bucket waits for those
    before it, and is sent with zeros for parameters without a gradient. Stage 2 makes a round in every backward, so
    every rank must run backward equally often between two steps; stage 1 makes one in step().
    """

    def __init__(
        self,
        group: Group,
        transport: Transport,
        *,
        stage: int,
        overlap: bool,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        self.group = group
        self.buckets: list[Bucket] = []
        self.sync = True  # False inside no_sync
        self.scaled = False  # the last gradient that arrived carries the loss scale
        self.found_inf: Tensor = torch.zeros(1)  # (1,) fp32, this rank's; replaced by the first bucket's device
        self._transport = transport
        self._stage = stage
        self._overlap = overlap
        self._dtype = dtype
        self._mean = 1.0 / group.size
        self._scaled_mean: Tensor | None = None  # 0-D, 1 / (size * loss scale), inside a scaled backward or after one
        self._in_scaled_backward = False
        self._backend = backend
        self._place: dict[Tensor, tuple[Bucket, int]] = {}
        self._ready: dict[Bucket, set[int]] = {}
        self._next = 0  # the bucket to send next in this round
        self._num_rounds = 0
        self._fresh = False  # a gradient arrived that no round has sent
        self._tasks: set[int] = set()  # graph tasks at whose end a round is finished
        self._in_flight: deque[tuple[Bucket, Exchange, float | Tensor]] = deque()
        self._streams: set[Any] = set()
        self._hooks: list[Any] = []
        self._stream: Any = None

    def add(self, bucket: Bucket) -> None:
        """Append a bucket and watch its parameters."""
        if bucket.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(bucket.device)
        self.found_inf = self.found_inf.to(bucket.device)
        self.buckets.append(bucket)
        self._ready[bucket] = set()
        owner = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            reducer = owner()
            if reducer is not None:
                reducer._on_gradient(param)

        for position, param in enumerate(bucket.params):
            self._place[param] = (bucket, position)
            self._hooks.append(param.register_post_accumulate_grad_hook(arrived))

    def remove_hooks(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def has_news(self) -> bool:
        """A gradient arrived since the last round."""
        return self._fresh

    @contextmanager
    def scaled_by(self, inv_scale: Tensor) -> Iterator[None]:
        """Gradients that arrive in here carry the loss scale whose inverse this is."""
        self._scaled_mean = inv_scale / self.group.size
        self._in_scaled_backward = True
        try:
            yield
        finally:
            self._in_scaled_backward = False

    def _on_gradient(self, param: Tensor) -> None:
        self._fresh = True
        self.scaled = self._in_scaled_backward
        if self._stage == 1 or not self.sync or self.group.size == 1:
            return
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_of_backward(task))
        bucket, position = self._place[param]
        self._ready[bucket].add(position)
        if self._stream is not None:
            self._streams.add(torch.cuda.current_stream(bucket.device))
        while self._overlap and self._next < len(self.buckets) and self._is_full(self.buckets[self._next]):
            self._send_next()

    def _is_full(self, bucket: Bucket) -> bool:
        return len(self._ready[bucket]) == len(bucket.params)

    def _end_of_backward(self, task: int) -> None:
        self._tasks.discard(task)
        if self._fresh or self._next:
            self._finish_round()

    def _finish_round(self) -> None:
        while self._next < len(self.buckets):
            self._send_next()
        self._next = 0
        self._num_rounds += 1
        self._fresh = False
        self._tasks.clear()
        while self._in_flight:
            self._receive()

    def _send_next(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        self._ready[bucket].clear()
        with self._on_side_stream(), record_function("pyzero::reduce_scatter"):
            send = bucket.pack(0, bucket.layout.numel, self._dtype or bucket.flat.dtype, self._backend)
            factor = self._scaled_mean if self.scaled and self._scaled_mean is not None else self._mean
            self._in_flight.append((bucket, self._transport.start(send), factor))
            while len(self._in_flight) > _MAX_IN_FLIGHT:
                self._receive()
        if self._stage == 2:
            self._free(bucket.params)

    def _receive(self) -> None:
        bucket, exchange, factor = self._in_flight.popleft()
        with self._on_side_stream():
            exchange.work.wait()
            accumulate = bucket.shard is not None and self._stage == 2  # stage 1 sends the sum of all backwards
            if bucket.shard is None:
                bucket.shard = torch.empty_like(bucket.master)
            bucket.sumsq.zero_()
            ops.reduce_scatter_(
                bucket.shard,
                exchange.slices,
                scale=factor,
                accumulate=accumulate,
                found_inf=self.found_inf,
                sumsq=bucket.sumsq,
                backend=self._backend,
            )

    def _free(self, params: Iterable[Tensor]) -> None:
        for param in params:
            if param.grad is not None and self._stream is not None:
                param.grad.record_stream(self._stream)
            param.grad = None

    @contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """On a GPU the reduction runs beside backward, after every stream that wrote a gradient."""
        if self._stream is None:
            yield
            return
        for stream in self._streams | {torch.cuda.current_stream(self._stream.device)}:
            if stream != self._stream:
                self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            yield

    def finish(self) -> None:
        """Bring every shard up to date: call once before the shards are read."""
        if self._fresh or self._next or self._num_rounds == 0:
            self._finish_round()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._streams.clear()

    def reset(self) -> None:
        """Forget gradients and rounds."""
        for bucket in self.buckets:
            bucket.forget_gradients()
        self.found_inf.zero_()
        self._num_rounds = 0
        self._fresh = False


