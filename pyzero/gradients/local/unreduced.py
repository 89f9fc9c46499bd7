"""Gradients that are used directly from `.grad`: on one rank, or if DDP or a trainer has averaged them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from pyzero import memory, ops
from pyzero.comm.group import Group
from pyzero.gradients import nonfinite
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, LocalGradStats
from pyzero.gradients.hooks import GradientHooks, can_be_trained
from pyzero.gradients.interface import Gradients, sparse_error
from pyzero.gradients.local.deferred_clip import DeferredClip
from pyzero.gradients.local.scale_tracker import ScaleTracker
from pyzero.gradients.norms import power_sum
from pyzero.gradients.pieces import GradPieces, Pieces
from pyzero.gradients.stats_rows import SUMSQ, HostView, clean_rows, first_bad_of, flag_of, sumsq_of
from pyzero.ops.rounding import round_up
from pyzero.ops.rows import ALIGNMENT_BYTES
from pyzero.sharding.buckets import Bucket
from pyzero.sharding.layout import GRANULE, ShardRun
from pyzero.sharding.local_param import user_param
from pyzero.sharding.mesh_grad import are_on_one_mesh, make_norms_plain
from pyzero.update_rule import GradList


def _is_mixed(grads: Sequence[Tensor], bucket: Bucket) -> bool:
    """Whether some are not in the weights' dtype. Then all are read as fp32: 16 bits could overflow without a flag."""
    return any([grad.dtype is not bucket.dtype for grad in grads])


def _readable(pieces: GradPieces, bucket: Bucket, backend: str) -> Sequence[Tensor]:
    """Return each gradient in place, or a copy if it is unaligned for vectors or of another dtype."""
    grads = pieces.tensors
    if pieces.is_list:
        return grads
    is_bad = [address % ALIGNMENT_BYTES != 0 for address in pieces.addresses]
    dtype = bucket.dtype
    if _is_mixed(grads, bucket):
        dtype = torch.float32
        is_bad = [bad or grad.dtype is not dtype for bad, grad in zip(is_bad, grads, strict=True)]
    if not any(is_bad):
        return grads
    bad = [grad for grad, is_so in zip(grads, is_bad, strict=True) if is_so]
    offsets = list(accumulate((round_up(grad.numel(), GRANULE) for grad in bad), initial=0))
    packed = memory.empty(offsets.pop(), dtype, bucket.device)
    ops.pack_(packed, bad, offsets=offsets, backend=backend)
    copies = iter([packed[at : at + grad.numel()] for at, grad in zip(offsets, bad, strict=True)])
    return [next(copies) if is_so else grad for grad, is_so in zip(grads, is_bad, strict=True)]


@dataclass
class _RunGrads:
    """The gradients of a run in this rank's shard."""

    shard_run: ShardRun
    pieces: Pieces
    apart: list[int] | None = None  # addresses of gradients, if all lie outside the buckets' memory


