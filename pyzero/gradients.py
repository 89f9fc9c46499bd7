"""Where a step's gradients come from: reduced over ranks by us, or already there in `.grad`.

Both answer the same questions: `stats()` finishes what is under way and tells the overflow flag and the sum of
squares of this rank's part; `of(bucket)` is this rank's gradient of a bucket; `unscale` is what Adam is still to
multiply it by.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from pyzero import ops
from pyzero.buckets import Bucket
from pyzero.comm import Exchange, Group, Transport, find_ddp_wrapper

_MAX_IN_FLIGHT = 1  # exchanges under way while the next bucket is packed: two buckets of memory in all


class _Watch:
    """Hooks on parameters that call `arrived(param)` after each gradient, and keep nothing alive."""

    def __init__(self, arrived: Callable[[Tensor], None]) -> None:
        self._arrived = weakref.WeakMethod(arrived)
        self._hooks: list[Any] = []

    def add(self, params: Iterable[Tensor]) -> None:
        """Watch these too."""
        arrived = self._arrived

        def hook(param: Tensor) -> None:
            method = arrived()
            if method is not None:
                method(param)

        self._hooks += [param.register_post_accumulate_grad_hook(hook) for param in params]

    def add_before(self, bucket: Bucket, before: Callable[[Bucket, int], None]) -> None:
        """Call `before(bucket, position)` ahead of each of these parameters' gradients."""
        method, bucket_of = weakref.WeakMethod(before), weakref.ref(bucket)

        def hook_at(position: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                alive, bucket = method(), bucket_of()
                if alive is not None and bucket is not None:
                    alive(bucket, position)

            return hook

        self._hooks += [param.register_hook(hook_at(position)) for position, param in enumerate(bucket.params)]

    def __del__(self) -> None:
        for hook in self._hooks:
            hook.remove()


class LocalGradients:
    """`.grad` as it is at step(): one rank, or gradients that somebody else has averaged."""

    def __init__(self, group: Group, device: torch.device, backend: str) -> None:
        self.sync = True
        self.has_news = True  # `.grad` may be edited without our knowing
        self.unscale: Tensor | None = None  # 0-D, 1 / loss scale, where the gradients carry it
        self._group = group
        self._device = device
        self._backend = backend
        self._buckets: list[Bucket] = []
        self._pieces: dict[Bucket, tuple[list[Tensor], list[int]]] = {}  # from stats() to of()
        self._inv_scale: Tensor | None = None  # inside a scaled backward
        self._watch = _Watch(self._on_gradient)

    def add(self, bucket: Bucket, scales: bool) -> None:
        """Append a bucket; its parameters are watched only where a loss scale makes it matter who called backward."""
        self._buckets.append(bucket)
        if scales:
            self._watch.add(bucket.params)

    def _on_gradient(self, param: Tensor) -> None:
        self.unscale = self._inv_scale

    @contextmanager
    def scaled_by(self, inv_scale: Tensor) -> Iterator[None]:
        """Gradients that arrive in here carry the loss scale whose inverse this is."""
        self._inv_scale = inv_scale
        try:
            yield
        finally:
            self._inv_scale = None

    def stats(self) -> tuple[Tensor, Tensor]:
        """(1,) fp32 overflow flag and (1,) fp64 sum of squares of this rank's part: one pass that only reads."""
        found = torch.zeros(1, device=self._device)
        sumsq = torch.zeros(1, dtype=torch.float64, device=self._device)
        pieces: list[Tensor] = []
        for bucket in self._buckets:
            bucket.forget_gradients()
            self._pieces[bucket] = bucket.gradients(*bucket.layout.shard_bounds(self._group.rank))
            pieces += self._pieces[bucket][0]
        ops.unscale_(pieces, 1.0, found_inf=found, sumsq=sumsq, backend=self._backend)
        return found, sumsq

    def of(self, bucket: Bucket) -> Tensor:
        """(shard_numel,) in the dtype of the weights; not defined where a parameter has no gradient."""
        pieces, offsets = self._pieces.pop(bucket)
        if len(pieces) == 1 and pieces[0].numel() == bucket.layout.shard_numel:
            return pieces[0].view(-1)  # one parameter, no gaps: no copy
        packed = torch.empty(bucket.layout.shard_numel, dtype=bucket.flat.dtype, device=bucket.device)
        ops.pack_(packed, pieces, offsets=offsets, backend=self._backend)
        return packed

    def after_step(self) -> None:
        """Nothing is kept: `.grad` is the caller's."""

    def reset(self) -> None:
        """After zero_grad()."""
        self.unscale = None


class ReducedGradients:
    """Turns the gradients of all ranks into this rank's shards, in hooks on the parameters.

    One round sends every bucket once, in an order that is the same on all ranks; a bucket waits for those before it,
    and is sent with zeros for parameters without a gradient. Stage 2 makes a round in every backward, so every rank
    must run backward equally often between two steps; stage 1 makes one in step().
    """

    def __init__(
        self,
        group: Group,
        transport: Transport,
        device: torch.device,
        *,
        stage: int,
        overlap: bool,
        dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        self._size = group.size
        self._buckets: list[Bucket] = []
        self.sync = True  # False inside no_sync
        self.unscale: Tensor | None = None  # shards are unscaled as they are reduced
        self._found_inf = torch.zeros(1, device=device)  # (1,) fp32, this rank's
        self._scaled = False  # the last gradient that arrived carries the loss scale
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
        self._streams: set[Any] = set()  # that wrote gradients of this round
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._checked = False  # that no DistributedDataParallel reduces these gradients too
        self._watch = _Watch(self._on_gradient)

    def add(self, bucket: Bucket, scales: bool) -> None:
        """Append a bucket and watch its parameters."""
        self._buckets.append(bucket)
        self._ready[bucket] = set()
        for position, param in enumerate(bucket.params):
            self._place[param] = (bucket, position)
            self._fresh |= param.grad is not None  # unfrozen after its first backward
        self._watch.add(bucket.params)
        if not bucket.is_master:
            self._watch.add_before(bucket, self._before_gradient)

    @property
    def has_news(self) -> bool:
        """A gradient arrived since the last round."""
        return self._fresh

    @contextmanager
    def scaled_by(self, inv_scale: Tensor) -> Iterator[None]:
        """Gradients that arrive in here carry the loss scale whose inverse this is."""
        self._scaled_mean = inv_scale / self._size
        self._in_scaled_backward = True
        try:
            yield
        finally:
            self._in_scaled_backward = False

    def _on_gradient(self, param: Tensor) -> None:
        if not self._checked:
            self._check_unwrapped()
        self._fresh = True
        self._scaled = self._in_scaled_backward
        if self._stage == 1 or not self.sync:
            return
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_of_backward(task))
        bucket, position = self._place[param]
        self._ready[bucket].add(position)
        if self._stream is not None:
            self._streams.add(torch.cuda.current_stream(bucket.device))
        while self._overlap and self._next < len(self._buckets) and self._is_full(self._buckets[self._next]):
            self._send_next()

    def _before_gradient(self, bucket: Bucket, position: int) -> None:
        """A backward that is not sent adds to `.grad` in 16 bits: what is there already moves to fp32 first."""
        if self._stage == 1 or not self.sync:
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

    def _end_of_backward(self, task: int) -> None:
        self._tasks.discard(task)
        if self._fresh or self._next:
            self._finish_round()

    def _finish_round(self) -> None:
        while self._next < len(self._buckets):
            self._send_next()
        self._next = 0
        self._num_rounds += 1
        self._fresh = False
        self._tasks.clear()
        while self._in_flight:
            self._receive()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        self._ready[bucket].clear()
        with self._on_side_stream(), record_function("pyzero::reduce_scatter"):
            send = bucket.pack(0, bucket.layout.numel, self._dtype or bucket.flat.dtype, self._backend)
            factor = self._scaled_mean if self._scaled and self._scaled_mean is not None else self._mean
            self._in_flight.append((bucket, self._transport.start(send), factor))
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
            if bucket.shard is None:
                bucket.shard = torch.empty_like(bucket.master)
            bucket.sumsq.zero_()
            ops.reduce_scatter_(
                bucket.shard,
                exchange.slices,
                scale=factor,
                accumulate=accumulate,
                found_inf=self._found_inf,
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

    def stats(self) -> tuple[Tensor, Tensor]:
        """(1,) fp32 overflow flag and (1,) fp64 sum of squares of this rank's shards, told by their kernels."""
        if self._fresh or self._next or self._num_rounds == 0:
            self._finish_round()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._streams.clear()
        return self._found_inf, torch.stack([bucket.sumsq for bucket in self._buckets]).sum(0)

    def of(self, bucket: Bucket) -> Tensor:
        """(shard_numel,) fp32, averaged over ranks."""
        assert bucket.shard is not None
        return bucket.shard

    def after_step(self) -> None:
        """Stage 1 keeps `.grad` until zero_grad(), and sends it anew; stage 2 keeps the shards."""
        if self._stage == 1:
            self._forget_rounds()

    def reset(self) -> None:
        """After zero_grad(): forget all gradients."""
        for bucket in self._buckets:
            bucket.forget_partial()
        self._forget_rounds()

    def _forget_rounds(self) -> None:
        for bucket in self._buckets:
            bucket.forget_gradients()
        self._found_inf.zero_()
        self._num_rounds = 0
        self._fresh = False
