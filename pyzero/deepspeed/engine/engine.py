"""The engine: DeepSpeed's names over a plain model, one of pyzero's optimizers and a schedule."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyzero.comm import process
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine import plain_backward, tensors
from pyzero.deepspeed.engine.applied_steps import AppliedSteps
from pyzero.deepspeed.engine.data import EngineData
from pyzero.deepspeed.engine.inner_optimizer import refuse_offload
from pyzero.deepspeed.engine.output_hooks import OutputHooks
from pyzero.deepspeed.engine.ranks import EngineRanks
from pyzero.deepspeed.engine.saving import EngineCheckpoints
from pyzero.deepspeed.engine.settings import EngineSettings
from pyzero.deepspeed.engine.weights import EngineWeights
from pyzero.deepspeed.monitor import Monitor
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.profiling.flops_profiler import StepProfile
from pyzero.deepspeed.stage_3.kept_views import is_gathered
from pyzero.deepspeed.timers import PhaseTimers, ThroughputTimer
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import (
    drop_unsent_gradients,
    end_broken_backward,
    end_broken_forward,
    fsdp_groups,
    has_unsent_gradients,
    is_backward_broken,
    reshard,
    without_gradient_sync,
)

log = logging.getLogger("pyzero")

_NOT_SYNCHRONIZED = SimpleNamespace(enabled=True, synchronized=False)  # the host does not wait for the GPU to be timed

_MIXED_DTYPES = ("same dtype", "should be the same", "expected scalar type")  # in torch's errors of layers
_STEPS_PER_PRINT = 10  # between reports of phases, unless the config says otherwise


class Engine(EngineSettings, EngineRanks, EngineData, EngineCheckpoints, EngineWeights, nn.Module):
    """A model with its optimizer and schedule, made by `initialize`. It forwards unknown attributes to the module."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: ZeroOptimizer,
        lr_scheduler: Any,
        config: Config,
        parallel: Parallelism,
        made_group: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.config = config
        self.device = launcher.device()
        self.rank, self.world_size = process.rank_and_size()
        self.global_rank = self.rank  # DeepSpeed's name
        self.local_rank = launcher.local_rank()
        self.parallel = parallel
        self.dp_rank, self.dp_world_size = parallel.data_rank, parallel.data_size  # among ranks that see different data
        self.batches = config.batches(parallel.num_batch_ranks)
        self.micro_steps = 0
        self.global_steps = 0  # optimizer steps, skipped ones too
        self.global_samples = 0  # samples in these steps, on all ranks
        self.training_dataloader: Any = None
        self.client_optimizer: Any = None  # what initialize() was given: optimizer, lr_scheduler and mpu
        self.client_lr_scheduler: Any = None
        self.mpu: Any = None
        self.timers = PhaseTimers(config.wall_clock_breakdown and self.rank == 0, self.device)  # only rank 0 logs them
        self.tput_timer = ThroughputTimer(_NOT_SYNCHRONIZED, self.batches.train)
        self.monitor = Monitor(config, is_first=self.rank == 0)
        self._flops = StepProfile(config.flops_profiler, module, is_first=self.rank == 0)
        self._input_dtype = None if config.auto_cast() is False else config.weights_dtype()  # None: no cast
        self._warns_of_cast = config.auto_cast() is None and self.rank == 0
        self._user = launcher.enter(made_group)
        self._applied_steps = AppliedSteps(is_late=self.device.type == "cuda" and not self.is_scaled)
        self._boundary: bool | None = None  # whether the coming step() acts, if the caller has said it
        self._stepped = False
        self._in_step = False
        self._used_no_sync = False  # since the last step
        self._num_backwards = 0  # since the last step
        self._loss_sum: Tensor | None = None  # of the divided losses since the last step

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, as in `engine.generate(...)`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            found = getattr(module, name)
            return self._explaining(found) if inspect.ismethod(found) and fsdp_groups(module) else found

    def _explaining(self, method: Any) -> Any:
        """Wrap a stage-3 module's method, so that its error says what to do about a weight that is not gathered."""

        @functools.wraps(method)
        def explained(*args: Any, **kwargs: Any) -> Any:
            return self._call(method, args, kwargs)

        return explained

    # ---- forward and backward --------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. With fp16 or bf16 enabled, cast inputs to the weights' dtype, unless auto_cast is false.

        Outputs are not changed. The gradients of a plain backward through them are divided by the number of
        accumulation steps, as in `backward`. So are the results of torch.autograd.grad.

        Raises:
            RuntimeError: The module raised it. If a stage-3 weight was used outside its block, it says what to do.
        """
        self.tput_timer.start()
        args, kwargs = self._cast(args), self._cast(kwargs)
        watches = torch.is_grad_enabled() and self._watches_backward()
        divides = watches and self.batches.accumulation > 1
        inputs = plain_backward.reentering((args, kwargs)) if divides else set()
        with self.timers.phase("forward"), self._flops.around(self.global_steps), self._autocast():
            try:
                outputs = self._call(self.module, args, kwargs)
            except BaseException:
                end_broken_forward(self.module)
                raise
        if fsdp_groups(self.module) and not torch.is_grad_enabled() and not is_gathered(self.module):
            module: Any = self.module
            module.reshard()  # weights left whole would miss writes before the next step
        if watches:
            hooks = OutputHooks(self)
            undo = hooks.undo_division if divides else None
            plain_backward.watch(outputs, inputs, hooks.arrived, undo, hooks.refuse_edited)
        return outputs

    def _cast(self, inputs: Any) -> Any:
        """Cast inputs to the weights' dtype, if the config has one and auto_cast is not false."""
        dtype = self._input_dtype
        if dtype is None:
            return inputs
        found = (tensor.dtype for tensor in tensors.find(inputs) if tensor.is_floating_point())
        wider = (
            next((other for other in found if other.itemsize > dtype.itemsize), None) if self._warns_of_cast else None
        )
        if wider is not None:
            self._warns_of_cast = False
            log.warning(
                "inputs in %s are cast to %s, the weights' dtype; DeepSpeed leaves them alone. Set auto_cast in the "
                "config's fp16 or bf16 section: to true if you mean the cast, to false to leave inputs alone",
                wider,
                dtype,
            )
        return tensors.cast(inputs, dtype)

    def _watches_backward(self) -> bool:
        """Return whether a plain backward must be divided or refused. It need not if no weights are trained."""
        is_asked = self.batches.accumulation > 1 or self.is_scaled
        return is_asked and any(param.requires_grad for param in self.module.parameters())

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            remedy = self._remedy_for(str(error), getattr(function, "__name__", None))
            if remedy is None:
                raise
            raise RuntimeError(remedy) from error

    def _remedy_for(self, error: str, method: str | None) -> str | None:
        """Return a message with a remedy for an error in the module's forward, if the engine has a part in it.

        method: The name of another method that was called.
        """
        is_of_stage_3 = "mixed torch.Tensor and DTensor" in error and self.zero_optimization_stage() == 3
        if is_of_stage_3 and method is not None:
            return (
                f"got a weight that {method}() uses past the module that gathers it ({error}), wanted it gathered, in "
                f"stage 3; call torch.distributed.fsdp.register_fsdp_forward_method(engine.module, {method!r}) after "
                f"initialize(), for a weight outside the blocks; or call {method}() without gradients, in "
                f"deepspeed.zero.GatheredParameters(list(engine.module.parameters()))"
            )
        if is_of_stage_3:
            return (
                f"got a weight that is used outside the block that gathers it ({error}), wanted it inside alone, in "
                "stage 3; call deepspeed.zero.register_external_parameter(module, parameter) before initialize(), call "
                "the block and not a module in it, or set stage 2"
            )
        dtype = self.config.weights_dtype()
        others = (
            name for name, buffer in self.module.named_buffers() if buffer.is_floating_point() and buffer.dtype != dtype
        )
        name = next(others, None)
        if dtype is None or name is None or not any(words in error for words in _MIXED_DTYPES):
            return None
        return (
            f"got tensors of two dtypes in the module's forward ({error}), wanted one: weights are in {dtype}, and "
            f"buffers as {name} stay as they are, as with DeepSpeed 0.19; cast what is computed with them, or set "
            f"data_types.buffer_dtype in the config"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.config.torch_autocast.enabled_dtype()
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Divide the loss by the number of accumulation steps, scale it, and run backward. Return the divided loss.

        Args:
            loss: A tensor of one element.
            retain_graph: As in torch.
            scale_wrt_gas: False: do not divide.

        Raises:
            TypeError, ValueError: The loss is not a tensor of one element.
            RuntimeError: torch's backward raised it. If a loss function mixed dtypes, it says what to do.
        """
        tensors.check_loss(loss)
        divided = loss / self.batches.accumulation if scale_wrt_gas else loss
        self._num_backwards += 1
        try:
            with OutputHooks.in_backward_of(self), self.timers.phase("backward"):
                self.optimizer.backward(divided, retain_graph=retain_graph)
        except RuntimeError as error:
            if "Found dtype" not in str(error):
                raise
            # Usually 16-bit outputs and fp32 targets. torch's message names no loss and no remedy.
            raise RuntimeError(
                f"got tensors of two dtypes in a loss ({error}), wanted one: torch has no backward of huber_loss "
                "(older torch: of mse_loss) for a mix; cast before the loss, as in mse_loss(outputs.float(), targets)"
            ) from error
        if self.monitor.enabled:
            self._loss_sum = divided.detach() + (0 if self._loss_sum is None else self._loss_sum)
        return divided

    def scale(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Return the loss times the loss scale, for your own `engine.scale(loss).backward()`.

        Args:
            loss: Any tensor that backward starts at.
            retain_graph: Ignored; pass it to backward().
        """
        return self.optimizer.scale(loss)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward sends nothing; see ZeroOptimizer.no_sync.

        In stage 3 each rank keeps whole gradients in it, and the last backward before step() must be outside.
        """
        self._used_no_sync = True
        with self.optimizer.no_sync(), without_gradient_sync(self.module):
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """A context around several backwards. The step() after it sends their gradients, once."""
        if self._in_step:
            raise RuntimeError("expected coalesce_grad_reduction() around backwards, got it inside step(); move it out")
        before, self._boundary = self._boundary, False
        try:
            with self.optimizer.no_sync():
                yield
        finally:
            self._boundary = before

    @property
    def enable_backward_allreduce(self) -> bool:
        """True: gradients are averaged over ranks. In DeepSpeed, False leaves that to the script.

        Raises:
            NotImplementedError: It is set to False.
        """
        return True

    @enable_backward_allreduce.setter
    def enable_backward_allreduce(self, value: bool) -> None:
        if not value:
            raise NotImplementedError(
                "got enable_backward_allreduce=False, which is not supported: the engine averages gradients; to send "
                "them yourself, train without an engine, with pyzero.FusedZeroAdamW(..., reduce_grads=False)"
            )

    # ---- the step --------------------------------------------------------------------------------------------------

    @property
    def micro_steps(self) -> int:
        """The number of calls of step(). Setting it moves the boundary too: 0 begins a step."""
        return self._micro_steps

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self._micro_steps = value
        self._num_micro = value % self.batches.accumulation  # since the last step that acted

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the coming step() acts, as opposed to only counting a micro-batch."""
        if self._boundary is not None:
            return self._boundary
        if not self.config.managed_gradient_accumulation:
            return self._in_step
        return self._num_micro + 1 >= self.batches.accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say from now on whether the coming step() acts, instead of counting micro-batches.

        Raises:
            RuntimeError: managed_gradient_accumulation is false, so every step() acts.
        """
        if not self.config.managed_gradient_accumulation:
            raise RuntimeError(
                "expected managed_gradient_accumulation=true in the config, got false, with which every step() is a "
                "boundary; call step() at the boundary alone, or remove the key"
            )
        self._boundary = is_boundary

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At an accumulation boundary, take the optimizer's step, clear gradients and take the schedule's step.

        If the optimizer's step was skipped because of an overflow, the schedule does not advance. To know that, the
        engine waits for the device if there are both a schedule and a loss scale. On a GPU without a loss scale it does
        not wait: there the schedule advances, and stays where it is at the next step instead.

        Args:
            lr_kwargs: Arguments of the schedule's step.

        Raises:
            TypeError: The schedule is torch's ReduceLROnPlateau, and lr_kwargs has no "metrics". Nothing has changed.
        """
        self._check_watched(
            lr_kwargs or {},
            'call engine.step(lr_kwargs={"metrics": value}), with the same value on every rank, or step the schedule '
            "yourself and leave it out of initialize()",
        )
        self._in_step = True
        try:
            self._stepped = False  # also if the step raises
            if self.is_gradient_accumulation_boundary():
                with self.timers.phase("step"):
                    self._take_step(lr_kwargs or {})
                self._stepped = True
                self._report()
        finally:
            self._in_step = False
        self._micro_steps += 1
        self._num_micro = 0 if self._stepped else self._num_micro + 1
        self.tput_timer.stop(global_step=self._stepped)

    def _check_watched(self, lr_kwargs: dict[str, Any], remedy: str) -> None:
        """Raise TypeError with a remedy if the schedule's step needs a value that is not given."""
        if isinstance(self.lr_scheduler, ReduceLROnPlateau) and "metrics" not in lr_kwargs:
            raise TypeError(f"expected the value that ReduceLROnPlateau watches, got none; {remedy}")

    def _take_step(self, lr_kwargs: dict[str, Any]) -> None:
        if self.zero_optimization_stage() == 3 and is_backward_broken(self.module):
            raise RuntimeError(
                "expected backwards that end, got one that an exception has broken off in stage 3, whose gradients "
                "were not sent; call engine.zero_grad() on all ranks, and begin the step anew"
            )
        if self._used_no_sync and has_unsent_gradients(self.module):
            raise RuntimeError(
                "expected a backward outside no_sync() before step() in stage 3, got gradients that no_sync() has kept "
                "on each rank; run the last micro-batch's backward outside, or call zero_grad() to drop them"
            )
        self._used_no_sync = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1
        managed = self.config.managed_gradient_accumulation
        num_micro = self.batches.accumulation if managed else self._num_backwards
        self.global_samples += num_micro * self.batches.micro * self.dp_world_size
        self._num_backwards = 0
        last = self.optimizer._last
        if self.lr_scheduler is not None and (last is None or self._applied_steps.ask(last.found_inf)):
            self.lr_scheduler.step(**(lr_kwargs or self._increment()))

    def _increment(self) -> dict[str, int]:
        """Return the argument of Megatron's schedules, which count samples: `step(increment)`."""
        wanted = inspect.signature(self.lr_scheduler.step).parameters.get("increment")
        return {} if wanted is None or wanted.default is not wanted.empty else {"increment": self.batches.train}

    def _report(self) -> None:
        """Write to the monitors and the log."""
        if self.monitor.enabled:
            self.monitor.write_events(self._events())
            self._loss_sum = None
        every = self.config.steps_per_print
        if every and self.global_steps % every == 0 and self.rank == 0:
            log.info("step=%d, skipped=%d, lr=%s", self.global_steps, self.skipped_steps, self.get_lr())
        if self.timers.enabled and self.global_steps % (every or _STEPS_PER_PRINT) == 0:
            log.info("%s", self.timers.report())

    def _events(self) -> list[tuple[str, float, int]]:
        events = [("Train/Samples/lr", self.get_lr()[0], self.global_samples)]
        if self._loss_sum is not None:
            events.append(("Train/Samples/train_loss", float(self._loss_sum), self.global_samples))
        if self.is_scaled:
            events.append(("Train/Samples/loss_scale", self.cur_scale, self.global_samples))
        return events

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the optimizer does. In stage 3, end a backward that an exception has broken off."""
        if self.zero_optimization_stage() == 3:
            end_broken_backward(self.module)
        if self._used_no_sync:
            drop_unsent_gradients(self.module)
        self.optimizer.zero_grad(set_to_none)

    # ---- what can be asked -----------------------------------------------------------------------------------------

    def was_step_applied(self) -> bool:
        """Return whether the last step() changed the weights. Reads the device."""
        return self._stepped and self.optimizer.was_step_applied

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of the averaged, unscaled gradients in the last step, before clipping. Reads the device."""
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    @property
    def basic_optimizer(self) -> Any:
        """The optimizer in the optimizer, with the same groups and state; None without one."""
        return getattr(self.optimizer, "optimizer", None)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because of an overflow. Reads the device."""
        return self.optimizer.skipped_steps

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1.0 without one. Reads the device."""
        return self.optimizer.loss_scale

    def get_loss_scale(self) -> float:
        """Return `cur_scale`."""
        return self.cur_scale

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Return the betas of each group, or its momentum."""
        return [group["betas"] if "betas" in group else group["momentum"] for group in self.optimizer.param_groups]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module in place with torch.compile."""
        self.module.compile(*args, **kwargs)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing on a CPU, because states lie in host memory already. Refused on a GPU.

        Raises:
            NotImplementedError: On a GPU.
        """
        refuse_offload(self.device)

    reload_states = offload_states

    def empty_partition_cache(self) -> None:
        """Free the whole weights that stage 3 has gathered."""
        reshard(self.module)

    def destroy(self) -> None:
        """End the engine. The last one leaves the process group, if initialize() or zero.Init joined it."""
        launcher.leave(self._user)