class UnreducedGradients(Gradients):
    """Uses `.grad` as it is at step(): on one rank, or if DDP or a trainer has averaged it."""

    def __init__(
        self,
        group: Group,
        stats_exchange: GradStatsExchange,
        device: torch.device,
        scales: bool,
        backend: str,
    ) -> None:
        super().__init__(group, stats_exchange, device)
        self._backend = backend
        self._buckets: list[Bucket] = []
        self._runs: dict[Bucket, list[_RunGrads]] = {}  # of this rank's shards
        self._pieces: dict[Bucket, list[GradPieces]] = {}  # by run, from collect() on
        self._own: list[int] = []  # sorted begins and ends of the buckets' memory, alternating
        self._scale_tracker = ScaleTracker(scales)
        self._deferred_clip = DeferredClip()
        self._locates = False
        self._clean_rows = clean_rows(1, device)
        self._rows = self._clean_rows.clone()  # of the last collect()
        self._stats_rows = self._rows  # of all ranks
        row = self._rows[0]
        self._found_inf, self._sumsq, self._first_bad = flag_of(row), sumsq_of(row), first_bad_of(row)
        self._found_view = HostView()
        self.hooks = GradientHooks(self)
        self._watched = 0  # buckets whose parameters have hooks
        self._expects_scales = False  # another optimizer has a loss scale
        self._frozen: dict[Tensor, None] = {}  # all parameters that were frozen when they came
        self._watched_frozen = 0  # how many of `_frozen` have hooks
        self._mixes_meshes = False  # the parameters are neither all on one mesh, nor all on none

    def add(self, bucket: Bucket) -> None:
        """See Gradients. Parameters get hooks only if needed: with loss scales, several meshes, or after a clip."""
        self._place(bucket)
        self._scale_tracker.add(bucket.params)
        self._mixes_meshes = not are_on_one_mesh(list(self._params()))
        if self._scale_tracker.scales or self._expects_scales or self._watched or self._mixes_meshes:
            self._watch()

    def _place(self, bucket: Bucket) -> None:
        self._buckets.append(bucket)
        for tensor in (bucket.flat, *bucket.state_tensors()):
            self._own += [tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes]
        self._own.sort()
        for run in chain.from_iterable(self._runs.values()):
            run.apart = None
        begin, _ = bucket.layout.shard_bounds(self._group.rank)
        self._runs[bucket] = [
            _RunGrads(run, Pieces(bucket, begin + run.low, begin + run.high, not bucket.rule.reads_lists))
            for run in bucket.runs
        ]

    def move_to(self, buckets: list[Bucket]) -> None:
        """See Gradients. `.grad` stays where it is, and so do the hooks on its parameter."""
        self._buckets, self._runs, self._pieces, self._own = [], {}, {}, []
        for bucket in buckets:
            self._place(bucket)
        self._watched = len(buckets) if self._watched else 0

    def watch(self, frozen: Iterable[Tensor], place_unfrozen: Callable[[], None]) -> None:
        """See Gradients. step() places them. Hooks are only for another optimizer's loss scale in a backward before."""
        self._frozen |= dict.fromkeys(filter(can_be_trained, frozen))
        if self._expects_scales:
            self._watch()

    def expect_scales(self) -> None:
        """See Gradients."""
        self._expects_scales = True
        self._watch()

    def _watch(self) -> None:
        for bucket in self._buckets[self._watched :]:
            self.hooks.add(param for param in bucket.params if not self.hooks.has(param))
        self._watched = len(self._buckets)
        if self._expects_scales:
            new = [param for param in [*self._frozen][self._watched_frozen :] if not self.hooks.has(param)]
            self.hooks.watch(new)
            self._watched_frozen = len(self._frozen)

    def after_unfrozen(self) -> None:
        """Do nothing: a parameter without a bucket is not followed. Maybe another optimizer trains it."""

    def _params(self) -> Iterator[Tensor]:
        for bucket in self._buckets:
            yield from bucket.params

    def before_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
        self._check_clip()
        if self._deferred_clip.factor is not None:
            self._deferred_clip.apply()
        self._scale_tracker.before_gradient()

    def after_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
        self._scale_tracker.after_gradient(param)
        self.norm_before_clip = None
        if self._mixes_meshes:
            make_norms_plain(user_param(param).grad)

    def without_gradient(self, param: Tensor) -> None:
        """Do nothing: no gradient has come, and `.grad` stays as it is."""

    def missed_gradient(self, param: Tensor) -> None:
        """See GradientListener."""
        self._scale_tracker.missed_gradient(param)

    @contextmanager
    def scaled_by(self, inv_scale: Tensor, epoch: int) -> Iterator[None]:
        """See Gradients."""
        tracker = self._scale_tracker
        tracker.begin(inv_scale, epoch)
        try:
            if tracker.fsdp_param is not None:  # no hook runs before its gradient
                self.before_gradient(tracker.fsdp_param)
            tracker.take_over_if_empty()
            yield
        finally:
            tracker.end()

    def renew_scale(self, inv_scale: Tensor, epoch: int) -> None:
        """See Gradients."""
        self._scale_tracker.begin(inv_scale, epoch)

    def collect(self, scaler_found_inf: Tensor | None, purpose: str) -> GlobalGradStats:
        """See Gradients."""
        with self._telling_errors(purpose):
            mine = self._local_stats(scaler_found_inf, purpose)
        stats = self._stats_exchange.gather(mine, self._scale_tracker.unscale)
        self._stats_rows = stats.rows
        if self.norm_before_clip is not None and self._deferred_clip.factor is not None:
            self.norm_before_clip = stats.norm  # `.grad` is without the factor; GradScaler may have unscaled it since
        return stats

    def _local_stats(self, scaler_found_inf: Tensor | None, purpose: str) -> LocalGradStats:
        """Compute this rank's statistics in one pass that only reads the gradients."""
        self._scale_tracker.follow()
        self._check_clip()  # if some were cleared or replaced, multiplies into `.grad` before pieces and norm
        self._rows.copy_(self._clean_rows)
        found = self._found_inf
        counted: list[Tensor] = []
        others: list[Tensor] = []
        found_pieces: dict[Bucket, list[GradPieces]] = {}
        used = [False] * sum(len(bucket.params) for bucket in self._buckets)
        for bucket in self._buckets:
            grads = [param.grad for param in bucket.params]
            for number, grad in zip(bucket.numbers, grads, strict=True):
                used[number] = grad is not None
            found_pieces[bucket] = self._pieces_of(bucket, grads)
            for run, pieces in zip(self._runs[bucket], found_pieces[bucket], strict=True):
                (counted if run.shard_run.key.in_norm else others).extend(pieces.tensors)
        ops.unscale_(counted, 1.0, found_inf=found, sumsq=self._sumsq, backend=self._backend)
        if others:
            ops.unscale_(others, 1.0, found_inf=found, backend=self._backend)
        self._pieces = {bucket: [*map(self._kept, self._runs[bucket], of)] for bucket, of in found_pieces.items()}
        if self._buckets and (self._locates or (found.is_cpu and self._found_view.of(found)[0])):
            self._first_bad.copy_(self._locate())
        if scaler_found_inf is not None:
            torch.maximum(found, scaler_found_inf, out=found)
        return LocalGradStats(self._rows, used, purpose)

    def tell_error(self, purpose: str) -> None:
        """See Gradients. Does not read `.grad`, because `.grad` may be the problem."""
        nobody = [False] * sum(len(bucket.params) for bucket in self._buckets)
        self._stats_exchange.gather(LocalGradStats(self._clean_rows, nobody, purpose, has_error=True), None)

    def _pieces_of(self, bucket: Bucket, grads: list[Tensor | None]) -> list[GradPieces]:
        """Return the pieces by run of this rank's shard.

        Raises:
            TypeError: A gradient is sparse, even if it belongs to another rank's shard.
        """
        maps = [run.pieces for run in self._runs[bucket]]
        found = [pieces.as_they_lie(grads) for pieces in maps]
        if self._group.size > 1 or None in found:
            for param, number, grad in zip(bucket.params, bucket.numbers, grads, strict=True):
                if grad is not None and grad.layout != torch.strided:
                    raise sparse_error(param, self._stats_exchange.name_of(number))
        return [
            usual or (pieces.of(grads) if pieces.has_any(grads) else GradPieces([], [], [], is_list=False))
            for pieces, usual in zip(maps, found, strict=True)
        ]

    def _kept(self, run: _RunGrads, pieces: GradPieces) -> GradPieces:
        """Copy gradients that lie in weights, masters or state, because the update writes there before it reads all."""
        if pieces.addresses is run.apart:
            return pieces
        tensors, _, addresses, _ = pieces
        between = {bisect(self._own, at) for at in (min(addresses), max(addresses))} if addresses else {0}
        own = []
        if len(between) > 1 or between.pop() % 2:  # a look at each takes 90 ns, and usually none lies there
            own = [place for place, at in enumerate(addresses) if bisect(self._own, at) % 2]
        if not own:
            run.apart = addresses
            return pieces
        copies = {place: tensors[place].clone() for place in own}
        return pieces._replace(
            tensors=[copies.get(place, tensor) for place, tensor in enumerate(tensors)],
            addresses=[copies[place].data_ptr() if place in copies else at for place, at in enumerate(addresses)],
        )

    def _locate(self) -> Tensor:
        """Return the code of the first bad parameter: 0-D fp64."""
        names = self._stats_exchange.names
        rank = names.of_group[self._group.rank]
        codes = [
            nonfinite.locate_in_grads(bucket.numbers_on_device, [p.grad for p in bucket.params], rank, names.num_ranks)
            for bucket in self._buckets
        ]
        return torch.stack(codes).min()

    def spans(self, bucket: Bucket) -> Iterator[tuple[int, Tensor | GradList]]:
        """See Gradients. A list if the rule reads lists, otherwise packed."""
        for run, pieces in zip(self._runs[bucket], self._pieces[bucket], strict=True):
            tensors, size = pieces.tensors, run.shard_run.high - run.shard_run.low
            needs_zeros = self._group.size > 1 and len(tensors) < run.pieces.num_pieces
            if bucket.rule.reads_lists and tensors and not needs_zeros:
                yield run.shard_run.low, GradList(_readable(pieces, bucket, self._backend), pieces.offsets, size)
            elif tensors or needs_zeros:
                dtype = torch.float32 if _is_mixed(tensors, bucket) else bucket.dtype
                packed = memory.empty(size, dtype, bucket.device)
                if needs_zeros:
                    packed.zero_()  # only another rank may have a parameter's gradient
                ops.pack_(packed, tensors, offsets=pieces.offsets, backend=self._backend)
                yield run.shard_run.low, packed

    def _multiply(self, factor: Tensor) -> None:
        self._check_clip()
        self._deferred_clip.multiply(factor, self._params(), self._sumsq_of_all())
        if self._stats_exchange.has_parts:  # one part may have to apply it before a step, and the norm is of all
            self._deferred_clip.apply()
        self._watch()  # the next backward must not add to a gradient before the factor is applied

    def factor(self) -> Tensor | None:
        """See Gradients."""
        self._check_clip()
        return None if self._deferred_clip.factor is None else self._deferred_clip.factor_of(self._sumsq_of_all())

    def check_capture(self) -> None:
        """See Gradients."""
        self._check_clip()
        self._deferred_clip.check_capture()

    def _check_clip(self) -> None:
        clip = self._deferred_clip
        if clip.factor is not None and not clip.check(self._params()):
            self.norm_before_clip = None

    def _sumsq_of_all(self) -> Tensor:
        """Return the sum of squares of all ranks' gradients at the last collect(): 0-D fp64."""
        return self._stats_rows[:, SUMSQ].sum()

    def whole(self, bucket: Bucket, position: int) -> Tensor:
        """See Gradients."""
        grad = bucket.params[position].grad
        assert grad is not None
        return bucket.flat_of(grad, position).float()

    def replace(self, bucket: Bucket, position: int, value: Tensor) -> None:
        """See Gradients. Writes to `.grad`, with the loss scale that `.grad` carries."""
        self._check_clip()
        if self._deferred_clip.factor is not None:
            self._deferred_clip.apply()  # the factor must not apply to the new value
        param = bucket.params[position]
        self._scale_tracker.forget_if_empty()
        unscale = self._scale_tracker.unscale
        scaled = value if unscale is None else value / unscale
        grad = torch.empty_like(param).copy_(bucket.shaped(scaled, position))
        if unscale is not None and bool(value.isfinite().all()) and not bool(grad.isfinite().all()):
            raise ValueError(
                f"expected values that {param.dtype} holds times the loss scale of the other gradients, "
                f"{1 / unscale:g}, got one of magnitude {value.abs().max():g}; call zero_grad() and set all, or pass a "
                f"smaller loss_scale"
            )
        self.norm_before_clip = None
        param.grad = grad
        if self._mixes_meshes:
            make_norms_plain(user_param(param).grad)

    def norm_power(self, norm_type: float) -> Tensor:
        """See Gradients."""
        counted: list[Tensor] = []
        for bucket, found in self._pieces.items():
            for run, pieces in zip(self._runs[bucket], found, strict=True):
                counted += pieces.tensors if run.shard_run.key.in_norm else []
        return power_sum(counted, norm_type, self._device)

    def locate_nonfinite(self, always: bool) -> None:
        """See Gradients."""
        self._locates = always

    def after_step(self, used: Sequence[bool]) -> None:
        """See Gradients."""
        self._pieces.clear()
        self._scale_tracker.after_step()
        self._deferred_clip.note_used()
        self.norm_before_clip = None  # only for the first step after the clip

    def has_pending_gradients(self) -> bool:
        """See Gradients. Unknown: the caller may have kept the `.grad` of the last step."""
        return False

    def reset(self) -> None:
        """See Gradients."""
        self._pieces.clear()
        self.norm_before_clip = None
        self._deferred_clip.clear()
        self._scale_tracker.clear()
