"""The update of this rank's shards: picks the parameters, counts their steps, and runs the rule slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyzero import ops
from pyzero.gradients.grad_stats import GlobalGradStats
from pyzero.ops.step_scalars import NUM_SCALARS
from pyzero.sharding.buckets import Bucket
from pyzero.update_rule import GradList

log = logging.getLogger("pyzero")


class StepScalars(NamedTuple):
    """The numbers that all elements of one step share. Valid until the next step. See pyzero.ops.step_scalars_."""

    found_inf: Tensor  # (1,) fp32; if it is not zero, nothing is written
    norm: Tensor  # 0-D fp32: global 2-norm of the gradients with all factors, before clipping to max_norm
    clip: Tensor  # 0-D fp32: the clip coefficient
    grad_scale: Tensor  # 0-D fp32: factor for the gradients
    used: Sequence[Tensor]  # by bucket: (num_params,) fp32, 1 for a parameter with a gradient on any rank


class ShardUpdater:
    """Runs update rules over buckets.

    Args:
        device: Device of the buckets.
        backend: Backend of the ops.
    """

    def __init__(self, device: torch.device, backend: str) -> None:
        self._backend = backend
        self._pattern: tuple[tuple[Bucket, ...], tuple[bool, ...]] | None = None
        self._used = torch.empty(0, dtype=torch.float32)  # StepScalars.used of all buckets, side by side
        self._seen_by_graphs: list[Tensor] = []  # a CUDA graph does not keep memory alive that is older than it
        self._out = torch.zeros(NUM_SCALARS, dtype=torch.float32, device=device)  # written by each step
        norm, clip, grad_scale = self._out[1:].unbind()
        self._scalars = StepScalars(self._out[:1], norm, clip, grad_scale, used=())

    def count_step(
        self,
        buckets: Sequence[Bucket],
        steps: Tensor,
        stats: GlobalGradStats,
        max_norm: float | None,
        factor: Tensor | None,
    ) -> StepScalars:
        """Compute the step's scalars. Count the step for parameters with a gradient, unless it is skipped.

        Args:
            buckets: All buckets.
            steps: (num_params,) fp32, the buckets' step counts side by side.
            stats: Statistics of the gradients.
            max_norm: The norm to clip to, or None.
            factor: 0-D, a factor for the gradients beside `stats.unscale`, or None.
        """
        self.take_pattern(tuple(buckets), stats.used, stats.rows.device)
        ops.step_scalars_(
            self._out,
            stats.rows,
            steps=steps,
            used=self._used,
            max_norm=max_norm,
            unscale=1.0 if stats.unscale is None else stats.unscale,
            factor=1.0 if factor is None else factor,
            backend=self._backend,
        )
        return self._scalars

    def take_pattern(self, buckets: tuple[Bucket, ...], used: tuple[bool, ...], device: torch.device) -> None:
        """Copy to the device which parameters have a gradient, if these changed since the last step.

        Raises:
            RuntimeError: They changed while a CUDA graph is being captured.
        """
        if self._pattern == (buckets, used):
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "expected gradients for the same parameters as in the step before the capture of a CUDA graph, got "
                "others; run one step eagerly with these gradients, then capture"
            )
        rows = [used[number] for bucket in buckets for number in bucket.numbers]
        self._pattern = buckets, used
        # Pinned, so that the host does not wait, because the pattern may change in every step (experts, heads).
        on_host = torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
        self._used = on_host.to(device, non_blocking=True)
        used_by_bucket = self._used.split([len(bucket.numbers) for bucket in buckets])
        self._scalars = self._scalars._replace(used=used_by_bucket)

    def keep_for_graph(self, steps: Tensor, param_groups: Sequence[dict[str, Any]]) -> None:
        """Keep tensors alive whose addresses a CUDA graph has captured. Called after the captured step.

        Args:
            steps: As in `count_step`.
            param_groups: The optimizer's groups. A load may replace their learning rates by other tensors.
        """
        rates = [group["lr"] for group in param_groups if isinstance(group.get("lr"), Tensor)]
        self._seen_by_graphs += [self._used, steps, *rates]

    def update(
        self,
        bucket: Bucket,
        grads: Iterator[tuple[int, Tensor | GradList]],
        param_groups: Sequence[dict[str, Any]],
        scalars: StepScalars,
    ) -> None:
        """Update this rank's shard of one bucket.

        Args:
            bucket: The bucket. Masters, weights and state of its shard are written.
            grads: Its gradients: where each begins in the shard, and (n,) values, or a GradList of one run.
            param_groups: The optimizer's groups.
            scalars: From `count_step`.
        """
        for begin, grad in grads:
            for shard in bucket.run_shards(begin, begin + grad.numel()):
                is_all = isinstance(grad, GradList) or shard.high - shard.low == grad.numel()
                bucket.rule.update(
                    shard,
                    grad if is_all else grad[shard.low - begin : shard.high - begin],
                    _on(bucket.device, param_groups[shard.group_index]),
                    grad_scale=scalars.grad_scale,
                    found_inf=scalars.found_inf,
                    used=scalars.used[bucket.index],
                    backend=self._backend,
                )
            del grad


def check_capture(device: torch.device, num_ranks: int, is_first: bool, param_groups: Sequence[dict[str, Any]]) -> bool:
    """Whether a CUDA graph is being captured. Raise, before anything is recorded, if it would replay wrongly."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return False
    wanted = "expected a step that a CUDA graph can replay"
    if num_ranks > 1:
        raise RuntimeError(
            f"{wanted}, got {num_ranks} ranks, whose hosts talk in each; run backward and step() eagerly"
        )
    if is_first:
        raise RuntimeError(f"{wanted}, got the first, which loads kernels; run one step before the capture")
    for group in param_groups:
        lr = group.get("lr")
        if lr is None:
            continue
        if not isinstance(lr, Tensor):
            log.warning("lr=%s is recorded in the CUDA graph as it is; to change it pass a tensor on the GPU", lr)
        elif lr.device != device:
            raise RuntimeError(
                f"{wanted}, got lr as a tensor on {lr.device}; pass torch.tensor({float(lr)}, device='cuda'), and "
                f"change it with fill_()"
            )
    return True


def _on(device: torch.device, group: dict[str, Any]) -> dict[str, Any]:
    """Return the group. If its learning rate is a tensor on a GPU, make that 0-D and on the device."""
    lr = group.get("lr")
    if not isinstance(lr, Tensor):
        return group
    return {**group, "lr": lr.item() if lr.is_cpu else lr.reshape(()).to(device, non_blocking=True)}
