"""The engine: DeepSpeed's names over a plain model, an optimizer of ours and a schedule."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyzero.comm import process
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.engine import plain_backward, tensors
from pyzero.deepspeed.engine.data import EngineData
from pyzero.deepspeed.engine.output_hooks import OutputHooks
from pyzero.deepspeed.engine.ranks import EngineRanks
from pyzero.deepspeed.engine.saving import EngineCheckpoints
from pyzero.deepspeed.engine.settings import EngineSettings
from pyzero.deepspeed.engine.weights import EngineWeights
from pyzero.deepspeed.monitor import Monitor
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.profiling.flops_profiler import StepProfile
from pyzero.deepspeed.stage_3.kept_views import is_gathered
from pyzero.deepspeed.timers import PhaseTimers
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.fsdp import (
    drop_unsent_gradients,
    fsdp_groups,
    has_unsent_gradients,
    reshard,
    without_gradient_sync,
)

log = logging.getLogger("pyzero")

_MIXED_DTYPES = ("same dtype", "should be the same", "expected scalar type")  # in torch's errors of layers
_STEPS_PER_PRINT = 10  # of phases, where the config says nothing


class Engine(EngineSettings, EngineRanks, EngineData, EngineCheckpoints, EngineWeights, nn.Module):
    """A model with its optimizer and schedule; `initialize` makes one. What it lacks is the module's."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: ZeroOptimizer,
        lr_scheduler: Any,
        config: Config,
        parallel: Parallelism,
        leaves_group: bool = False,
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
        self.dp_rank, self.dp_world_size = parallel.data_rank, parallel.data_size  # among those that see different data
        self.batches = config.batches(parallel.num_batch_ranks)
        self.micro_steps = 0
        self.global_steps = 0  # optimizer steps, skipped ones too
        self.global_samples = 0  # that went into them, on all ranks
        self.training_dataloader: Any = None
        self.timers = PhaseTimers(config.wall_clock_breakdown and self.rank == 0, self.device)  # the others tell nobody
        self.monitor = Monitor(config, is_first=self.rank == 0)
        self._flops = StepProfile(config.flops_profiler, module, is_first=self.rank == 0)
        self._input_dtype = None if config.auto_cast() is False else config.weights_dtype()  # None: they are left alone
        self._warns_of_cast = config.auto_cast() is None and self.rank == 0
        self._leaves_group = leaves_group
        self._boundary: bool | None = None  # what the caller says of the coming step()
        self._stepped = False
        self._in_step = False
        self._used_no_sync = False  # since the last step
        self._num_backwards = 0  # since the last step
        self._loss_sum: Tensor | None = None  # of the divided losses since the last step

    def __getattr__(self, name: str) -> Any:
        """What is not the engine's is the module's: `engine.generate(...)`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    # ---- forward and backward --------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, on inputs cast to the weights' dtype where fp16 or bf16 is enabled, and auto_cast not false.

        The outputs are left alone. A plain backward through them is divided by the number of accumulation steps, as
        `backward` is; what torch.autograd.grad gives through them is, too.

        Raises:
            RuntimeError: Of the module; where it uses a weight of stage 3 outside its block, with what to do about it.
        """
        args, kwargs = self._cast(args), self._cast(kwargs)
        watches = torch.is_grad_enabled() and self._watches_backward()
        divides = watches and self.batches.accumulation > 1
        inputs = plain_backward.reentering((args, kwargs)) if divides else set()
        with self.timers.phase("forward"), self._flops.around(self.global_steps), self._autocast():
            outputs = self._call(args, kwargs)
        if fsdp_groups(self.module) and not torch.is_grad_enabled() and not is_gathered(self.module):
            module: Any = self.module
            module.reshard()  # what is left whole would be out of date where weights are written before the next step
        if watches:
            hooks = OutputHooks(self)
            undo = hooks.undo_division if divides else None
            plain_backward.watch(outputs, inputs, hooks.arrived, undo, hooks.refuse_edited)
        return outputs

    def _cast(self, inputs: Any) -> Any:
        """To the weights' dtype, if the config has one and does not say otherwise."""
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
                "inputs in %s are rounded to %s, the weights' dtype, where DeepSpeed leaves them alone; so does "
                "auto_cast=false in the config's fp16 or bf16, and auto_cast=true says that they are meant to be",
                wider,
                dtype,
            )
        return tensors.cast(inputs, dtype)

    def _watches_backward(self) -> bool:
        """Whether a plain backward has to be divided, or refused. One that reaches no weights of this model has not."""
        is_asked = self.batches.accumulation > 1 or self.is_scaled
        return is_asked and any(param.requires_grad for param in self.module.parameters())

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self.module(*args, **kwargs)
        except RuntimeError as error:
            remedy = self._remedy_for(str(error))
            if remedy is None:
                raise
            raise RuntimeError(remedy) from error

    def _remedy_for(self, error: str) -> str | None:
        """What to do about an error of the module's forward, where the engine has to do with it."""
        if "mixed torch.Tensor and DTensor" in error and self.zero_optimization_stage() == 3:
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
        """Backward of the loss divided by the number of accumulation steps, and scaled. Returns the divided loss.

        Args:
            loss: Of one element.
            retain_graph: As torch's.
            scale_wrt_gas: False: do not divide.

        Raises:
            TypeError, ValueError: The loss is no tensor, or not of one element.
            RuntimeError: In torch's backward; where a loss function mixed dtypes, with what to do about it.
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
            # 16-bit outputs and fp32 targets, as a rule. torch's message names no loss and no remedy.
            raise RuntimeError(
                f"got tensors of two dtypes in a loss ({error}), wanted one: torch has no backward of huber_loss "
                "(older torch: of mse_loss) for a mix; cast before the loss, as in mse_loss(outputs.float(), targets)"
            ) from error
        if self.monitor.enabled:
            self._loss_sum = divided.detach() + (0 if self._loss_sum is None else self._loss_sum)
        return divided

    def scale(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """The loss times the loss scale, for a backward of your own: `engine.scale(loss).backward()`.

        Args:
            loss: Any tensor that backward starts at.
            retain_graph: Nothing here: what backward() is called with counts.
        """
        return self.optimizer.scale(loss)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward in here sends nothing; see ZeroOptimizer.no_sync.

        In stage 3 each rank keeps whole gradients meanwhile, and the last backward before step() must be outside.
        """
        self._used_no_sync = True
        with self.optimizer.no_sync(), without_gradient_sync(self.module):
            yield

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Several backwards whose gradients are sent once, by the step() after them."""
        if self._in_step:
            raise RuntimeError("expected coalesce_grad_reduction() around backwards, got it inside step(); move it out")
        before, self._boundary = self._boundary, False
        try:
            with self.optimizer.no_sync():
                yield
        finally:
            self._boundary = before

    # ---- the step --------------------------------------------------------------------------------------------------

    @property
    def micro_steps(self) -> int:
        """Calls of step(). To set it moves the boundary too: 0 begins a step."""
        return self._micro_steps

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self._micro_steps = value
        self._num_micro = value % self.batches.accumulation  # since the last step that acted

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the coming step() acts."""
        if self._boundary is not None:
            return self._boundary
        if not self.config.managed_gradient_accumulation:
            return self._in_step
        return self._num_micro + 1 >= self.batches.accumulation

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the coming step() acts, from now on, in place of the count of micro-batches.

        Raises:
            RuntimeError: With managed_gradient_accumulation=false every step() does.
        """
        if not self.config.managed_gradient_accumulation:
            raise RuntimeError(
                "expected managed_gradient_accumulation=true in the config, got false, with which every step() is a "
                "boundary; call step() at the boundary alone, or remove the key"
            )
        self._boundary = is_boundary

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At an accumulation boundary: the optimizer's step, cleared gradients, the schedule's step.

        After a step that was skipped for an overflow the schedule stays where it is. To know that is to wait for the
        device, so it is asked only where there are both a schedule and a loss scale.

        Args:
            lr_kwargs: For the schedule's step.
        """
        self._in_step = True
        try:
            self._stepped = self.is_gradient_accumulation_boundary()
            if self._stepped:
                with self.timers.phase("step"):
                    self._take_step(lr_kwargs or {})
                self._report()
        finally:
            self._in_step = False
        self._micro_steps += 1
        self._num_micro = 0 if self._stepped else self._num_micro + 1

    def _take_step(self, lr_kwargs: dict[str, Any]) -> None:
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
        if self.lr_scheduler is not None and (not self.is_scaled or self.optimizer.was_step_applied):
            self.lr_scheduler.step(**(lr_kwargs or self._increment()))

    def _increment(self) -> dict[str, int]:
        """What Megatron's schedules want, which count samples: `step(increment)`."""
        wanted = inspect.signature(self.lr_scheduler.step).parameters.get("increment")
        return {} if wanted is None or wanted.default is not wanted.empty else {"increment": self.batches.train}

    def _report(self) -> None:
        """To the monitors and the log."""
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
        """The optimizer's."""
        if self._used_no_sync:
            drop_unsent_gradients(self.module)
        self.optimizer.zero_grad(set_to_none)

    # ---- what can be asked -----------------------------------------------------------------------------------------

    def was_step_applied(self) -> bool:
        """Whether the last step() changed the weights. Reads the device."""
        return self._stepped and self.optimizer.was_step_applied

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the averaged, unscaled gradients in the last step, before clipping. Reads the device."""
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped for an overflow. Reads the device."""
        return self.optimizer.skipped_steps

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1.0 without one. Reads the device."""
        return self.optimizer.loss_scale

    def get_loss_scale(self) -> float:
        """As `cur_scale`."""
        return self.cur_scale

    def get_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The betas of each group."""
        return [group["betas"] if "betas" in group else group["momentum"] for group in self.optimizer.param_groups]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The module's: torch.compile in place."""
        self.module.compile(*args, **kwargs)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Nothing on a CPU, whose states lie in memory of the host. Refused on a GPU.

        Raises:
            NotImplementedError: On a GPU.
        """
        if self.device.type != "cpu":
            raise NotImplementedError(
                f"got offload_states() on {self.device}, which is not supported: states stay where they are; set "
                f"zero_optimization.offload_optimizer.device to cpu, which keeps them in memory of the host"
            )

    reload_states = offload_states

    def empty_partition_cache(self) -> None:
        """Have modules of stage 3 let go of whole weights."""
        reshard(self.module)

    def destroy(self) -> None:
        """Leave the process group, if initialize() or zero.Init before it joined it. The engine is of no use then."""
        if self._leaves_group:
            launcher.leave()
            self._leaves_group = False
