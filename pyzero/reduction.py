"""Gradients of all ranks, reduced into this rank's shards by hooks on the parameters."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.profiler import record_function

from pyzero import ops
from pyzero.buckets import NO_SUSPECT, Bucket
from pyzero.comm import Exchange, Group, Transport, find_ddp_wrapper
from pyzero.gradients import Gradients, Stats, Watch, is_set

_MAX_IN_FLIGHT = 1  # exchanges under way while the next bucket is packed: two buckets of memory in all


@dataclass(frozen=True)
class ReductionOptions:
    """How gradients travel."""

    stage: int  # 1: once, in step(); 2: in every backward
    overlap: bool  # a full bucket leaves while backward goes on
    dtype: torch.dtype | None  # to send in; None: that of the weights


class ReducedGradients(Gradients):
    """Turns the gradients of all ranks into this rank's shards.

    One round sends every bucket once, in an order that is the same on all ranks; a bucket waits for those before it,
    and is sent with zeros for parameters without a gradient. Stage 2 makes a round in every backward, so every rank
    must run backward equally often between two steps; stage 1 makes one in step().
    """

    def __init__(
        self, group: Group, transport: Transport, device: torch.device, options: ReductionOptions, backend: str
    ) -> None:
        super().__init__(group, device, backend)
        self._transport = transport
        self._stage = options.stage
        self._overlap = options.overlap
        self._dtype = options.dtype
        self._found_inf = torch.zeros(1, device=device)  # (1,) fp32, this rank's
        self._suspect = torch.full((1,), NO_SUSPECT, dtype=torch.float64, device=device)
        self._edited = False  # shards were written, what was told of them is out of date
        self._mean = 1.0 / group.size
        self._scaled_mean: Tensor | None = None  # 0-D, 1 / (size * loss scale), inside a scaled backward or after one
        self._in_scaled_backward = False
        self._scaled = False  # the last gradient that arrived carries the loss scale
        self._place: dict[Tensor, tuple[Bucket, int]] = {}
        self._ready: dict[Bucket, set[int]] = {}
        self._next = 0  # the bucket to send next in this round
        self._num_rounds = 0
        self._fresh = False  # a gradient arrived that no round has sent
        self._late = False  # one arrived behind its bucket
        self._tasks: set[int] = set()  # graph tasks whose end, or whose parent's end, is being waited for
        self._prehooks: list[Any] = []  # on the nodes of an outer backward
        self._in_flight: deque[tuple[Bucket, Exchange, float | Tensor]] = deque()
        self._streams: set[Any] = set()  # that wrote gradients of this round
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._checked = False  # that no DistributedDataParallel reduces these gradients too
        self._watch = Watch(self._on_gradient)

    def add(self, bucket: Bucket, scales: bool) -> None:
        """Append a bucket and watch its parameters."""
        self._buckets.append(bucket)
        self._ready[bucket] = set()
        for position, param in enumerate(bucket.params):
            self._place[param] = (bucket, position)
            self._fresh |= param.grad is not None  # unfrozen after its first backward
        if self._num_rounds:  # it joins between backward and step
            bucket.ensure_shard().zero_()
        self._watch.add(bucket.params)
        if not bucket.is_master:
            self._watch.add_before(bucket, self._before_gradient)

    @property
    def has_news(self) -> bool:
        """A gradient arrived since the last round."""
        return self._fresh

    @contextmanager
    def scaled_by(self, inv_scale: Tensor) -> Iterator[None]:
        """See Gradients."""
        self._scaled_mean = inv_scale / self._group.size
        self._in_scaled_backward = True
        try:
            yield
        finally:
            self._in_scaled_backward = False

    # ---- arrival ---------------------------------------------------------------------------------------------------

    def _on_gradient(self, param: Tensor) -> None:
        if not self._checked:
            self._check_unwrapped()
        self._fresh = True
        self._scaled = self._in_scaled_backward
        if self._stage == 1 or not self.sync:
            return
        self._await_end()
        bucket, position = self._place[param]
        if bucket.index < self._next:
            self._late, self._overlap = True, False  # a weight in two reentrant checkpoints: it waits from now on
            return
        self._ready[bucket].add(position)
        if self._stream is not None:
            self._streams.add(torch.cuda.current_stream(bucket.device))
        while self._overlap and self._next < len(self._buckets) and self._is_full(self._buckets[self._next]):
            self._send_next()

    def _before_gradient(self, bucket: Bucket, position: int) -> None:
        """Autograd adds to `.grad` in 16 bits: what an earlier backward left there moves to fp32 first."""
        bucket.carry(position)

    def _check_unwrapped(self) -> None:
        wrapped = find_ddp_wrapper(self._place)
        if wrapped is not None:
            raise RuntimeError(
                f"expected a model whose gradients nobody else reduces, got parameters of {wrapped} in "
                f"DistributedDataParallel; pass reduce_grads=False to the optimizer, or the bare model to the loop"
            )
        self._checked = True

    def _is_full(self, bucket: Bucket) -> bool:
        return len(self._ready[bucket]) == len(bucket.params)

    def _await_end(self) -> None:
        """Have the round finished where the outermost backward ends.

        A reentrant checkpoint runs a backward of its own inside the outer one, whose end is not the end. The node
        that runs it is seen on the stack; the nodes behind it run in the outer backward, and wait for its end.
        """
        task = torch._C._current_graph_task_id()
        if task in self._tasks:
            return
        self._tasks.add(task)
        node = _outermost_python_node()
        if node is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            return
        nodes = [behind for behind, _ in node.next_functions if behind is not None]
        self._prehooks += [behind.register_prehook(lambda grads: self._await_end()) for behind in nodes]

    def _end_of_backward(self) -> None:
        if self._fresh or self._next:
            self._finish_round()
        if self._late:
            self._late = False
            self._finish_round()

    def _forget_tasks(self) -> None:
        self._tasks.clear()
        while self._prehooks:
            self._prehooks.pop().remove()

    # ---- rounds ----------------------------------------------------------------------------------------------------

    def _finish_round(self) -> None:
        self._forget_tasks()
        while self._next < len(self._buckets):
            self._send_next()
        self._next = 0
        self._num_rounds += 1
        self._fresh = False
        while self._in_flight:
            self._receive()

    def _send_next(self) -> None:
        number, bucket = self._next, self._buckets[self._next]
        self._next += 1
        self._ready[bucket].clear()
        with self._on_side_stream(), record_function("pyzero::reduce_scatter"):
            send = bucket.pack(0, bucket.layout.numel, self._dtype or bucket.flat.dtype, self._backend)
            factor = self._scaled_mean if self._scaled and self._scaled_mean is not None else self._mean
            exchange = self._transport.start(send, f"the reduce-scatter of gradient bucket {number}")
            self._in_flight.append((bucket, exchange, factor))
            while len(self._in_flight) > _MAX_IN_FLIGHT:
                self._receive()
        if self._stage == 2:
            bucket.forget_partial()
            self._free(bucket.params)

    def _receive(self) -> None:
        bucket, exchange, factor = self._in_flight.popleft()
        with self._on_side_stream():
            exchange.work.wait()
            accumulate = bucket.shard is not None and self._stage == 2  # stage 1 sends the sum of all backwards
            bucket.sumsq.zero_()
            was_set = is_set(self._found_inf)
            ops.reduce_scatter_(
                bucket.ensure_shard(),
                exchange.slices,
                scale=factor,
                accumulate=accumulate,
                found_inf=self._found_inf,
                sumsq=bucket.sumsq,
                backend=self._backend,
            )
            if self.search or (is_set(self._found_inf) and not was_set):
                code = bucket.suspect(exchange.slices, self._group.size, exchange.by_rank)
                torch.minimum(self._suspect, code, out=self._suspect)

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

    # ---- what a step asks ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Told by the kernels that filled the shards."""
        if self._fresh or self._next or self._num_rounds == 0:
            self._finish_round()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._streams.clear()
        if self._edited:
            self._check_again()
        sums = [bucket.sumsq for bucket in self._buckets if bucket.counts]
        sumsq = torch.stack(sums).sum(0) if sums else torch.zeros(1, dtype=torch.float64, device=self._device)
        return Stats(self._found_inf, sumsq, self._suspect)

    def _check_again(self) -> None:
        self._found_inf.zero_()
        for bucket in self._buckets:
            assert bucket.shard is not None
            bucket.sumsq.zero_()
            ops.unscale_([bucket.shard], 1.0, found_inf=self._found_inf, sumsq=bucket.sumsq, backend=self._backend)
        self._edited = False

    def of(self, bucket: Bucket) -> Tensor:
        """In fp32, averaged over ranks, unscaled."""
        assert bucket.shard is not None
        return bucket.shard

    def parts(self, bucket: Bucket) -> list[Tensor]:
        """See Gradients."""
        return [self.of(bucket)]

    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """See Gradients."""
        slot = bucket.layout.slots[position]
        flat: Tensor = self._group.gather_shards(self.of(bucket))[slot.offset : slot.offset + slot.numel]
        return flat

    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """Into the shard."""
        here, there = bucket.own_part(position)
        self.of(bucket)[here].copy_(value[there])
        bucket.used[position] = True
        self._edited = True

    def after_step(self) -> None:
        """Stage 1 sends `.grad` anew where it is kept. In stage 2 it is None, and so the next gradient starts anew.

        Nobody tells us of model.zero_grad(), after which a shard that was kept would be added to.
        """
        self._forget_rounds()

    def reset(self) -> None:
        """See Gradients."""
        if self._next or self._tasks:  # backward was broken off, maybe at another place on the other ranks
            self._finish_round()
        self._late = False
        for bucket in self._buckets:
            bucket.forget_partial()
        self._forget_rounds()

    def _forget_rounds(self) -> None:
        for bucket in self._buckets:
            bucket.forget_gradients()
        self._found_inf.zero_()
        self._suspect.fill_(NO_SUSPECT)
        self._num_rounds = 0
        self._fresh = False
        self._edited = False


_PYTHON_BACKWARD = BackwardCFunction.apply.__code__


def _outermost_python_node() -> Any:
    """The outermost autograd node written in Python that is running on this thread, or None."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is _PYTHON_BACKWARD:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else found.f_locals["self"]
