"""Buckets of gradients in flight: packed, sent, and summed into the shards after they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero.comm.transport import Exchange, Transport
from pyzero.gradients import nonfinite
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.bucket_grads import BucketGrads
from pyzero.gradients.stats_rows import is_set
from pyzero.profiling import profile_range
from pyzero.streams import on_stream

_MAX_IN_FLIGHT = 1  # exchanges under way while the next bucket is packed: two buckets of memory in all

# A backward does not wait for ever, because another rank may be in another optimizer's backward and wait there for this
# rank. A read of gradients waits for the buckets that are still in flight.
_BUCKET_WAIT_S = 2.0  # for one of many
_LAST_BUCKET_WAIT_S = 0.2


class _Sum(NamedTuple):
    """How to sum a bucket that has arrived."""

    grads: BucketGrads
    scale: float | Tensor
    accumulate: bool  # onto the shard
    stats: Tensor  # (num_runs, 3) clean rows for the shard's statistics


class _Packed(NamedTuple):
    """A bucket that has not been sent yet."""

    sum: _Sum
    send: Tensor
    what: str  # for messages


class BucketExchange:
    """Sends buckets, and receives them in the order in which they were sent.

    On a GPU, gradients are packed on the current stream. The exchange and the sum run on a side stream beside backward,
    and only the packed buffer crosses from one stream to the other. It is the side stream's memory: packing waits for
    the sum of the bucket before the last, so there are only two buffers, however far the host runs ahead.
    """

    def __init__(self, names: nonfinite.RankNames, transport: Transport, device: torch.device) -> None:
        self.locates = False  # look for the first bad parameter in every bucket: the last step was skipped
        self._names = names  # of the ranks
        self._transport = transport
        self._device = device
        self._packed: _Packed | None = None
        self._in_flight: deque[tuple[_Sum, Exchange]] = deque()
        self._writers: set[Any] = set()  # streams that wrote gradients since the last receive_all
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def note_writer_stream(self) -> None:
        """Called on the stream that has written a gradient."""
        if self._stream is not None:
            self._writers.add(torch.cuda.current_stream(self._device))

    def send(
        self,
        grads: BucketGrads,
        dtype: torch.dtype,
        scale: float | Tensor,
        left_out: Callable[[ParamGrad], bool],
        when_packed: Callable[[], None],
        what: str,
        stats: Tensor,
    ) -> None:
        """Pack a bucket, with zeros for gradients that are left out, and send it. The sum is multiplied by `scale`.

        If this raises, for example for lack of memory, nothing is lost. If `when_packed` has not been called, the
        bucket can be sent again. If it has, the bucket is sent before anything else is sent or received.
        """
        with profile_range("pyzero::reduce_scatter"):
            self.send_packed()
            self._receive_surplus()  # if that was broken off before: there is room for only two
            accumulate = grads.is_reduced
            grads.apply_factors()
            self._wait_for_writers(grads)
            buffer = self._transport.buffer(grads.bucket.layout.numel, dtype, self._device, self._stream)
            send = grads.pack(buffer, left_out)
            with self._transport.group.lockstep(what=what):
                self._packed = _Packed(_Sum(grads, scale, accumulate, stats), send, what)
                when_packed()
            self.send_packed()
            self._receive_surplus()

    def _receive_surplus(self) -> None:
        """Receive buckets in flight other than the last one sent, unless other ranks are slow."""
        while len(self._in_flight) > _MAX_IN_FLIGHT and self._is_first_done(_BUCKET_WAIT_S):
            self._receive()

    def send_packed(self) -> None:
        """Send the bucket that is packed, if there is one."""
        packed, group = self._packed, self._transport.group
        if packed is None:
            return
        num_launched = group.num_launched
        try:
            with on_stream(self._stream):
                exchange = self._transport.start(packed.send, packed.what)
            self._in_flight.append((packed.sum, exchange))
            self._packed = None
        except BaseException as error:
            if group.num_launched > num_launched:  # launched, and lost here, but the other ranks count on it
                group.break_off(error, packed.what)
            raise

    def _is_first_done(self, patience_s: float) -> bool:
        _, exchange = self._in_flight[0]
        return exchange.work.is_done(patience_s)

    def receive_at_end(self) -> None:
        """At the end of a backward, receive buckets that the other ranks have sent by now, or send soon."""
        self.send_packed()
        while self._in_flight and self._is_first_done(_LAST_BUCKET_WAIT_S):
            self._receive()

    def receive_all(self) -> None:
        """Receive everything in flight, and make the current stream wait for it."""
        self.send_packed()
        while self._in_flight:
            self._receive()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._writers.clear()

    def receive_bucket(self, grads: BucketGrads) -> None:
        """Complete this bucket's shard, for the current stream.

        Later buckets stay in flight. When they are received depends on what was sent, the same on all ranks, and not on
        what only this rank sees.
        """
        self.send_packed()
        while any(each.grads is grads for each, _ in self._in_flight):
            self._receive()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _receive(self) -> None:
        (grads, scale, accumulate, stats), exchange = self._in_flight[0]
        with on_stream(self._stream, stats, grads.stats, *[scale] if isinstance(scale, Tensor) else ()):
            exchange.work.wait()  # a KeyboardInterrupt here loses nothing
            shard = grads.shard_memory()  # a lack of memory loses nothing either
            with self._transport.group.lockstep(what="the sum of a gradient bucket"):
                self._in_flight.popleft()
                try:
                    was_set = is_set(grads.found_inf)
                    grads.reduce_slices(shard, exchange.slices, scale, accumulate, stats)
                    if self.locates or (is_set(grads.found_inf) and not was_set):
                        code = nonfinite.locate_in_slices(grads.bucket, exchange.slices, self._names, exchange.by_rank)
                        torch.minimum(grads.first_bad, code, out=grads.first_bad)
                finally:
                    exchange.release()

    def _wait_for_writers(self, grads: BucketGrads) -> None:
        """Make the current stream, which packs and frees gradients, wait for every stream that wrote one."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        others = self._writers - {current}
        for stream in others:
            current.wait_stream(stream)
        for record in grads.records if others else ():
            record.record_stream(current)
