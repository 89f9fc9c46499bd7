"""Where the gradients of one bucket are: this rank's own sums, the shards that hold their mean, and what `.grad` shows.

A parameter's gradient is in one of four states (the picture is in docs/design.md):

    none      `.grad` is None
    local     `.grad` is a LocalGrad: this rank's sum of one or more backwards, not sent yet
    reduced   `.grad` is a ShardedGrad: the mean over ranks lies in the shards
    both      `.grad` is a LocalGrad: what came after the part that is in the shards

`.grad` is the truth: whoever assigns or clears it changes the state, and `observe()` notices before anything else is
done. A gradient lives until it is cleared, as torch's do; step() leaves it as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.gradients import nonfinite
from pyzero.gradients.pieces import Pieces
from pyzero.gradients.stats_rows import FIRST_BAD, clean_rows, first_bad_of, flag_of, sumsq_of
from pyzero.sharding.buckets import Bucket, conversion_error, flatten_like
from pyzero.sharding.sharded_grad import LocalGrad, ShardedGrad


class ParamGrad:
    """One parameter's gradient on this rank."""

    def __init__(self, param: Tensor, number: int, owner: weakref.ref[Any]) -> None:
        self.param = param
        self.number = number  # among the optimizer's parameters
        self.position = 0  # in its bucket
        self.has_arrived = False  # in the present round
        self.is_reduced = False  # the shards hold a part of it, zeros maybe
        self.is_zero = False  # and it is known to be zeros, on all ranks
        self.is_used = False  # this rank has had a part in it
        self.is_forgotten = False  # the shards still hold a part of a gradient that is gone
        self.num_edits = 0  # of what is in the shards, by the caller: the same on all ranks
        self.factor: Tensor | None = None  # 0-D: what the part in the shards is still to be multiplied by
        self.main_grad: Tensor | None = None  # (numel,) fp32: the sum behind a 16-bit local gradient
        self._owner = owner
        self._dtype, self._device, self._shape = param.dtype, param.device, param.shape
        self._shown: Tensor | None = None  # what was put in `.grad` last
        self._plain: Tensor | None = None  # the memory of a LocalGrad, without its class
        self._version = 0  # of that memory when it was last seen
        self._zeroed_version = -1  # and when it was filled with zeros

    @property
    def has_local(self) -> bool:
        """This rank holds gradients that have not been sent."""
        return self._plain is not None

    @property
    def has_values(self) -> bool:
        """And they are more than zeros, which carry any loss scale."""
        return self._plain is not None and self._plain._version != self._zeroed_version

    def local_was_zeroed(self) -> None:
        """`.grad` was filled with zeros, by its own zero_."""
        if self._plain is not None:
            self.main_grad = None
            self._version = self._zeroed_version = self._plain._version

    def local_is_zeros(self) -> bool:
        """`.grad` is zeros, however it came to be. Reads the values, so it waits for a GPU."""
        if self._plain is None or self._plain.any():
            return False
        self.local_was_zeroed()
        return True

    @property
    def is_cleared(self) -> bool:
        """`.grad` was set to None since it was last seen."""
        return self.param.grad is None and self._shown is not None

    @property
    def is_touched(self) -> bool:
        """`.grad` holds what was assigned or edited since it was last seen."""
        grad = self.param.grad
        is_new = grad is not None and grad is not self._shown
        return is_new or (self._plain is not None and self._plain._version != self._version)

    def restore(self) -> None:
        """Put back what was cleared."""
        self.param.grad = self._shown

    def observe(self) -> bool:
        """Follow what the caller has done to `.grad`; True where that drops what is in the shards.

        Raises:
            RuntimeError: It was edited where only a part of it is here, or is another gradient's ShardedGrad.
        """
        grad = self.param.grad
        if grad is self._shown:
            if self._plain is not None and self._plain._version != self._version:
                self._edited()
            return False
        if isinstance(grad, ShardedGrad):
            raise RuntimeError(
                f"expected a tensor or None in .grad of the parameter of shape {tuple(self._shape)}, got a ShardedGrad "
                f"of another gradient (an earlier one, another parameter's, or of another optimizer over this one); "
                f"keep optimizer.full_grad(p) and assign that, or delete the other optimizer and call model.zero_grad()"
            )
        was_reduced = self.forget()
        if grad is not None:
            self._keep(grad.as_subclass(torch.Tensor) if isinstance(grad, LocalGrad) else grad, grad)
            self.show()
        return was_reduced

    def _edited(self) -> None:
        if self.is_reduced and not self.is_zero:
            raise RuntimeError(
                f"expected .grad of the parameter of shape {tuple(self._shape)} unedited, for a part of it has been "
                f"reduced already and is not in it, got an edit in place; call optimizer.clip_grad_norm_ or "
                f"optimizer.set_full_grad(p, value), which see all of it"
            )
        assert self._plain is not None
        self.main_grad = None  # .grad was edited, so .grad is the sum
        self._version = self._plain._version

    def forget(self) -> bool:
        """There is no gradient any more; returns whether the shards hold a part of it."""
        was_reduced = self.is_reduced
        self.num_edits += was_reduced
        self.is_forgotten |= was_reduced
        self.is_reduced = self.is_zero = self.is_used = False
        self.factor = self.main_grad = self._shown = self._plain = None
        return was_reduced

    def _keep(self, plain: Tensor, shown: Tensor) -> None:
        self._plain, self._shown, self._version = plain, shown, plain._version
        self._zeroed_version = -1
        self.is_used = True

    def show(self) -> None:
        """`.grad` is for the caller to read: a LocalGrad, or where there is none a stand-in for other ranks' part."""
        if self._plain is not None:
            if not isinstance(self._shown, LocalGrad) or self._shown._record is not self:
                self._shown = LocalGrad.wrap(self._plain, self, self._owner)
                self.param.grad = self._shown
        elif self._shown is None and self.param.requires_grad:
            self._shown = ShardedGrad.placeholder(self.param, self, self._owner)
            self.param.grad = self._shown

    def before_arrival(self) -> None:
        """Backward is about to add to `.grad`: what must not be rounded or cannot be added to moves aside."""
        if self._plain is None:
            self.param.grad = None
        elif self._dtype != torch.float32:
            if self.main_grad is None:
                self.main_grad = memory.empty(self._plain.numel(), torch.float32, self._device)
                self.main_grad.copy_(flatten_like(self._plain, self.param))
            self.param.grad = None

    def after_arrival(self) -> None:
        """Backward has added to `.grad`.

        Raises:
            TypeError: The gradient is sparse, or the parameter was converted after the optimizer was built.
        """
        grad = self.param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            self.param.grad = None
            raise sparse_error(self.param)
        if (grad.dtype, grad.device, grad.shape) != (self._dtype, self._device, self._shape):
            raise conversion_error(self.param, self._dtype, self._device, self._shape)
        if self.main_grad is not None and self._plain is not None and self._shown is not None:
            self.main_grad.add_(flatten_like(grad, self.param))
            flatten_like(self._plain, self.param).copy_(self.main_grad)
            self.param.grad = self._shown
            self._keep(self._plain, self._shown)
        elif grad is self._shown and self._plain is not None:  # added in place
            self._keep(self._plain, self._shown)
        else:
            self._keep(grad, grad)

    def local(self) -> Tensor | None:
        """This rank's unsent sum: of the parameter's shape, or (numel,) in its memory order."""
        return self._plain if self.main_grad is None else self.main_grad

    def sent(self) -> None:
        """The local sum, if any, is on its way into the shards, and `.grad` stands for what they hold."""
        if not isinstance(self._shown, ShardedGrad):
            self._shown = ShardedGrad.placeholder(self.param, self, self._owner)
        self.main_grad = self._plain = None
        self.is_reduced, self.is_zero = True, False
        self.param.grad = self._shown

    def passed_over(self) -> None:
        """A round has sent zeros in place of the local sum, which a later one will send."""
        was_zero = self.is_zero or not self.is_reduced
        if self._plain is None:
            self.sent()
        self.is_reduced, self.is_zero = True, was_zero

    def replaced(self) -> None:
        """The shards hold another gradient now, which every rank has had a part in."""
        self._shown = self.factor = None
        self.sent()
        self.is_used = True
        self.num_edits += 1


