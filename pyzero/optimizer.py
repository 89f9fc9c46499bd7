"""FusedZeroAdam and FusedZeroAdamW: Adam with its state partitioned over ranks, on the fused ops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from pyzero import checkpoint, ops, scaler
from pyzero.arguments import check_group, refuse_options
from pyzero.buckets import Bucket
from pyzero.comm import Group, make_transport
from pyzero.gradients import LocalGradients, ReducedGradients
from pyzero.layout import ParamSpec, plan
from pyzero.scaler import LossScale, Scaler

log = logging.getLogger("pyzero")

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class _Collected:
    """What all ranks know of the gradients once the step's one message has gone round."""

    found_inf: Tensor  # (1,) fp32, 1 where any gradient on any rank was inf or NaN
    norm: Tensor  # 0-D fp32, global 2-norm of the averaged, unscaled gradients
    used: Tensor  # (num_params,) fp32, 1 where some rank had a gradient; bucket by bucket
    unscale: Tensor | None  # 0-D fp32 that Adam is still to multiply by


class FusedZeroAdam(Optimizer):
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
        max_grad_norm: Clip the global 2-norm in every step.
        loss_scale: "auto" (dynamic where there are fp16 parameters), None, a number, "dynamic" or a LossScale. Use
            `opt.backward(loss)` with it.
        bucket_cap_mb: Size of a bucket, in MiB of weights.
        overlap: Send a bucket while backward goes on (stage 2).
        grad_reduce_dtype: dtype in which gradients are sent; default: the parameter's.
        reduce_grads: False where gradients are already averaged over ranks (DDP, a trainer).
        transport: "exact" (all-to-all, summed in fp32 in rank order) or "collective" (the library's reduce-scatter).
        backend: Of the ops: "auto", "cuda", "cpu", "triton" or "reference".
        **torch_options: Other arguments of torch.optim.Adam; refused by name where they would change the result.

    Raises:
        ValueError: An argument out of range, or parameters that differ between ranks.
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
        max_grad_norm: float | None = None,
        loss_scale: str | float | LossScale | None = "auto",
        bucket_cap_mb: float = 25.0,
        overlap: bool = True,
        grad_reduce_dtype: torch.dtype | None = None,
        reduce_grads: bool = True,
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
        self._bucket_cap_bytes = max(int(bucket_cap_mb * _MEBIBYTE), 1)
        self._backend = backend
        self._max_grad_norm = max_grad_norm
        sender = make_transport(transport, self._group)
        self._buckets: list[Bucket] = []
        self._collected: _Collected | None = None
        self._clip: Tensor | None = None  # 0-D coefficient asked for by clip_grad_norm_, until the next step
        self._last: _Collected | None = None
        self._used_pattern: tuple[bool, ...] | None = None
        self._used_row = torch.empty(0)
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
        self._gradients: LocalGradients | ReducedGradients
        if reduce_grads and self._group.size > 1:
            self._gradients = ReducedGradients(
                self._group,
                sender,
                self._device,
                stage=stage,
                overlap=overlap,
                dtype=grad_reduce_dtype,
                backend=backend,
            )
        else:
            self._gradients = LocalGradients(self._group, self._device, backend)
        self._place(range(len(self.param_groups)))
        self._ready = True

    # ---- construction ---------------------------------------------------------------------------------------------

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
                    key = (index, param.dtype, str(param.device))
                    specs.append(ParamSpec(len(params), param.numel(), param.element_size(), key))
                    params.append(param)
        self._check_agreement(params)
        if not params:
            return
        for layout in plan(specs, self._bucket_cap_bytes, self._group.size):
            group_index = layout.key[0]  # type: ignore[index]
            bucket = Bucket(layout, [params[slot.index] for slot in layout.slots], self._group, group_index)
            self._buckets.append(bucket)
            self._gradients.add(bucket, scales=self._scaler.enabled)
            for position, param in enumerate(bucket.params):
                self.state[param] = bucket.state_views(position, self._group.rank)

    def _place_unfrozen(self) -> None:
        """Parameters that were frozen so far, and are no longer, get buckets now."""
        groups = enumerate(self.param_groups)
        thawed = [i for i, g in groups if any(p.requires_grad and p not in self.state for p in g["params"])]
        if thawed:
            self._place(thawed)

    def _check_agreement(self, params: list[Tensor]) -> None:
        mine = [(tuple(param.shape), str(param.dtype)) for param in params]
        rows = self._group.gather_objects(mine)
        for rank, theirs in enumerate(rows):
            if theirs == rows[0]:
                continue
            where = next((i for i, (a, b) in enumerate(zip(rows[0], theirs, strict=False)) if a != b), None)
            if where is None:
                where = min(len(rows[0]), len(theirs))
            first, other = (str(row[where]) if where < len(row) else "nothing" for row in (rows[0], theirs))
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
        self._collected = None
        self._clip = None

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the next step() to a global 2-norm of `max_norm`.

        Returns:
            0-D fp32 tensor on the device: the norm before clipping, of the averaged and unscaled gradients.
        """
        collected = self._collect()
        self._clip = _clip_coefficient(max_norm, collected.norm)
        return collected.norm

    def _collect(self) -> _Collected:
        """Finish the reduction and exchange the step's one message."""
        if self._collected is not None and not self._gradients.has_news:
            return self._collected
        with record_function("pyzero::collect"):
            found, sumsq = self._gradients.stats()
            row = torch.cat([found.double(), sumsq, self._used_here()])
            rows = self._group.gather_rows(row)  # (size, 2 + num_params) fp64
        found = (rows[:, 0] != 0).any().to(torch.float32).reshape(1)
        norm = rows[:, 1].sum().sqrt()
        unscale = self._gradients.unscale
        if unscale is not None:
            norm = norm * unscale
        used = (rows[:, 2:] != 0).any(0).to(torch.float32)
        self._collected = _Collected(found, norm.to(torch.float32), used, unscale)
        return self._collected

    def _used_here(self) -> Tensor:
        """(num_params,) fp64 on the device: which parameters had a gradient on this rank."""
        pattern = tuple(used for bucket in self._buckets for used in bucket.used)
        if pattern != self._used_pattern:
            self._used_pattern = pattern
            self._used_row = torch.tensor(pattern, dtype=torch.float64).to(self._device, non_blocking=True)
        return self._used_row

    # ---- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all ranks, skipped on all where any gradient on any rank was inf or NaN.

        Args:
            closure: Reevaluates the model and returns the loss, as torch's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._place_unfrozen()
        if not self._buckets:
            return loss
        self._follow_writes()
        collected = self._collect()
        grad_scale = self._grad_scale(collected)
        gathers = []
        first = 0
        for bucket in self._buckets:
            used = collected.used[first : first + len(bucket.params)]
            first += len(bucket.params)
            self._update(bucket, used, collected, grad_scale)
            with record_function("pyzero::all_gather"):
                gathers.append(self._group.all_gather_into(bucket.flat, bucket.own))
        self._scaler.update(collected.found_inf)
        for gather in gathers:
            gather.wait()
        self._gradients.after_step()
        self._last, self._collected, self._clip = collected, None, None
        return loss

    def _grad_scale(self, collected: _Collected) -> float | Tensor:
        """What Adam multiplies gradients by: clip coefficient times 1 / loss scale, where either is left to do."""
        clip = self._clip
        if clip is None and self._max_grad_norm is not None:
            clip = _clip_coefficient(self._max_grad_norm, collected.norm)
        if clip is None:
            return 1.0 if collected.unscale is None else collected.unscale
        return clip if collected.unscale is None else clip * collected.unscale

    def _update(self, bucket: Bucket, used: Tensor, collected: _Collected, grad_scale: float | Tensor) -> None:
        group = self.param_groups[bucket.group_index]
        bucket.steps.add_(used * (1.0 - collected.found_inf))
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
                found_inf=collected.found_inf,
                param_out=None if bucket.is_master else bucket.own,
                segment_ids=bucket.segment_ids,
                active=used,
                backend=self._backend,
            )

    def _follow_writes(self) -> None:
        num_written = sum(bucket.adopt_writes(self._group.rank) for bucket in self._buckets)
        if num_written:
            log.info("%d parameters were written outside the optimizer; their masters follow", num_written)

    # ---- what can be read -----------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """0-D tensor: the global 2-norm in the last step, before clipping; None before the first."""
        return None if self._last is None else self._last.norm

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

    # ---- state ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave on the same rank of as many ranks; nothing is changed where it does not fit."""
        checkpoint.load_rank_state(self, state_dict)
        if "scaler" in state_dict:
            self._scaler.load(state_dict["scaler"])
        self._publish_masters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: its flat views by parameter, the groups, and the loss scale's five numbers."""
        return {**super().state_dict(), "scaler": self._scaler.state}

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


def _clip_coefficient(max_norm: float, norm: Tensor) -> Tensor:
    """torch.nn.utils.clip_grad_norm_'s: min(1, max_norm / (norm + 1e-6))."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
