"""Split or shard a model's parameters, and update the optimizer over them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyzero.comm import process
from pyzero.deepspeed import launcher
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.parallel import tensor_parallel
from pyzero.deepspeed.parallel.mesh import Parallelism
from pyzero.deepspeed.stage_3.shard import shard
from pyzero.deepspeed.stage_3.sharded_param import ShardedParam, gather_, mark_sharded
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.local_param import is_dtensor

log = logging.getLogger("pyzero")


class Partition:
    """Splits or shards a model's parameters, and records which new parameter replaces each.

    Args:
        model: The model that has the parameters.
        optimizer: The caller's optimizer over them, or None.
        config: The script's config.
        parallel: Which ranks hold which parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Any, config: Config, parallel: Parallelism) -> None:
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._parallel = parallel
        self._new: dict[Tensor, Tensor] = {}  # the caller's parameter -> its replacement

    def split(self, plan: Mapping[str, Any] | None) -> None:
        """Split layers over the ranks that share them, for tensor parallelism."""
        self._check_optimizer("parts of tensor_parallel")
        before = dict(self._model.named_parameters(remove_duplicate=False))
        tensor_parallel.split(self._model, self._parallel, self._config.tensor_parallel, plan)
        after = dict(self._model.named_parameters(remove_duplicate=False))
        self._follow({before[name]: after[name] for name in before})

    def shard(self) -> None:
        """Shard the model by fully_shard, for stage 3."""
        self._check_optimizer("shards of stage 3")
        config = self._config
        offload = config.zero_optimization.offloads_params() and launcher.device().type != "cpu"
        sharded = shard(self._model, self._parallel, config.weights_dtype(), config.grad_reduce_dtype(), offload)
        for param in dict.fromkeys(sharded.values()):
            if is_dtensor(param):
                mark_sharded(param)
        self._follow(sharded)

    def gather(self) -> None:
        """Below stage 3, gather the weights that zero.Init sharded."""
        sharded = [param for param in self._model.parameters() if isinstance(param, ShardedParam)]
        if sharded and process.rank_and_size()[0] == 0:
            log.warning(
                "zero.Init sharded %d weights, which are made whole below stage 3; pass zero.Init this config",
                len(sharded),
            )
        for param in sharded:
            gather_(param)

    def replaced(self, value: Any) -> Any:
        """Return parameters, groups or (name, parameter) pairs with the new parameters in place of the caller's."""
        if isinstance(value, Tensor):
            return self._new.get(value, value)
        if isinstance(value, dict):
            return {key: self.replaced(item) if key == "params" else item for key, item in value.items()}
        return type(value)(map(self.replaced, value)) if isinstance(value, (list, tuple)) else value

    def moved_optimizer(self) -> Any:
        """Return the optimizer, with its parameters replaced by the new ones."""
        if isinstance(self._optimizer, Optimizer) and self._new:
            for group in self._optimizer.param_groups:
                group["params"] = self.replaced(group["params"])
        return self._optimizer

    def _follow(self, new: dict[Tensor, Tensor]) -> None:
        self._new = {**new, **{first: new.get(then, then) for first, then in self._new.items()}}

    def _check_optimizer(self, wanted: str) -> None:
        if isinstance(self._optimizer, ZeroOptimizer):
            raise ValueError(
                f"expected an optimizer that is built over the {wanted}, got {type(self._optimizer).__name__} over "
                f"whole weights; pass a function from parameters to it, or a torch optimizer"
            )
