"""ZeroOptimizer: runs an update rule, and partitions its masters and state over the ranks."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import pyzero
from pyzero import copies
from pyzero.arguments.groups import refuse_unknown, refuse_unsupported
from pyzero.arguments.hyper_parameters import HyperParameters
from pyzero.arguments.options import ZeroOptions, check_options
from pyzero.arguments.params import check_disjoint, check_params
from pyzero.comm.make_transport import make_transport
from pyzero.comm.work import CollectiveError, Work
from pyzero.gradients import amp
from pyzero.gradients.grad_stats import GlobalGradStats, GradStatsExchange, HostFacts, clip_coefficient
from pyzero.gradients.interface import Gradients
from pyzero.gradients.local.unreduced import UnreducedGradients
from pyzero.gradients.reduced.arrival_order import ArrivalOrder
from pyzero.gradients.reduced.reduction import ReducedGradients, ReductionOptions
from pyzero.loss_scale import scaler
from pyzero.loss_scale.overflow import OverflowMonitor
from pyzero.loss_scale.scaled_backward import ScaledBackward
from pyzero.loss_scale.scaler import LossScale, Scaler
from pyzero.profiling import hook_step, profile_range
from pyzero.sharding.agreement import agree_on_options, tell_refusal
from pyzero.sharding.layout import cap_bytes
from pyzero.sharding.param_buckets import ParamBuckets, PlacementOptions
from pyzero.sharding.topology import make_topology
from pyzero.state_dict import StateDicts
from pyzero.status import LastStep
from pyzero.streams import on_device
from pyzero.update import ShardUpdater, StepScalars, check_capture
from pyzero.update_rule import UpdateRule

log = logging.getLogger("pyzero")


class ZeroOptimizer(StateDicts):
    """An optimizer that runs an update rule on fp32 masters, and partitions them over the ranks of a process group.

    It does not wrap the model: it reduces gradients in hooks. Gradients live until they are cleared, as in torch;
    step() does not use them up. With one rank, or with `reduce_grads=False`, `.grad` is torch's. With several ranks
    `.grad` is this rank's own sum until it is reduced. From then on it is a ShardedGrad: it gives norms and takes
    factors as the averaged gradient would, and refuses everything else. `full_grad(p)` gathers it.

    A step finishes the reduction. It exchanges one small message (overflow flag, sum of squares, which parameters had
    a gradient). It runs the rule on this rank's shards, and sends their weights to all ranks. The host never waits for
    the device in a step.

    Args:
        params: Parameters or groups, as for torch.optim, in bf16, fp16 or fp32. Each rank passes the same ones, and
            gets rank 0's values. The optimizer moves them into flat buffers: after construction `p.data` is another
            tensor with its own storage. In stage 2 it is another one again after the first step, when the buckets take
            the order in which gradients arrive. Convert and move the model before you build the optimizer.
        rule: The update rule.
        defaults: Hyper-parameters of groups that do not name their own.
        stage: 1 partitions masters and state, and sends gradients when they are first read, usually in step(). 2 also
            partitions gradients: it sends them in every backward, and frees them as it goes.
        process_group: A process group or one dimension of a DeviceMesh; default: the default group, if there is one.
            With DTensors, pass the ranks that hold the same local tensors. Or pass all ranks that take part, if the
            meshes determine the rest (with fully_shard each rank keeps its own shards; with parallelize_module, ZeRO
            shards over the mesh's other dimension).
        model_parallel_group: The ranks that hold the other parts of the same model: a process group or one dimension
            of a DeviceMesh. They skip steps together and share one gradient norm. Parameters with the attribute
            `tensor_model_parallel` (Megatron's) or `model_parallel` set to True are split over it. All others are
            replicated, and counted once. You need not name the dimensions of DTensors' meshes.
        max_grad_norm: Clip the global 2-norm to this in every step.
        loss_scale: "auto" (dynamic if there are fp16 parameters), None, a number, "dynamic" or a LossScale. With a
            loss scale, call `opt.backward(loss)`.
        bucket_cap_mb: Size of a bucket, in MiB of weights; default: 25, and on GPUs 25 * sqrt(2 * ranks), at most 800.
            On one GPU, which sends no gradients, it is at least 256.
        overlap: Send a bucket while backward goes on (stage 2).
        grad_reduce_dtype: dtype in which gradients are sent; default: the parameter's.
        reduce_grads: False if DDP or a trainer already averages the gradients over the ranks.
        init_sync: Copy rank 0's parameters, frozen ones too, and the buffers of the modules that hold them, to all
            ranks, as in DDP.
        cpu_offload: Keep masters and state of parameters on a GPU in pinned host memory. The GPU's kernels read and
            write them over the bus, with the same bits. Nothing waits. Each step moves them once in each direction.
        max_consecutive_skips: Raise RuntimeError after this many skipped steps in a row; None: never.
        transport: "peer" (memory that the ranks of a host share, and, on CPUs, all-to-all between hosts), "exact"
            (all-to-all) or "collective" (the library's reduce-scatter). "peer" and "exact" sum in fp32 in rank order,
            and give the same bits. "auto" is "peer" if CPUs share memory, and "exact" elsewhere.
        backend: Backend of the ops: "auto", "cuda", "cpu", "triton" or "reference".

    Raises:
        ValueError: An argument is out of range; arguments or parameters differ between ranks; parameters lie on
            several devices; or the DTensors' meshes do not say which ranks hold the same weights.
        TypeError: A parameter has another dtype; a DTensor is a partial sum; text or None is given for a number, True
            or False; or there is no such argument.
        RuntimeError: transport="peer", but the ranks cannot share memory.
        CollectiveError: Another rank died or stalled. Any method that communicates can raise it.
    """

    @torch.inference_mode(False)  # bucket tensors made in inference mode could not be written outside of it
    def __init__(
        self,
        params: Any,
        rule: UpdateRule,
        defaults: dict[str, Any],
        *,
        stage: int = 2,
        process_group: Any = None,
        model_parallel_group: Any = None,
        max_grad_norm: float | None = None,
        loss_scale: str | float | LossScale | None = "auto",
        bucket_cap_mb: float | None = None,
        overlap: bool = True,
        grad_reduce_dtype: torch.dtype | None = None,
        reduce_grads: bool = True,
        init_sync: bool = True,
        cpu_offload: bool = False,
        max_consecutive_skips: int | None = 50,
        transport: str = "auto",
        backend: str = "auto",
        **unknown: Any,  # refused
    ) -> None:
        self._subclass_attributes = [*self.__dict__]  # names of those set before this constructor is called
        params = [*params] if isinstance(params, Iterator) else params
        options: ZeroOptions = {
            "stage": stage,
            "max_grad_norm": max_grad_norm,
            "loss_scale": loss_scale,
            "bucket_cap_mb": bucket_cap_mb,
            "overlap": overlap,
            "grad_reduce_dtype": grad_reduce_dtype,
            "reduce_grads": reduce_grads,
            "init_sync": init_sync,
            "cpu_offload": cpu_offload,
            "max_consecutive_skips": max_consecutive_skips,
            "transport": transport,
            "backend": backend,
        }
        self._options = options
        self._rule = rule
        self._rules: list[UpdateRule] = []  # by parameter group
        self._is_ready = False
        self._last = self._group_of_all = None
        self._is_torn = False
        self._model_names: dict[Tensor, str] = {}
        try:
            refuse_unknown(unknown, type(self))
            self._take_params(params, defaults)
            policy = scaler.choose(loss_scale, {param.dtype for param in self._named_params()})
        except Exception as error:
            _tell_refusal(error, params, process_group, model_parallel_group)
            raise
        self._join_ranks(process_group, model_parallel_group)
        self._make_parts(policy)
        self._hook_state_dict()
        self._place(range(len(self.param_groups)))
        self._is_ready = True

    def _take_params(self, params: Any, defaults: dict[str, Any]) -> None:
        """Check the arguments, as far as this rank can alone, and make the parameter groups."""
        check_params(params)
        check_options(self._options)
        refuse_unsupported(defaults)
        self._rule.check(defaults)
        super().__init__(params, defaults)
        named = self._named_params()
        check_disjoint(named)
        self._device = _device_of(named)

    def _join_ranks(self, process_group: Any, model_parallel_group: Any) -> None:
        """Find the ranks that share the state, and compare the options with theirs. Collective."""
        with on_device(self._device):  # a script may have moved its model and not called set_device()
            self._topology = make_topology([*self._named_params()], process_group, model_parallel_group)
        self._group = self._topology.data
        self._num_ranks = self._topology.num_ranks
        self._logs = self._topology.rank_and_size()[0] == 0
        agree_on_options(self._group, self._rule.name, self._options, self._topology.model_groups)
        self._transport = make_transport(self._options["transport"], self._group, self._device)

    def _make_parts(self, policy: LossScale | None) -> None:
        """Make the objects that a step goes through. policy: Of the loss scale."""
        options, topology, on_gpu = self._options, self._topology, self._device.type == "cuda"
        if options["cpu_offload"] and not on_gpu and self._logs:
            log.info("cpu_offload has nothing to do: the parameters lie on the CPU, and masters and state with them")
        self._param_buckets = ParamBuckets(
            rules=self._rules,
            device=self._device,
            group=self._group,
            transport=self._transport,
            state=self.state,
            topology=topology,
            options=PlacementOptions(
                bucket_cap_bytes=cap_bytes(options["bucket_cap_mb"], self._group.size, on_gpu=on_gpu),
                reduces=options["reduce_grads"],
                init_sync=options["init_sync"],
                cpu_offload=options["cpu_offload"],
            ),
            logs=self._logs,
        )
        self._updater = ShardUpdater(self._device, options["backend"])
        self._tied_groups = {}
        self._hyper_parameters = HyperParameters(self.defaults)
        self._scaler = Scaler(policy, self._device, options["backend"])
        self._grad_scaler_proxy = amp.GradScalerProxy(self._device)
        self._overflow = OverflowMonitor(self._device, options["max_consecutive_skips"], warns=self._logs)
        self._stats_exchange = GradStatsExchange(
            self._group, topology.model_groups, topology.same_params, self._name_of, self._host_facts
        )
        reduces = options["reduce_grads"] and self._group.size > 1
        self._arrival_order = ArrivalOrder(reduces and options["stage"] == 2 and options["overlap"])
        self._gradients = self._make_gradients(reduces)
        has_fp16 = any(param.dtype == torch.float16 for param in self._named_params())
        self._scaled_backward = ScaledBackward(self._scaler, self._gradients, warns=has_fp16 and self._logs)
        self._backward_turn = threading.RLock()

    def _make_gradients(self, reduces: bool) -> Gradients:
        options, backend = self._options, self._options["backend"]
        if not reduces:
            return UnreducedGradients(self._group, self._stats_exchange, self._device, self._scaler.enabled, backend)
        return ReducedGradients(
            self._group,
            self._stats_exchange,
            self._transport,
            self._device,
            ReductionOptions(options["stage"] == 2, options["overlap"], options["grad_reduce_dtype"]),
            self._arrival_order,
            self._scaler.inv_scale if self._scaler.enabled else None,
            self._grad_scaler_proxy,
            backend,
        )

    # ---- the step -------------------------------------------------------------------------------------------------

    profile_hook_step = staticmethod(hook_step)  # type: ignore[assignment]  # torch wraps step() by it

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes GradScaler pass its flag and scale to step() without reading them on the host.

        Lightning refuses to clip if this is True. If it is False, Lightning has GradScaler unscale first, which works
        as well, so Lightning gets False.
        """
        return not amp.lightning_is_asking()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on all ranks. All ranks skip it if any gradient on any rank is inf or NaN.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.

        Raises:
            RuntimeError: `max_consecutive_skips` steps in a row were skipped; gradients were edited on some ranks
                only; hyper-parameters differ between ranks; or another rank has one of the errors below. Nothing is
                changed on any rank.
            TypeError: The model was converted or moved to another device after the optimizer was built, or a group's
                hyper-parameter is not a number.
            ValueError: A group's hyper-parameter is out of range, was removed, or is not supported (amsgrad,
                differentiable); or another tensor was assigned to `p.data` while something holds its former memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_captured = check_capture(self._device, self._num_ranks, self._last is None, self._param_groups)
        if is_captured:
            self._gradients.check_capture()
        if self._prepare_step():
            self._take_step()
        if is_captured:
            self._updater.keep_for_graph(self._param_buckets.steps, self._param_groups)
        return loss

    def _prepare_step(self) -> bool:
        """Check the hyper-parameters, place unfrozen parameters, and have masters follow weights written by others.

        Return whether there is anything to step. If this fails on one rank, all raise.
        """
        error = None
        for prepare in (self._check_groups, self._place_unfrozen, self._param_buckets.follow_weights):
            try:
                prepare()
            except CollectiveError:  # the other ranks raise it too
                raise
            except Exception as found:
                error = error or found
        exchanges = bool(self._buckets or self._topology.model_dims)  # a rank without buckets answers these too
        try:
            if error is not None and exchanges and self._num_ranks > 1:
                self._raise_on_all_ranks(error, "step")
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and the callers'
        return exchanges

    def _check_groups(self) -> None:
        pairs = zip(self._param_groups, self._rules, strict=False)  # _place_unfrozen reports missing ones
        for index, (group, rule) in enumerate(pairs):
            refuse_unsupported(group)
            try:
                rule.check(group)
            except KeyError as error:
                raise ValueError(
                    f"expected {error} in param_groups[{index}], a hyper-parameter of the rule {rule.name}, got a "
                    f"group without; set optimizer.param_groups[{index}][{error}]"
                ) from None

    def _take_step(self) -> None:
        # The others act upon the message, whatever interrupts this rank after it. An error comes on all ranks.
        with self._lockstep() if self._num_ranks > 1 else contextlib.nullcontext():
            stats, unscale = self._collect("step"), self._take_grad_scale()
            self._overflow.check(max(stats.num_skips_in_a_row, self._overflow.num_in_a_row), self._describe)
            self._updater.take_pattern(tuple(self._buckets), stats.used, self._device)  # raises before any write
        # A rank that has updated its shards needs the shards of all others.
        with self._writing():
            self._learn_arrival()
            factor, max_norm = _product(self._gradients.factor(), unscale), self._options["max_grad_norm"]
            scalars = self._updater.count_step(self._buckets, self._param_buckets.steps, stats, max_norm, factor)
            last = self._last_step(scalars, unscale)
            gathers = self._update_and_gather(stats, scalars)
            has_grad_scaler = self._grad_scaler_proxy.was_asked or "grad_scale" in self.__dict__
            self._scaler.update(scalars.found_inf, only_count=has_grad_scaler)
            is_scaled = self._scaler.enabled and self._scaled_backward.after_step(has_grad_scaler)
            for gather in gathers:
                gather.wait()
            self._transport.end_update()
            self._param_buckets.finish_weight_write(stats.used)
        self._param_buckets.has_stepped = True
        self._gradients.after_step(stats.used)
        self._grad_scaler_proxy.clear()
        self._last = last
        self._overflow.after_step(self._scaler.state, stats, self._describe, is_scaled)
        skips = self._overflow.num_in_a_row
        self._gradients.locate_nonfinite(always=skips > 0)
        if self._device.type == "cpu":  # all hosts know the same count
            self._overflow.check(skips, self._describe)

    def _lockstep(self) -> contextlib.AbstractContextManager[None]:
        return self._group.lockstep(self._topology.model_groups, but=Exception)

    def _host_facts(self) -> HostFacts:
        checksum = self._hyper_parameters.checksum(self._param_groups)
        return HostFacts(self._overflow.num_in_a_row, checksum)

    def _take_grad_scale(self) -> Tensor | None:
        """Return 1 / the scale that torch's GradScaler left in the gradients (0-D), if the update has to apply it."""
        unscale = amp.inverse_of(self.__dict__.get("grad_scale"))
        return None if unscale is None else self._gradients.unscale(unscale)

    def _last_step(self, scalars: StepScalars, unscale: Tensor | None) -> LastStep:
        """Return this step's record. Its norm is the one before any clipping, by clip_grad_norm_ too."""
        before = self._gradients.norm_before_clip
        norm = scalars.norm if before is None else _product(before, unscale)
        return LastStep(scalars.found_inf, norm, scalars.norm, scalars.clip)

    def _update_and_gather(self, stats: GlobalGradStats, scalars: StepScalars) -> list[Work]:
        """Run the rule on this rank's shards, bucket by bucket, and send each bucket's weights to all ranks."""
        used = [bucket for bucket in self._buckets if any(stats.used[number] for number in bucket.numbers)]
        gathers = []
        self._transport.begin_update()
        for bucket in used:
            with profile_range(f"pyzero::{bucket.rule.name}"):
                self._updater.update(bucket, self._gradients.spans(bucket), self._param_groups, scalars)
            is_written = bucket.rule.writes_peer_weights and len(bucket.peer_shards) > 0
            if self._group.size > 1 and not is_written:
                with profile_range("pyzero::all_gather"):
                    gathers.append(self._transport.gather(bucket.flat, bucket.weight_shard, bucket.peer_shards))
        return gathers

    def refresh_fp32_params(self) -> None:
        """Make all masters follow the weights, even after writes that torch's version counters do not show.

        The counters do not show writes through `param.data`, collectives on a parameter, writes through numpy or DLPack
        views, and torch._foreach ops on DTensors.
        """
        self._param_buckets.follow_weights(every=True)

    # ---- gradients ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Call `loss.backward(**kwargs)`, with a scaled loss if there is a loss scale.

        If the loss reaches parameters of another ZeroOptimizer, their gradients get that optimizer's loss scale, or
        none if it has none. With a loss scale, parameters that are no longer frozen get buckets first; this is
        collective. If backward raises on one rank before any gradient has come, this rank still takes part in the
        other ranks' reduction, as after a later error. A plain `loss.backward()` cannot do that. Threads take turns.

        Raises:
            RuntimeError: `.grad` holds gradients with another scale, or with none.
        """
        is_inner = torch._C._current_graph_task_id() != -1  # called inside another backward
        with contextlib.nullcontext() if is_inner else self._backward_turn:
            self._run_backward(loss, **kwargs)

    def _run_backward(self, loss: Tensor, **kwargs: Any) -> None:
        if self._scaler.enabled:
            self._place_unfrozen()
        with self._gradients.in_backward():
            if self._scaler.enabled:
                self._scaled_backward.run(loss, **kwargs)
            else:
                loss.backward(**kwargs)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the loss scale, for the caller's own `optimizer.scale(loss).backward()`.

        Parameters that are no longer frozen get buckets, as in `backward`, if the loss requires a gradient.
        """
        if not self._scaler.enabled:
            return loss
        if loss.requires_grad:
            self._place_unfrozen()
        return self._scaled_backward.scale(loss)

    @contextmanager
    def scaled_gradients(self) -> Iterator[None]:
        """A context for backwards that start from scaled gradients, such as those that another pipeline stage sends.

        Use it around `schedule.step(...)` on every stage. The loss function returns `optimizer.scale(loss)`.
        """
        if not self._scaler.enabled:
            yield
            return
        self._place_unfrozen()
        with self._scaled_backward.hold():
            yield

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward sends nothing. Gradients stay local until a backward outside it, or a read."""
        with self._gradients.no_sync():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does, and free the gradient shards."""
        self._gradients.finish_broken_round()
        self._scaled_backward.end()
        super().zero_grad(set_to_none)
        self._gradients.reset()
        self._grad_scaler_proxy.clear()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients down to a global norm of `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

        The optimizer keeps the coefficient, and applies it when the gradients are used next. On one rank `.grad` reads
        as before; do not edit it until step(). If the norm is not finite, the step is skipped.

        Args:
            max_norm: The largest norm.
            norm_type: p of the p-norm, above 0; inf for the largest absolute value.
            error_if_nonfinite: Raise if the norm is inf or NaN. Reads the device.

        Returns:
            0-D fp32 tensor on the device: the norm before clipping, of the averaged and unscaled gradients.

        Raises:
            RuntimeError: The norm is not finite and error_if_nonfinite is set, or, on one rank, `.grad` was edited or
                assigned since the last clip.
            ValueError: norm_type is not above 0.
        """
        max_norm, norm_type = float(max_norm), float(norm_type)  # as torch, which takes text too
        if not norm_type > 0:
            raise ValueError(
                f"expected norm_type above 0, got {norm_type}; 2.0 is the usual one, inf the largest value"
            )
        self._place_unfrozen("clip_grad_norm_")
        with torch.no_grad():
            stats = self._collect("clip_grad_norm_")
            factor = self._gradients.factor()
            magnitude = None if factor is None else factor.abs()
            norm_2: Tensor = _product(stats.norm, magnitude)
            norm = norm_2
            if norm_type != 2.0:
                power = self._gradients.norm_power(norm_type)
                norm = _product(self._stats_exchange.norm(power, norm_type, stats.unscale).reshape(()), magnitude)
            if error_if_nonfinite and not bool(torch.isfinite(norm)):
                raise RuntimeError(
                    f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. To "
                    f"disable this error and scale the gradients by the non-finite norm anyway, set "
                    f"`error_if_nonfinite=False`"
                )
            self._gradients.clip(clip_coefficient(max_norm, norm), norm_2)
        return norm.clone() if norm is norm_2 else norm  # the caller may write to it

    # ---- copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy.deepcopy rebuild the optimizer from, on one rank. Hooks are lost, as in torch."""
        attributes = {name: self.__dict__[name] for name in self._subclass_attributes if name in self.__dict__}
        return {
            "attributes": attributes,
            "rule": self._rule,
            "defaults": self.defaults,
            "options": self._options,
            **copies.contents(self, self._num_ranks, self._param_buckets.params),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["attributes"])
        copies.give_memory(state["trained"])
        ZeroOptimizer.__init__(self, state["groups"], state["rule"], state["defaults"], **state["options"])
        copies.restore(self, state["state"])

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"expected copy.deepcopy() of {type(self).__name__}, got copy.copy(), whose copy would move the same "
            f"parameters; deep-copy it together with its model: copy.deepcopy((model, optimizer))"
        )


def _device_of(params: Iterable[Tensor]) -> torch.device:
    """Return the device of the first trained parameter, or of a frozen one if there is none."""
    trained_first = sorted(params, key=lambda param: not param.requires_grad)
    return next((param.device for param in trained_first), torch.device("cpu"))


def _tell_refusal(error: Exception, params: Any, process_group: Any, model_parallel_group: Any) -> None:
    """Make the other ranks raise, which build the optimizer too, because this rank refuses its arguments."""
    parameters = [leaf for leaf in tree_leaves(params) if isinstance(leaf, Tensor)]
    with contextlib.suppress(Exception), on_device(_device_of(parameters)):  # this rank's own error says more
        topology = make_topology(parameters, process_group, model_parallel_group)
        tell_refusal(topology.data, error, topology.model_groups)


def _product(*factors: Any) -> Any:
    """Return the product of the factors that are not None, or None if all are."""
    result = None
    for factor in factors:
        if factor is not None:
            result = factor if result is None else result * factor
    return result


# `pyzero.optimizer.FusedZeroAdam` too: the optimizer's rule imports this module, and not the other way round.
__getattr__ = pyzero.lazy_getattr(__name__, "FusedZeroAdam", "FusedZeroAdamW")