def sparse_error(param: Tensor) -> TypeError:
    """Of a gradient that no bucket can hold."""
    return TypeError(
        f"expected dense gradients, got a sparse one for the parameter of shape {tuple(param.shape)}; "
        f"build its embedding with sparse=False, or leave its weight out of the parameters and give it to "
        f"torch.optim.SparseAdam"
    )


class BucketGrads:
    """The gradients of one bucket: a record for each parameter, and this rank's shard of their mean.

    While there is a shard, the parts of parameters without a reduced gradient are zero; without one, all are.
    """

    def __init__(self, bucket: Bucket, records: list[ParamGrad], backend: str) -> None:
        self.bucket = bucket
        self.records = records  # by position in the bucket
        self.shard: Tensor | None = None  # (shard_numel,) fp32, averaged over ranks and unscaled, but for `factor`
        # (num_runs, 3): flag and first bad parameter of the shard in the first row, squares of what counts by run.
        self.stats = clean_rows(len(bucket.layout.runs), bucket.device)
        self.num_awaited = 0  # parameters whose gradients have not come in this round
        self.waits_for_end = False  # it is sent at the end of backward: a gradient came after it was
        self._is_stale = False  # flag and squares are of a shard that has changed since
        self._pieces = Pieces(bucket, 0, bucket.layout.numel)
        self._backend = backend

    @property
    def found_inf(self) -> Tensor:
        """(1,) fp32, of the shard."""
        return flag_of(self.stats[0])

    @property
    def first_bad(self) -> Tensor:
        """(1,) fp64: code of the first bad parameter of all that was received."""
        return first_bad_of(self.stats[0])

    @property
    def is_reduced(self) -> bool:
        """The shard holds a part of some gradient."""
        return any(record.is_reduced for record in self.records)

    def drop_forgotten(self) -> None:
        """Have the shard follow records that have just forgotten their part, this one's bucket-mates included."""
        forgotten = [record for record in self.records if record.observe() or record.is_forgotten]
        if self.is_reduced:
            for record in forgotten:
                self._fill(record, 0.0)
        else:
            self.shard = None
            self.first_bad.fill_(nonfinite.NOT_FOUND)
            self._clear_flag_and_squares()
            self._is_stale = False
        for record in forgotten:
            record.is_forgotten = False

    def write(self, record: ParamGrad, value: Tensor) -> None:
        """(numel,) `value`, in memory order, for what is reduced of one gradient."""
        if self.shard is None:
            self.shard = torch.zeros(self.bucket.layout.shard_numel, dtype=torch.float32, device=self.bucket.device)
        _, in_param = self.bucket.shard_part(record.position)
        self._fill(record, 0.0)
        self.part(record).copy_(value[in_param])

    def part(self, record: ParamGrad) -> Tensor:
        """This rank's part of one parameter's reduced gradient, a view of the shard."""
        assert self.shard is not None
        in_shard, _ = self.bucket.shard_part(record.position)
        return self.shard[in_shard]

    def _fill(self, record: ParamGrad, value: float) -> None:
        """The gap behind it too: a factor that is NaN has made that NaN."""
        if self.shard is not None:
            self.shard[self.bucket.shard_slot(record.position)].fill_(value)
            self._is_stale = True

    def zero(self, record: ParamGrad) -> None:
        """Zeros in place of one reduced gradient."""
        if record.is_reduced:
            record.factor = None
            record.num_edits += 1
            record.is_zero = True
            self._fill(record, 0.0)

    def replace(self, record: ParamGrad, value: Tensor) -> None:
        """(numel,) `value`, in memory order, in place of one gradient, whatever there is of it."""
        self.write(record, value)
        record.replaced()

    def pack(self, send: Tensor, left_out: Callable[[ParamGrad], bool]) -> Tensor:
        """Local gradients into (numel,) `send`, zero where a parameter has none; `.grad` then stands for the mean."""
        grads = [None if left_out(record) else record.local() for record in self.records]
        layout = self.bucket.layout
        missing = [slot for slot, grad in zip(layout.slots, grads, strict=True) if grad is None]
        if missing:
            torch._foreach_zero_([send[slot.offset : slot.offset + slot.numel] for slot in missing])
        pieces, offsets = self._pieces.of(grads)
        ops.pack_(send, pieces, offsets=offsets, backend=self._backend)
        self.pass_over(left_out)
        return send

    def pass_over(self, left_out: Callable[[ParamGrad], bool]) -> None:
        """A round is through with this bucket."""
        for record in self.records:
            record.passed_over() if left_out(record) else record.sent()

    def add(self, slices: list[Tensor], scale: float | Tensor, accumulate: bool, stats: Tensor) -> None:
        """Sum what all ranks sent into the shard.

        Args:
            slices: (shard_numel,) each, see comm.Exchange.
            scale: Of the sum.
            accumulate: Onto the shard.
            stats: (num_runs, 3) clean rows for the shard's.
        """
        layout = self.bucket.layout
        accumulate &= self.shard is not None
        before, self.stats = self.first_bad, stats
        if accumulate:
            self.first_bad.copy_(before)
        if self.shard is None:
            self.shard = memory.empty(layout.shard_numel, torch.float32, self.bucket.device)
        found_inf = self.found_inf
        for index, run in enumerate(layout.runs):
            low, high = layout.run_bounds(run, self.bucket.rank)
            if low < high:
                ops.reduce_scatter_(
                    self.shard[low:high],
                    [piece[low:high] for piece in slices],
                    scale=scale,
                    accumulate=accumulate,
                    found_inf=found_inf,
                    sumsq=sumsq_of(stats[index]) if run.key.in_norm else None,
                    backend=self._backend,
                )
        self._is_stale = False

    def apply_factors(self) -> None:
        """Multiply the shard by the factors that its parameters' gradients are still to be multiplied by.

        Neighbours with one factor are multiplied at once. What is known to be zeros stays so: the factor may be NaN.
        """
        factors = [None if record.is_zero else record.factor for record in self.records]
        for _, neighbours in groupby(range(len(factors)), key=lambda position: id(factors[position])):
            first, *rest = neighbours
            factor, last = factors[first], (rest or [first])[-1]
            if factor is not None and self.shard is not None:
                begin, end = self.bucket.shard_slot(first).start, self.bucket.shard_slot(last).stop
                self.shard[begin:end].mul_(factor)
                self._is_stale = True
        for record in self.records:
            record.factor = None

    def check(self) -> None:
        """Have flag and squares be of the shard as it is."""
        if not self._is_stale or self.shard is None:
            return
        layout, found_inf = self.bucket.layout, self.found_inf
        self._clear_flag_and_squares()
        for index, run in enumerate(layout.runs):
            low, high = layout.run_bounds(run, self.bucket.rank)
            if low < high:
                squares = sumsq_of(self.stats[index]) if run.key.in_norm else None
                ops.unscale_([self.shard[low:high]], 1.0, found_inf=found_inf, sumsq=squares, backend=self._backend)
        self._is_stale = False

    def _clear_flag_and_squares(self) -> None:
        self.stats[:, :FIRST_BAD].zero_()
