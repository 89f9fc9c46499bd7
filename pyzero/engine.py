"""initialize() and the engine: DeepSpeed's names over a plain model, a FusedZeroAdam and a schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader, DistributedSampler

from pyzero import comm, schedules
from pyzero.adam import FusedZeroAdam
from pyzero.config import Config
from pyzero.config_reader import load

log = logging.getLogger("pyzero")

_HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize")
_REFUSED = ("amsgrad", "differentiable")
_MOOT = ("foreach", "capturable", "fused")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Engine, FusedZeroAdam, DataLoader[Any] | None, LRScheduler | None]:
    """DeepSpeed's entry point, with its argument names and order.

    Joins the ranks that a launcher started (RANK and WORLD_SIZE are set); without one it runs alone.

    Args:
        args: An object with `deepspeed_config`, a path; used where `config` is not given.
        model: Any module. With fp16 or bf16 enabled its weights are converted; its parameters stay the same objects.
        optimizer: A torch Adam or AdamW, which becomes a FusedZeroAdam with its groups and hyper-parameters, or a
            FusedZeroAdam, which is used as it is. It goes before the config's `optimizer`.
        model_parameters: Parameters or groups for the config's `optimizer`; default: all of the model's.
        training_data: A dataset, for the data loader that is returned.
        lr_scheduler: A torch scheduler, or a function from optimizer to scheduler. Goes before the config's.
        distributed_port: Ignored; torchrun's is used.
        mpu: Not supported.
        dist_init_required: False: the process group is there already, or not wanted.
        collate_fn: Of the data loader.
        config: A dict, a path or JSON text; see pyzero.config.
        mesh_param: Not supported.
        config_params: Old name of `config`.

    Returns:
        (engine, optimizer, data loader or None, scheduler or None).

    Raises:
        ValueError: In the config, or in what the optimizer asks for.
        TypeError: An optimizer other than Adam or AdamW.
    """
    if model is None:
        raise ValueError("expected a model, got None; pass model=")
    for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
        if value is not None:
            raise ValueError(f"got {name}, which is not supported; leave it out, the ranks are all data-parallel")
    given = next((c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None), None)
    if given is None:
        raise ValueError("expected a config, got none; pass config= as a dict, a path or JSON text")
    settings = load(given)
    joined = dist_init_required is not False and comm.join()
    _convert(model, settings)
    ours = _make_optimizer(model, optimizer, model_parameters, settings)
    schedule = _make_schedule(lr_scheduler, ours, settings)
    engine = Engine(model, ours, schedule, settings, leaves_group=joined)
    loader = None if training_data is None else _make_loader(training_data, collate_fn, engine)
    return engine, ours, loader, schedule


class Engine(nn.Module):
    """A model with its optimizer and schedule; `initialize` makes one."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: FusedZeroAdam,
        lr_scheduler: LRScheduler | None,
        config: Config,
        leaves_group: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.config = config
        self.device = comm.device()
        self.rank, self.world_size = comm.rank_and_size()
        self.batches = config.batches(self.world_size)
        self.micro_steps = 0  # backward passes that were followed by step()
        self.global_steps = 0  # optimizer steps, skipped ones too
        self._input_dtype = _wanted_dtype(config)  # None: inputs are left alone
        self._leaves_group = leaves_group
        self._stepped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, on inputs cast to the weights' dtype where fp16 or bf16 is enabled. Outputs are left alone."""
        if self._input_dtype is not None:
            args, kwargs = _cast(args, self._input_dtype), _cast(kwargs, self._input_dtype)
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Backward of the loss divided by the number of accumulation steps, and scaled. Returns the divided loss.

        Raises:
            RuntimeError: In torch's backward; where a loss function mixed dtypes, with what to do about it.
        """
        divided = loss / self.batches.accumulation
        try:
            self.optimizer.backward(divided, retain_graph=retain_graph)
        except RuntimeError as error:
            if "Found dtype" not in str(error):
                raise
            # 16-bit outputs and fp32 targets, as a rule. torch's message names no loss and no remedy.
            raise RuntimeError(
                f"got tensors of two dtypes in a loss ({error}), wanted one: torch has no backward of huber_loss "
                "(older torch: of mse_loss) for a mix; cast before the loss, as in mse_loss(outputs.float(), targets)"
            ) from error
        return divided

    def step(self) -> None:
        """At an accumulation boundary: the optimizer's step, cleared gradients, the schedule's step.

        After a step that was skipped for an overflow the schedule stays where it is. To know that is to wait for the
        device, so it is asked only where there are both a schedule and a loss scale.
        """
        self._stepped = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        if not self._stepped:
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.global_steps += 1
        if self.lr_scheduler is not None:
            scales = self.config.fp16.enabled is True
            if not scales or self.optimizer.was_step_applied:
                self.lr_scheduler.step()
        every = self.config.steps_per_print
        if every and self.global_steps % every == 0 and self.rank == 0:
            log.info("step=%d, skipped=%d, lr=%s", self.global_steps, self.skipped_steps, self.get_lr())

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the coming step() acts."""
        return (self.micro_steps + 1) % self.batches.accumulation == 0

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

    def get_lr(self) -> list[float]:
        """The learning rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward in here sends nothing; see FusedZeroAdam.no_sync."""
        return self.optimizer.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def train_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.batches.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per backward on one rank."""
        return self.batches.micro

    def gradient_accumulation_steps(self) -> int:
        """Backward passes per optimizer step."""
        return self.batches.accumulation

    def destroy(self) -> None:
        """Leave the process group, if initialize() joined it. The engine is of no use afterwards."""
        if self._leaves_group:
            comm.leave()
            self._leaves_group = False


def _wanted_dtype(config: Config) -> torch.dtype | None:
    if config.fp16.enabled is True:
        return torch.float16
    return torch.bfloat16 if config.bf16.enabled is True else None


def _convert(model: nn.Module, config: Config) -> None:
    """To this rank's device and the wanted dtype, in place: an optimizer goes on holding the model's parameters."""
    before = [id(param) for param in model.parameters()]
    model.to(device=comm.device(), dtype=_wanted_dtype(config))
    assert before == [id(param) for param in model.parameters()]


def _make_optimizer(model: nn.Module, optimizer: Any, model_parameters: Any, config: Config) -> FusedZeroAdam:
    if isinstance(optimizer, FusedZeroAdam):
        return optimizer
    element_size = 4 if _wanted_dtype(config) is None else 2
    extra = config.zero_optimization.arguments(element_size)
    extra["loss_scale"] = config.fp16.policy() if config.fp16.enabled is True else "auto"
    if config.gradient_clipping != "auto" and config.gradient_clipping > 0:
        extra["max_grad_norm"] = config.gradient_clipping
    if optimizer is not None:
        _check_held(model, optimizer)
        return FusedZeroAdam(groups_of(optimizer), **extra)
    if config.optimizer is None:
        raise ValueError('expected an optimizer, got none; pass optimizer= or set "optimizer" in the config')
    params = model.parameters() if model_parameters is None else model_parameters
    return FusedZeroAdam(
        params, **config.optimizer.arguments(), decoupled_weight_decay=config.optimizer.decoupled(), **extra
    )


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A torch Adam's or AdamW's groups, for FusedZeroAdam.

    Raises:
        TypeError: Another optimizer.
        ValueError: An option that FusedZeroAdam lacks, or state that would be lost.
    """
    name = type(optimizer).__name__
    if type(optimizer) not in (Adam, AdamW):
        raise TypeError(f"expected torch.optim.Adam or AdamW, or a FusedZeroAdam, got {name}; pass one of these")
    if optimizer.state:
        raise ValueError(
            f"expected a fresh {name}, got one that has taken steps; pass it to initialize() before training"
        )
    for option in _REFUSED:
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"got {name}({option}=True), which FusedZeroAdam does not support; leave it out")
    groups = []
    for group in optimizer.param_groups:
        copy = {key: value for key, value in group.items() if key not in (*_REFUSED, *_MOOT)}
        copy["decoupled_weight_decay"] = isinstance(optimizer, AdamW)
        groups.append(copy)
    return groups


