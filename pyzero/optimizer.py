"""FusedZeroAdam and FusedZeroAdamW: Adam with its state partitioned over ranks, on the fused ops."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from pyzero import amp, checkpoint, ops, scaler
from pyzero.access import FullAccess
from pyzero.arguments import check_device, check_group, refuse_options
from pyzero.buckets import Bucket
from pyzero.comm import Group, Work, make_transport
from pyzero.gradients import Gradients, LocalGradients
from pyzero.layout import Key, ParamSpec, plan
from pyzero.reduction import ReducedGradients, ReductionOptions
from pyzero.scaler import LossScale, Scaler
from pyzero.skips import SkipWatch
from pyzero.verdict import Jury, Verdict, clip_coefficient

log = logging.getLogger("pyzero")

_MEBIBYTE = 2**20


class _Last(NamedTuple):
    """Of the last step."""

    found_inf: Tensor  # (1,) fp32
    norm: Tensor  # 0-D fp32, before clipping
    clip: Tensor | None  # 0-D fp32


class FusedZeroAdam(FullAccess, Optimizer):
    """torch.optim.Adam with fp32 masters, whose state is partitioned over the ranks of a process group.

    The model is not wrapped: the optimizer reduces gradients by itself, in hooks. With one rank, or with
    `reduce_grads=False`, `.grad` stays and what the caller does to it before `step()` counts.

    A step is: finish the reduction; exchange one small message (overflow flag, sum of squares, which parameters had a
    gradient); Adam on this rank's shard; all-gather of the weights. Nothing in it reads the device from the host.

    Args:
        params: Parameters or groups, as for torch.optim.Adam; bf16, fp16 or fp32. Each rank passes the same. Rank 0's
            values are broadcast. The optimizer moves them into flat buffers, of which `p.data` becomes a view.
        lr: Learning rate, a number or a 0-D tensor.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty; decoupled in FusedZeroAdamW.
        maximize: Ascend.
        decoupled_weight_decay: AdamW's rule.
        stage: 1 partitions masters and moments and sends gradients once per step; 2 partitions gradients too, sends
            them in every backward, and frees `.grad` as it goes.
        process_group: A process group or one dimension of a DeviceMesh; default: the default group, if there is one.
        model_parallel_group: The ranks that hold other parts of the same model, a process group or one dimension of a
            DeviceMesh: they skip steps together and share one gradient norm. Parameters with the attribute
            `tensor_model_parallel` (Megatron's) or `model_parallel` set to True are split over it; all others are
            replicated, and counted once.
        max_grad_norm: Clip the global 2-norm in every step.
        loss_scale: "auto" (dynamic where there are fp16 parameters), None, a number, "dynamic" or a LossScale. Use
            `opt.backward(loss)` with it.
        bucket_cap_mb: Size of a bucket, in MiB of weights.
        overlap: Send a bucket while backward goes on (stage 2).
        grad_reduce_dtype: dtype in which gradients are sent; default: the parameter's.
        reduce_grads: False where gradients are already averaged over ranks (DDP, a trainer).
        max_consecutive_skips: This many skipped steps in a row raise RuntimeError; None: any number is fine.
        transport: "exact" (all-to-all, summed in fp32 in rank order) or "collective" (the library's reduce-scatter).
        backend: Of the ops: "auto", "cuda", "cpu", "triton" or "reference".
        **torch_options: Other arguments of torch.optim.Adam; refused by name where they would change the result.

    Raises:
        ValueError: An argument out of range, or parameters that differ between ranks or lie on several devices.
        TypeError: Parameters in a dtype other than these, or DTensors.
        CollectiveError: From any method that communicates, where another rank died or stalled.
    """

    _decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool | None = None,
        stage: int = 2,
        process_group: Any = None,
        model_parallel_group: Any = None,
        max_grad_norm: float | None = None,
        loss_scale: str | float | LossScale | None = "auto",
        bucket_cap_mb: float = 25.0,
        overlap: bool = True,
        grad_reduce_dtype: torch.dtype | None = None,
        reduce_grads: bool = True,
        max_consecutive_skips: int | None = 50,
        transport: str = "exact",
        backend: str = "auto",
        **torch_options: Any,
    ) -> None:
        refuse_options(torch_options)
        if stage not in (1, 2):
            raise ValueError(f"expected stage 1 or 2, got {stage!r}; stage 3 is torch's fully_shard")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"expected max_grad_norm above 0, got {max_grad_norm}; pass None not to clip")
        self._group = Group(process_group)
        self._model_parallel = None if model_parallel_group is None else Group(model_parallel_group)
        sender = make_transport(transport, self._group)
        self._bucket_cap_bytes = max(int(bucket_cap_mb * _MEBIBYTE), 1)
        self._backend = backend
        self._max_grad_norm = max_grad_norm
        self._buckets: list[Bucket] = []
        self._verdict: Verdict | None = None
        self._clip: Tensor | None = None  # 0-D coefficient asked for by clip_grad_norm_, until the next step
        self._last: _Last | None = None
        self._ready = False
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            decoupled_weight_decay=self._decoupled if decoupled_weight_decay is None else decoupled_weight_decay,
        )
        super().__init__(params, defaults)
        parameters = [param for group in self.param_groups for param in group["params"]]
        self._device = next((param.device for param in parameters if param.requires_grad), torch.device("cpu"))
        policy = scaler.choose(loss_scale, {param.dtype for param in parameters})
        self._scaler = Scaler(policy, self._device, backend)
        self._stand_in = amp.StandIn(self._device)
        self._jury = Jury(self._group, self._model_parallel, self._device)
        self._skips = SkipWatch(self._device, max_consecutive_skips, speaks=self._group.rank == 0)
        self._gradients: Gradients = LocalGradients(self._group, self._device, backend)
        if reduce_grads and self._group.size > 1:
            options = ReductionOptions(stage, overlap, grad_reduce_dtype)
            self._gradients = ReducedGradients(self._group, sender, self._device, options, backend)
        self.register_state_dict_pre_hook(_follow_writes)
        self.register_state_dict_post_hook(_add_scaler, prepend=True)
        self._place(range(len(self.param_groups)))
        self._ready = True

    # ---- construction ---------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's. torch.amp.GradScaler finds a stand-in for gradients that are being reduced; see pyzero/amp.py."""
        if amp.grad_scaler_is_asking() and isinstance(self._gradients, ReducedGradients):
            return self._stand_in.groups(self._collect().found_inf)
        return self._param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group gets buckets of its own."""
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        if self._ready:
            self._place([len(self.param_groups) - 1])

    def _place(self, group_indices: Iterable[int]) -> None:
        """Plan buckets for these groups, move the parameters in, and show their state."""
        params: list[Tensor] = []
        specs: list[ParamSpec] = []
        for index in group_indices:
            for param in self.param_groups[index]["params"]:
                if param.requires_grad and param not in self.state:
                    check_device(param, self._device)
                    key = Key(index, str(param.dtype), str(param.device), self._counts(param))
                    specs.append(ParamSpec(len(params), param.numel(), param.element_size(), key))
                    params.append(param)
        self._check_agreement(params, specs)
        if not params:
            return
        num_placed = sum(len(bucket.params) for bucket in self._buckets)
        for layout in plan(specs, self._bucket_cap_bytes, self._group.size):
            members = [params[slot.index] for slot in layout.slots]
            bucket = Bucket(layout, members, self._group, len(self._buckets), num_placed)
            num_placed += len(members)
            self._buckets.append(bucket)
            self._gradients.add(bucket, scales=self._scaler.enabled)
            for position, param in enumerate(bucket.params):
                self.state[param] = bucket.state_views(position)
        self._verdict = None  # it knows nothing of these

    def _counts(self, param: Tensor) -> bool:
        """Whether a parameter counts for the norm on this rank: once over the model-parallel ranks."""
        if self._model_parallel is None or self._model_parallel.rank == 0:
            return True
        return bool(getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False))

    def _place_unfrozen(self) -> None:
        """Parameters that were frozen so far, and are no longer, get buckets now."""
        groups = enumerate(self.param_groups)
        thawed = [i for i, g in groups if any(p.requires_grad and p not in self.state for p in g["params"])]
        if thawed:
            self._place(thawed)

    def _check_agreement(self, params: list[Tensor], specs: list[ParamSpec]) -> None:
        mine = [(tuple(p.shape), str(p.dtype), spec.key.group_index) for p, spec in zip(params, specs, strict=True)]
        rows = self._group.gather_objects(mine)
        for rank, theirs in enumerate(rows):
            if theirs == rows[0]:
                continue
            where = next((i for i, (a, b) in enumerate(zip(rows[0], theirs, strict=False)) if a != b), None)
            if where is None:
                where = min(len(rows[0]), len(theirs))
            first, other = (_spell(row[where]) if where < len(row) else "nothing" for row in (rows[0], theirs))
            raise ValueError(
                f"expected the same parameters on every rank, got parameter {where} as {first} on rank 0 "
                f"and {other} on rank {rank}; build the model and its groups alike on every rank"
            )

    # ---- gradients ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """`loss.backward(**kwargs)`, scaled where there is a loss scale."""
        if not self._scaler.enabled:
            loss.backward(**kwargs)
            return
        with self._gradients.scaled_by(self._scaler.inv_scale):
            self._scaler.scale_loss(loss).backward(**kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward in here sends nothing: gradients stay in `.grad` until the next backward outside, or step()."""
        before, self._gradients.sync = self._gradients.sync, False
        try:
            yield
        finally:
            self._gradients.sync = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the gradient shards are freed too."""
        super().zero_grad(set_to_none)
        self._gradients.reset()
        self._stand_in.clear()
        self._verdict = self._clip = None

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of the next step() to a global norm of `max_norm`.

        The gradients stay as they are: the coefficient goes into Adam. A norm that is not finite clips nothing, for
        the step is skipped then.

        Args:
            max_norm: The largest norm.
            norm_type: p of the p-norm, above 0; inf for the largest absolute value.

        Returns:
            0-D fp32 tensor on the device: the norm before clipping, of the averaged and unscaled gradients.
        """
        if not norm_type > 0:
            raise ValueError(
                f"expected norm_type above 0, got {norm_type}; 2.0 is the usual one, inf the largest value"
            )
        verdict, outer = self._collect(), self._outer()
        norm = verdict.norm
        if norm_type != 2.0:
            norm = self._jury.norm(self._gradients.norm_power(norm_type), norm_type, verdict.unscale)
        if outer is not None:
            norm = norm * outer
        self._clip = clip_coefficient(max_norm, norm)
        return norm

    def _collect(self) -> Verdict:
        """Finish the reduction and exchange the step's one message."""
        if self._verdict is not None and not self._gradients.has_news:
            return self._verdict
        with record_function("pyzero::collect"), torch.no_grad():
            stats = self._gradients.stats()
            outer_found = self.__dict__.get("found_inf")  # GradScaler's, of `.grad`
            if outer_found is not None:
                found = torch.maximum(stats.found_inf, (outer_found != 0).to(torch.float32).reshape(1))
                stats = stats._replace(found_inf=found)
            self._verdict = self._jury.hear(stats, self._buckets, self._gradients.unscale)
        return self._verdict

    def _outer(self) -> Tensor | None:
        """0-D: what GradScaler leaves to be multiplied by, or None."""
        return amp.outer_factor(self._stand_in, self.__dict__.get("grad_scale"))

    def _forget_verdict(self) -> None:
        self._verdict = None

    # ---- the step -------------------------------------------------------------------------------------------------

    _step_supports_amp_scaling = True  # GradScaler then hands over its flag and scale, and reads nothing on the host

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all ranks, skipped on all where any gradient on any rank was inf or NaN.

        Args:
            closure: Reevaluates the model and returns the loss, as torch's.

        Raises:
            RuntimeError: `max_consecutive_skips` steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._place_unfrozen()
        if not self._buckets:
            return loss
        self._follow_writes()
        verdict, outer, clip = self._collect(), self._outer(), self._clip
        norm = verdict.norm if outer is None else verdict.norm * outer
        if clip is None and self._max_grad_norm is not None:
            clip = clip_coefficient(self._max_grad_norm, norm)
        grad_scale = _product(clip, verdict.unscale, outer)
        gathers = [self._update(bucket, verdict, grad_scale) for bucket in self._buckets]
        self._scaler.update(verdict.found_inf, only_count=outer is not None)
        for gather in gathers:
            gather.wait()
        self._gradients.after_step()
        self._stand_in.clear()
        self._last = _Last(verdict.found_inf, norm, clip)
        self._verdict = self._clip = None
        self._gradients.search = self._skips.after_step(self._scaler.state, verdict.suspect, self._describe)
        return loss

    def _update(self, bucket: Bucket, verdict: Verdict, grad_scale: float | Tensor) -> Work:
        """Adam on this rank's shard of a bucket, then its weights to all ranks."""
        group = self.param_groups[bucket.group_index]
        used = verdict.used[bucket.first_param : bucket.first_param + len(bucket.params)]
        bucket.steps.add_(used * (1.0 - verdict.found_inf))
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(bucket.device, non_blocking=True)
        with record_function("pyzero::adam"):
            ops.adam_(
                bucket.master,
                bucket.exp_avg,
                bucket.exp_avg_sq,
                self._gradients.of(bucket),
                lr=lr,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=bucket.steps,
                decoupled_weight_decay=group["decoupled_weight_decay"],
                maximize=group["maximize"],
                grad_scale=grad_scale,
                found_inf=verdict.found_inf,
                param_out=None if bucket.is_master else bucket.own,
                segment_ids=bucket.segment_ids,
                active=used,
                backend=self._backend,
            )
        with record_function("pyzero::all_gather"):
            return self._group.all_gather_into(bucket.flat, bucket.own)

    @torch.no_grad()
    def _follow_writes(self) -> None:
        num_written = sum(bucket.adopt_writes() for bucket in self._buckets)
        if num_written:
            log.info("%d parameters were written outside the optimizer; their masters follow", num_written)

    def refresh_fp32_params(self) -> None:
        """Make all masters follow the weights, also where they were written through `param.data`, which goes unseen."""
        for bucket in self._buckets:
            bucket.adopt_writes(every=True)

    # ---- what can be read -----------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """0-D tensor: the global 2-norm in the last step, before clipping; None before the first."""
        return None if self._last is None else self._last.norm

    @property
    def clipped_grad_norm(self) -> Tensor | None:
        """0-D tensor: the same after clipping."""
        if self._last is None or self._last.clip is None:
            return self.grad_norm
        return self._last.norm * self._last.clip

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1.0 without scaling. Reads the device."""
        return float(self._scaler.state[0])

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far. Reads the device."""
        return int(self._scaler.state[3])

    @property
    def was_step_applied(self) -> bool:
        """Whether the last step() changed anything. Reads the device."""
        return self._last is not None and not bool(self._last.found_inf)

    def state_bytes(self) -> int:
        """Bytes of masters and moments on this rank."""
        return sum(bucket.num_state_bytes() for bucket in self._buckets)

    def _describe(self, code: float) -> str:
        """Which gradient a code of Bucket.suspect means."""
        if math.isinf(code):
            return "the sum of the gradients over ranks"
        number, rank = divmod(int(code), self._group.size + 1)
        bucket = next(bucket for bucket in reversed(self._buckets) if bucket.first_param <= number)
        param, group = bucket.params[number - bucket.first_param], self.param_groups[bucket.group_index]
        place = next(i for i, candidate in enumerate(group["params"]) if candidate is param)
        name = f"parameter {place} of group {bucket.group_index}"
        if "param_names" in group:
            name = group["param_names"][place]
        where = f" on rank {rank}" if rank < self._group.size else ""
        return f"the gradient of {name}, shape {tuple(param.shape)},{where}".removesuffix(",")

    # ---- state ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave on the same rank of as many ranks; nothing is changed where it does not fit."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        checkpoint.load_rank_state(self, state_dict)
        if "scaler" in state_dict:
            self._scaler.load(state_dict["scaler"])
            self._skips.start_from(self.skipped_steps)
        self._publish_masters()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would lose its hooks and its process group."""
        raise TypeError(
            f"expected {type(self).__name__} not to be pickled or deep-copied, which would lose its hooks and its "
            f"process group; save state_dict(), build another over the copied model, and load it"
        )

    def _publish_masters(self) -> None:
        """Make the weights on all ranks what the masters say."""
        gathers = []
        for bucket in self._buckets:
            if not bucket.is_master:
                bucket.own.copy_(bucket.master)
            bucket.know_all_writes()
            gathers.append(self._group.all_gather_into(bucket.flat, bucket.own))
        for gather in gathers:
            gather.wait()


class FusedZeroAdamW(FusedZeroAdam):
    """torch.optim.AdamW's rule and default weight decay; all else as FusedZeroAdam."""

    _decoupled = True

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) < 4:  # weight_decay is the fifth argument
            kwargs.setdefault("weight_decay", 1e-2)
        super().__init__(params, *args, **kwargs)


def _follow_writes(optimizer: Optimizer) -> None:
    """A state_dict hook: masters that are saved are of the weights as they are."""
    assert isinstance(optimizer, FusedZeroAdam)
    optimizer._follow_writes()


def _add_scaler(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A state_dict hook: the loss scale's five numbers are state too."""
    assert isinstance(optimizer, FusedZeroAdam)
    state_dict["scaler"] = optimizer._scaler.state


def _product(*factors: Tensor | None) -> float | Tensor:
    """Of those that are there; 1.0 of none."""
    result: float | Tensor = 1.0
    for factor in factors:
        if factor is not None:
            result = factor if isinstance(result, float) else result * factor
    return result


def _spell(row: tuple[tuple[int, ...], str, int]) -> str:
    shape, dtype, group = row
    return f"{shape} {dtype.removeprefix('torch.')} in group {group}"
