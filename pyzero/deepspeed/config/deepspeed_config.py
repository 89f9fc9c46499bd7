"""DeepSpeedConfig: the config that scripts read before they build an engine."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed import comm
from pyzero.deepspeed.config.reader import load
from pyzero.deepspeed.config.schema import Batches, Config


class DeepSpeedConfig:
    """A config, with batch sizes computed for the present number of ranks.

    Args:
        config: A dict, a path or JSON text.
        mpu: Not supported.
        mesh_device: Not supported.

    Raises:
        ValueError: The config has errors, or mpu or mesh_device is given.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        if mpu is not None or mesh_device is not None:
            raise ValueError("got mpu or mesh_device, which are not supported; leave them out")
        settings = load(config)
        self._take(settings, settings.batches(comm.get_world_size()))

    @classmethod
    def of_engine(cls, settings: Config, batches: Batches) -> DeepSpeedConfig:
        """Make one from an engine's config and batch sizes."""
        config = cls.__new__(cls)
        config._take(settings, batches)
        return config

    def _take(self, settings: Config, batches: Batches) -> None:
        self.settings = self.monitor_config = settings
        self.train_batch_size = batches.train
        self.train_micro_batch_size_per_gpu = batches.micro
        self.gradient_accumulation_steps = batches.accumulation
        self.fp16_enabled = self.settings.is_fp16
        self.bfloat16_enabled = self.settings.is_bf16
        self.zero_optimization_stage = self.settings.zero_optimization.stage
        self.zero_config = self.settings.zero_optimization
        self.zero_enabled = self.zero_optimization_stage > 0
        self.gradient_clipping = self.settings.max_grad_norm() or 0.0
        self.steps_per_print = self.settings.steps_per_print
        self.optimizer_name = self.settings.optimizer_name()
        self.optimizer_params = self.settings.optimizer_params()
        self.scheduler_name = self.settings.scheduler_name()
        self.scheduler_params = self.settings.scheduler_params()

    def __getattr__(self, name: str) -> Any:
        """Return any other top-level key, such as `wall_clock_breakdown` or `dump_state`."""
        if name == "settings" or name not in type(self.settings).model_fields:
            raise AttributeError(f"'DeepSpeedConfig' object has no attribute {name!r}")
        return getattr(self.settings, name)
