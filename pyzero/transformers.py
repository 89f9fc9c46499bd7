"""transformers' Trainer with its optimizer state sharded: `from pyzero.transformers import Trainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME

from pyzero.accelerate import FOLDER, Accelerator, zero_optimizer_of
from pyzero.checkpoint.loading import load_checkpoint
from pyzero.checkpoint.saving import save_checkpoint
from pyzero.optimizer import ZeroOptimizer
from pyzero.optimizers.adam import FusedZeroAdam, FusedZeroAdamW
from pyzero.optimizers.sgd import FusedZeroSGD

log = logging.getLogger("pyzero")

_OURS: dict[Any, type[ZeroOptimizer]] = {
    torch.optim.AdamW: FusedZeroAdamW,
    torch.optim.Adam: FusedZeroAdam,
    torch.optim.SGD: FusedZeroSGD,
}
_STATE_OF_TORCH = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)  # files that transformers writes for torch's optimizers


class ZeroTrainerMixin:
    """A mixin for any Trainer: `class ZeroSFTTrainer(ZeroTrainerMixin, SFTTrainer)`.

    TrainingArguments stay as they are. The optimizer is FusedZeroAdamW if `optim` names AdamW (the default), and
    FusedZeroSGD if it names SGD. `optimizer_cls_and_kwargs` and `optimizers` override it. The model is not wrapped in
    DistributedDataParallel. Logs show `skipped_steps`, and `loss_scale` if there is one. A checkpoint has the folder
    pyzero instead of optimizer.pt, and resumes on any number of ranks. A checkpoint with torch's AdamW resumes too.
    """

    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, and turn it into pyzero's."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        Accelerator.take_over(self.accelerator)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return pyzero's class for the optimizer that TrainingArguments name, and its arguments.

        Raises:
            ValueError: pyzero has no such optimizer.
        """
        named, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        if named not in _OURS:
            raise ValueError(
                f"expected optim='adamw_torch', 'adamw_torch_fused' or 'sgd', got {args.optim!r}; change it, or pass "
                f"optimizer_cls_and_kwargs=(FusedZeroLion, {{'lr': 1e-4}})"
            )
        return _OURS[named], kwargs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with `skipped_steps`, and with `loss_scale` if there is one."""
        optimizer = zero_optimizer_of(self.optimizer)
        if "grad_norm" in logs and optimizer is not None:
            if self.accelerator.scaler is not None:
                logs["loss_scale"] = self.accelerator.scaler.get_scale()
            elif optimizer.scales_loss:
                logs["loss_scale"] = optimizer.loss_scale
            logs["skipped_steps"] = optimizer.skipped_steps
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = zero_optimizer_of(self.optimizer)
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        save_checkpoint(
            Path(output_dir) / FOLDER,
            model=self.model,
            optimizer=optimizer,
            step=self.state.global_step,
            exclude_frozen_parameters=True,  # Trainer saves the weights in another file (with peft, only adapters)
            exclude_gradients=True,  # an epoch's end or a callback may interrupt an accumulation
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = zero_optimizer_of(self.optimizer)
        if optimizer is None or checkpoint is None or not (Path(checkpoint) / FOLDER).is_dir():
            has_state = checkpoint is None or any((Path(checkpoint) / name).exists() for name in _STATE_OF_TORCH)
            if not has_state and self.args.process_index == 0:
                log.warning(
                    "resuming from %s, which has weights alone: moments, step counts and the learning rate's schedule "
                    "begin anew; save without save_only_model=True to keep them",
                    checkpoint,
                )
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        load_checkpoint(Path(checkpoint) / FOLDER, model=self.model, optimizer=optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


class Trainer(ZeroTrainerMixin, transformers.Trainer):
    """transformers.Trainer with ZeroTrainerMixin."""
