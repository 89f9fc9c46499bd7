"""The engine's methods that report its config, with DeepSpeed's names."""

from __future__ import annotations

from typing import Any

from pyzero.deepspeed.config.deepspeed_config import DeepSpeedConfig
from pyzero.deepspeed.config.schema import Batches, Config
from pyzero.deepspeed.config.zero_section import OffloadOptimizerSection, OffloadParamSection
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.optimizer import ZeroOptimizer


class EngineSettings:
    """The part of Engine that reports its config."""

    config: Config
    batches: Batches
    optimizer: ZeroOptimizer
    parallel: Parallelism

    @property
    def _config(self) -> DeepSpeedConfig:
        """The config as DeepSpeed's object, with the present batch sizes."""
        return DeepSpeedConfig.of_engine(self.config, self.batches)

    def train_batch_size(self) -> int:
        """Return the samples per optimizer step, over all ranks."""
        return self.batches.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the samples per backward on one rank."""
        return self.batches.micro

    def gradient_accumulation_steps(self) -> int:
        """Return the number of backward passes per optimizer step."""
        return self.batches.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the number of accumulation steps to fit this batch size, from the next micro-batch on.

        Raises:
            ValueError: The micro-batches of all ranks do not divide it.
        """
        self.batches = Batches.solve(train_batch_size, self.batches.micro, None, self.parallel.num_batch_ranks)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the number of samples per backward on one rank, and with it the number per step.

        Raises:
            ValueError: It is below 1.
        """
        accumulation, num_ranks = self.batches.accumulation, self.parallel.num_batch_ranks
        self.batches = Batches.solve(None, micro_batch_size, accumulation, num_ranks)

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return (train batch, micro-batch, accumulation steps)."""
        return self.batches.train, self.batches.micro, self.batches.accumulation

    def managed_gradient_accumulation(self) -> bool:
        """Return whether step() counts micro-batches."""
        return self.config.managed_gradient_accumulation

    @property
    def is_scaled(self) -> bool:
        """Whether there is a loss scale."""
        return self.optimizer.scales_loss

    def fp16_enabled(self) -> bool:
        """Return whether the model was converted to fp16."""
        return self.config.is_fp16

    def bfloat16_enabled(self) -> bool:
        """Return whether the model was converted to bf16."""
        return self.config.is_bf16

    def torch_autocast_enabled(self) -> bool:
        """Return whether the module runs in torch.autocast."""
        return self.config.torch_autocast.enabled is True

    def dynamic_loss_scale(self) -> bool:
        """Return whether there is a loss scale that is not fixed."""
        return self.is_scaled and self.config.fp16.loss_scale == 0

    def loss_scale(self) -> float:
        """Return the config's loss scale; 0 means dynamic. `get_loss_scale()` returns the present one."""
        return self.config.fp16.loss_scale

    def zero_optimization(self) -> bool:
        """Return whether the config asks for a stage above 0."""
        return self.config.zero_optimization.stage > 0

    def zero_optimization_stage(self) -> int:
        """Return the config's stage."""
        return self.config.zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        """Return whether the config asks for stage 2 or 3."""
        return self.config.zero_optimization.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Return whether the config asks for stage 3."""
        return self.config.zero_optimization.stage >= 3

    def zero_offload_optimizer(self) -> OffloadOptimizerSection | None:
        """Return the config's `offload_optimizer`; None without one."""
        return self.config.zero_optimization.optimizer_offload()

    def zero_offload_param(self) -> OffloadParamSection | None:
        """Return the config's `offload_param`; None without one."""
        return self.config.zero_optimization.param_offload()

    def zero_use_cpu_optimizer(self) -> bool:
        """Return whether the config keeps masters and moments in host memory. nvme does too."""
        return self.config.zero_optimization.offloads_optimizer()

    def zero_cpu_offload(self) -> bool:
        """Return whether the config's `offload_optimizer.device` is cpu."""
        section = self.zero_offload_optimizer()
        return section is not None and section.device == "cpu"

    def gradient_clipping(self) -> float:
        """Return the norm that gradients are clipped to; 0.0 without clipping."""
        return self.config.max_grad_norm() or 0.0

    def steps_per_print(self) -> int | None:
        """Return the number of optimizer steps from one log line to the next."""
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Return whether phases are timed."""
        return self.config.wall_clock_breakdown

    def optimizer_name(self) -> str | None:
        """Return the optimizer's name in the config, in lower case."""
        return self.config.optimizer_name()

    def optimizer_params(self) -> dict[str, Any] | None:
        """Return the optimizer's parameters that the config sets."""
        return self.config.optimizer_params()

    def scheduler_name(self) -> str | None:
        """Return the scheduler's name in the config."""
        return self.config.scheduler_name()

    def scheduler_params(self) -> dict[str, Any] | None:
        """Return the scheduler's parameters that the config sets."""
        return self.config.scheduler_params()

    def communication_data_type(self) -> Any:
        """Return the dtype in which gradients are sent; None: the weights'."""
        return self.config.grad_reduce_dtype()
