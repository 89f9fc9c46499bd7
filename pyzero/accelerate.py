"""An Accelerator for ZeRO optimizers: the model is not wrapped, and a saved state has every rank's shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import accelerate
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from pyzero.checkpoint.loading import load_checkpoint
from pyzero.checkpoint.saving import save_checkpoint
from pyzero.comm import process
from pyzero.optimizer import ZeroOptimizer

FOLDER = "pyzero"  # in a folder of save_state: the first optimizer's checkpoint; the second's is pyzero_1
_OF_OTHERS = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


class PreparedOptimizer(AcceleratedOptimizer):
    """accelerate's wrapper of an optimizer, which reports skipped steps. Its `optimizer` is the ZeroOptimizer."""

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped, with a loss scale or without. Reads the device, as GradScaler does."""
        optimizer: ZeroOptimizer = self.optimizer
        return optimizer.grad_norm is not None and not optimizer.was_step_applied


class Accelerator(accelerate.Accelerator):
    """accelerate.Accelerator for optimizers that reduce gradients and shard their state.

    It prepares the model without DistributedDataParallel. `accumulate` and `no_sync` delay the optimizer's reduction.
    `clip_grad_norm_` and `backward` use its norm and its loss scale. `save_state` writes a pyzero checkpoint instead of
    rank 0's optimizer state, and `load_state` reads it on any number of ranks.

    Raises:
        ValueError: In `prepare`: the launch partitions the model in another way, or nothing would reduce gradients.
        TypeError: In `prepare`: it is torch's optimizer on several ranks, and nothing would average its gradients.
    """

    _optimizers: list[Any]  # accelerate's list of what prepare_optimizer returned

    @classmethod
    def take_over(cls, accelerator: accelerate.Accelerator) -> None:
        """Turn an accelerate.Accelerator, such as the one that transformers' Trainer builds, into one of this class."""
        if type(accelerator) is not accelerate.Accelerator:
            raise TypeError(f"expected an accelerate.Accelerator, got a {type(accelerator).__name__}")
        accelerator.__class__ = cls

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """Prepare objects as accelerate does."""
        kind = self.distributed_type.name
        if kind in _OF_OTHERS:
            raise ValueError(
                f"expected ranks that pyzero reduces over, got a launch for {kind}, which partitions the model by "
                f"itself; leave its plugin out, or use accelerate.Accelerator"
            )
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = True
    ) -> Any:
        """Prepare a model as accelerate does (autocast, torch.compile, device), but without DDP around it."""
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Any:
        """Prepare an optimizer as accelerate does, but do not pass its state through a state dict."""
        if isinstance(optimizer, PreparedOptimizer):
            return super().prepare_optimizer(optimizer)
        _, num_ranks = process.rank_and_size()
        if num_ranks != self.num_processes:
            raise ValueError(
                f"expected an Accelerator of all {num_ranks} ranks, got one of {self.num_processes}, which would not "
                f"share out the data; pass Accelerator(cpu=True) on CPUs"
            )
        if num_ranks > 1 and not isinstance(optimizer, ZeroOptimizer):
            raise TypeError(
                f"expected an optimizer of pyzero's, which averages gradients, got {type(optimizer).__name__} on "
                f"{num_ranks} ranks; build FusedZeroAdamW, or use accelerate.Accelerator"
            )
        if not isinstance(optimizer, ZeroOptimizer):
            return super().prepare_optimizer(optimizer, device_placement)
        if num_ranks > 1 and not optimizer.reduces_grads:
            raise ValueError(
                f"expected an optimizer that averages gradients, got one with reduce_grads=False, or built before the "
                f"Accelerator, on {num_ranks} ranks; build it after the Accelerator, without reduce_grads"
            )
        prepared = PreparedOptimizer(optimizer, device_placement=False, scaler=self.scaler)
        self._optimizers.append(prepared)
        return prepared

    def _zero_optimizers(self) -> list[ZeroOptimizer]:
        return [one.optimizer for one in self._optimizers if isinstance(one, PreparedOptimizer)]

    # ---- the step --------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Run backward as accelerate does, with the optimizer's loss scale if there is one and no GradScaler."""
        scaling = [one for one in self._zero_optimizers() if one.scales_loss]
        if self.scaler is not None or not scaling:
            super().backward(loss, **kwargs)
        elif len(self._optimizers) == 1:
            scaling[0].backward(loss / self.gradient_accumulation_steps, **kwargs)
        else:  # only the caller knows which optimizer's loss scale this loss should have
            raise ValueError(
                f"expected one optimizer where one has a loss scale, got {len(self._optimizers)}, {len(scaling)} with "
                f"a loss scale; call the backward of the one that the loss is for, prepared.optimizer.backward(loss), "
                f"or give all parameters of the loss to one optimizer"
            )

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip as accelerate does. If these are a ZeRO optimizer's parameters, that optimizer clips."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        trained = {param for param in params if param.requires_grad}
        for optimizer in self._zero_optimizers():
            if {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad} == trained:
                self.unscale_gradients()
                return optimizer.clip_grad_norm_(max_norm, norm_type)
        clipped: Tensor = super().clip_grad_norm_(params, max_norm, norm_type)
        return clipped

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """A context in which the optimizers that train this model do not reduce gradients."""
        params = set(model.parameters())
        with ExitStack() as stack:
            for optimizer in self._zero_optimizers():
                if any(param in params for group in optimizer.param_groups for param in group["params"]):
                    stack.enter_context(optimizer.no_sync())
            yield

    # ---- state -----------------------------------------------------------------------------------------------------

    def save_state(self, output_dir: Any = None, safe_serialization: bool = True, **save_model_func_kwargs: Any) -> Any:
        """Save as accelerate does, with a checkpoint of each ZeRO optimizer in the folder. Every rank calls it."""
        with self._without_zero_optimizers():
            folder = super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        self._each(folder, lambda place, **pair: save_checkpoint(place, step=0, **pair))
        return folder

    def load_state(self, input_dir: Any = None, load_kwargs: Any = None, **load_model_func_kwargs: Any) -> None:
        """Load as accelerate does, on any number of ranks. Every rank calls it."""
        folders: list[str] = []
        hook = self.register_load_state_pre_hook(lambda models, folder: folders.append(folder))
        try:
            with self._without_zero_optimizers():
                super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
        finally:
            hook.remove()
        self._each(folders[0], load_checkpoint)

    @contextmanager
    def _without_zero_optimizers(self) -> Iterator[None]:
        """Hide ZeRO optimizers from accelerate, which would save rank 0's part and load it on every rank."""
        prepared = self._optimizers
        self._optimizers = [one for one in prepared if not isinstance(one, PreparedOptimizer)]
        try:
            yield
        finally:
            self._optimizers = prepared

    def _each(self, folder: str | Path, act: Callable[..., Any]) -> None:
        for index, optimizer in enumerate(self._zero_optimizers()):
            model = self._model_of(optimizer)
            act(Path(folder) / (f"{FOLDER}_{index}" if index else FOLDER), model=model, optimizer=optimizer)

    def _model_of(self, optimizer: ZeroOptimizer) -> nn.Module:
        """Return the prepared model that holds the optimizer's parameters, or several models as one module."""
        params = {param for group in optimizer.param_groups for param in group["params"]}
        models: list[nn.Module] = []
        model: nn.Module
        for model in self._models:
            held = params.intersection(model.parameters())
            if held == params:
                return model
            if held:
                models.append(model)
        if not models:
            raise ValueError(
                "expected the model of each optimizer to be prepared, got an optimizer without; pass both to "
                "accelerator.prepare(model, optimizer)"
            )
        return models[0] if len(models) == 1 else nn.ModuleList(models)


def zero_optimizer_of(optimizer: Any) -> ZeroOptimizer | None:
    """Return the ZeroOptimizer in what `prepare` returned; None for another optimizer."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner if isinstance(inner, ZeroOptimizer) else None
