"""The update of this rank's shards: which parameters take part, their step counts, and the rule, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyzero.buckets import Bucket
from pyzero.update_rule import UpdateRule


class ShardUpdater:
    """Runs an update rule over buckets.

    Args:
        rule: It.
        backend: Of the ops.
    """

    def __init__(self, rule: UpdateRule, backend: str) -> None:
        self._rule = rule
        self._backend = backend
        self._pattern: tuple[tuple[Bucket, ...], tuple[bool, ...]] | None = None
        self._used: list[Tensor] = []  # by bucket: (num_params,) fp32 on the device, 1 for a parameter with a gradient

    def begin(self, buckets: Sequence[Bucket], used: tuple[bool, ...], found_inf: Tensor) -> None:
        """Count the step of the parameters that have a gradient, unless it is skipped.

        Args:
            buckets: All that `update` will be called with in this step.
            used: By parameter number.
            found_inf: (1,) fp32.

        Raises:
            RuntimeError: A CUDA graph is being captured, and other parameters have gradients than in the step before.
        """
        self._remember(tuple(buckets), used)
        if self._used:
            steps = [bucket.steps for bucket in buckets]
            torch._foreach_add_(steps, torch._foreach_mul(self._used, 1.0 - found_inf.reshape(())))

    def _remember(self, buckets: tuple[Bucket, ...], used: tuple[bool, ...]) -> None:
        if self._pattern == (buckets, used):
            return
        self._pattern, self._used = (buckets, used), []
        if not buckets:
            return
        if buckets[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._pattern = None
            raise RuntimeError(
                "expected gradients for the same parameters as in the step before the capture of a CUDA graph, got "
                "others; run one step eagerly with these gradients, then capture"
            )
        rows = [used[number] for bucket in buckets for number in bucket.numbers]
        everyones = torch.tensor(rows, dtype=torch.float32, device=buckets[0].device)
        self._used = list(everyones.split([len(bucket.numbers) for bucket in buckets]))

    def update(
        self,
        bucket: Bucket,
        index: int,
        grads: Iterator[tuple[int, Tensor]],
        param_groups: Sequence[dict[str, Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor,
    ) -> None:
        """One bucket's.

        Args:
            bucket: Its shard is written: masters, weights, state.
            index: Of the bucket, among those that `begin` was called with.
            grads: Pieces of its gradient: where each begins in the shard, and (n,) values.
            param_groups: The optimizer's.
            grad_scale: 0-D, multiplies the gradient; None: 1.
            found_inf: (1,) fp32; where it is not zero nothing is written.
        """
        for begin, grad in grads:
            for shard in bucket.run_shards(begin, begin + grad.numel()):
                is_all = shard.high - shard.low == grad.numel()
                self._rule.update(
                    shard,
                    grad if is_all else grad[shard.low - begin : shard.high - begin],
                    _on(bucket.device, param_groups[shard.group_index]),
                    grad_scale=1.0 if grad_scale is None else grad_scale,
                    found_inf=found_inf,
                    used=self._used[index],
                    backend=self._backend,
                )
            del grad


def _on(device: torch.device, group: dict[str, Any]) -> dict[str, Any]:
    """A group whose learning rate, if it is a tensor, is 0-D on the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return group
    return {**group, "lr": lr.reshape(()).to(device, non_blocking=True)}