def _check_held(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(param) for param in model.parameters()}
    strangers = sum(id(param) not in held for group in optimizer.param_groups for param in group["params"])
    if strangers:
        raise ValueError(
            f"expected an optimizer over the model's parameters, got {strangers} of others; "
            "build the optimizer from model.parameters() of the same model"
        )


def _make_schedule(given: Any, optimizer: FusedZeroAdam, config: Config) -> LRScheduler | None:
    if given is None:
        return None if config.scheduler is None else schedules.from_config(config.scheduler, optimizer)
    if not isinstance(given, LRScheduler):
        return given(optimizer)  # type: ignore[no-any-return]
    _mark_as_scheduled(optimizer)
    for schedule in (given, *getattr(given, "_schedulers", ())):  # those of a chain too
        schedule.optimizer = optimizer
    return given


def _mark_as_scheduled(optimizer: Optimizer) -> None:
    """A scheduler's constructor marks its optimizer's step(); one that finds another optimizer unmarked would warn."""
    rates = [group["lr"] for group in optimizer.param_groups]
    ConstantLR(optimizer, factor=1.0)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _make_loader(data: Any, collate_fn: Any, engine: Engine) -> DataLoader[Any]:
    sampler: DistributedSampler[Any] = DistributedSampler(data, engine.world_size, engine.rank)
    return DataLoader(data, batch_size=engine.batches.micro, sampler=sampler, collate_fn=collate_fn)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors to dtype, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(item, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value
