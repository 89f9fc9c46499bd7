"""The records of all parameters' gradients, by bucket, parameter and number. They follow what callers do to `.grad`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyzero.comm.group import Group
from pyzero.gradients.reduced.accumulation import ParamGrad
from pyzero.gradients.reduced.bucket_grads import BucketGrads
from pyzero.gradients.reduced.exchange import BucketExchange
from pyzero.sharding.buckets import Bucket


class GradRecords:
    """The records of all gradients, in BucketGrads, and what is known about all of them together.

    Args:
        exchange: The buckets in flight.
        owner: A weak reference to the sharded_grad.GradOwner of the tensors shown in `.grad`.
        backend: Backend of the ops.
    """

    def __init__(self, exchange: BucketExchange, owner: weakref.ref[Any], backend: str) -> None:
        self.buckets: list[BucketGrads] = []
        self.by_param: dict[Tensor, tuple[BucketGrads, ParamGrad]] = {}
        self.by_number: list[ParamGrad] = []
        # Computed norms. A gradient that comes, goes, is sent or replaced drops both; one edited, the second.
        self.norm_before_clip: Tensor | None = None  # see Gradients
        self.param_norms: tuple[float, Tensor] | None = None  # (p, (num_params,) p-norms)
        self._exchange = exchange
        self._owner = owner
        self._backend = backend

    def add(self, bucket: Bucket) -> None:
        """Append a bucket. Gradients that are in `.grad` already count as unsent."""
        rows = zip(bucket.params, bucket.numbers, bucket.strides, strict=True)
        self._place(bucket, [ParamGrad(param, number, stride, self._owner) for param, number, stride in rows])
        self.by_number = sorted((record for _, record in self.by_param.values()), key=lambda record: record.number)

    def _place(self, bucket: Bucket, records: list[ParamGrad]) -> None:
        grads = BucketGrads(bucket, records, self._backend)
        self.buckets.append(grads)
        for position, record in enumerate(records):
            record.position = position
            self.by_param[record.param] = (grads, record)

    def move_to(self, buckets: Sequence[Bucket], group: Group) -> None:
        """Take other buckets of the same parameters. Nothing may be in flight. Collective."""
        old, self.buckets = self.buckets, []
        records = {param: record for param, (_, record) in self.by_param.items()}
        for bucket in buckets:
            self._place(bucket, [records[param] for param in bucket.params])
        what = "the all-gather of gradients that move to other buckets"
        for grads in old:  # gathers one bucket at a time
            if grads.shard is not None:
                flat = group.gather_shards(grads.shard, what)
                grads.shard = None
                for slot, record in zip(grads.bucket.layout.param_slots, grads.records, strict=True):
                    self.by_param[record.param][0].write(record, flat[slot.offset : slot.offset + slot.numel])

    def observe(self, grads: BucketGrads, record: ParamGrad) -> None:
        """Follow what the caller has done to one `.grad`. Raises RuntimeError as ParamGrad.observe() does."""
        if record.observe():
            self._exchange.receive_bucket(grads)
            self.forget_norms()
            grads.clear_stale()

    def observe_all(self) -> None:
        """Follow what the caller has done to any `.grad`."""
        for grads, record in self.by_param.values():
            self.observe(grads, record)

    def forget_norms(self) -> None:
        """Forget computed norms, because a gradient has come, gone or been replaced."""
        self.norm_before_clip = self.param_norms = None

    def have_local(self) -> bool:
        """Whether this rank holds gradients that have not been sent."""
        return any(record.has_local for record in self.by_number)

    def have_local_values(self) -> bool:
        """Whether some of those are not all zeros. May read the values."""
        return any(record.has_values and not record.local_is_zeros() for record in self.by_number)

    def parts(self) -> list[Tensor]:
        """Return this rank's part of each reduced gradient, by number; empty if another rank counts it for the norm."""
        return [self._part(*self.by_param[record.param]) for record in self.by_number]

    def _part(self, grads: BucketGrads, record: ParamGrad) -> Tensor:
        if grads.shard is None or not grads.bucket.layout.in_norm(record.position):
            return torch.empty(0, dtype=torch.float32, device=grads.bucket.device)
        return grads.part(record)
