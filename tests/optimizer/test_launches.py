"""How much a step launches: a constant, and so much per bucket, at any number of parameters."""

from typing import Any

import pytest
import torch
from launches import counted_launches
from torch import nn

import pyzero

STEP = 8  # launches of a step, whatever there is
ROUND = 2  # of a round that sends gradients


def launches(
    group: Any, num_params: int, dtype: torch.dtype, optimizer: str, options: dict[str, Any], skips: bool = False
) -> tuple[int, dict[str, int]]:
    """Number of buckets, and the launches of the third step by name; `skips`: its gradients are not finite."""
    params = [nn.Parameter(torch.full((10,), 0.01, dtype=dtype)) for _ in range(num_params)]
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:]}]
    options = {"transport": "exact", **options}  # as on GPUs: "peer" moves messages by copies
    zero = getattr(pyzero, optimizer)(groups, process_group=group, bucket_cap_mb=4e-3, **options)
    for step in range(3):
        zero.zero_grad()
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        zero.backward(loss * torch.inf if skips and step == 2 else loss)
        with counted_launches() as counts:
            zero.step()
    assert zero.was_step_applied is not skips
    return len(zero._buckets), dict(counts)


CASES = {
    "bf16, AdamW, clipped": (torch.bfloat16, "FusedZeroAdamW", {"max_grad_norm": 1e-3}),
    "fp32, AdamW": (torch.float32, "FusedZeroAdamW", {}),
    "fp16, Lion, scaled, clipped": (
        torch.float16,
        "FusedZeroLion",
        {"max_grad_norm": 1e-3, "loss_scale": pyzero.LossScale(8.0)},
    ),
    "bf16, SGD": (torch.bfloat16, "FusedZeroSGD", {"momentum": 0.9, "dampening": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_params", [10, 1000])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_launches_of_a_step(ranks, size, stage, num_params, case):
    dtype, optimizer, options = CASES[case]
    for num_buckets, counts in ranks.run(size, launches, num_params, dtype, optimizer, {"stage": stage, **options}):
        assert num_buckets >= num_params // 210  # that many of 16 bits in one, and half as many of fp32
        runs = num_buckets + 1  # the bucket with two groups updates each
        limit = STEP + runs
        if (size, stage) == (2, 1):  # the round of stage 2 is in backward
            assert counts.pop("pyzero pack_") == num_buckets  # into the buffer that is sent
            limit += ROUND + runs
        assert sum(counts.values()) <= limit, counts


def test_a_skipped_step_does_not_look_at_one_parameter_after_another(ranks):
    for num_params in (100, 1000):
        ((num_buckets, counts),) = ranks.run(1, launches, num_params, torch.bfloat16, "FusedZeroAdamW", {}, True)
        del counts["_foreach_norm"]
        assert sum(counts.values()) <= STEP + 16 * num_buckets, counts


def copied_to_device(group: Any) -> list[Any]:
    """By torch.tensor and as_tensor, where the host waits for a GPU, in steps whose used parameters change."""
    copied: list[Any] = []
    for optimizer in (pyzero.FusedZeroAdamW, pyzero.ZeroLamb):
        params = [nn.Parameter(torch.full((10,), 0.01)) for _ in range(5)]
        watch_steps(optimizer(params, process_group=group, transport="exact"), params, copied)
    return copied


def watch_steps(zero: Any, params: list[nn.Parameter], copied: list[Any]) -> None:
    def watched(make: Any) -> Any:
        def call(values: Any, **options: Any) -> torch.Tensor:
            if isinstance(options.get("device"), torch.device):  # "cpu" is the host's own
                copied.append(values)
            return make(values, **options)

        return call

    for step in range(4):
        zero.zero_grad()
        torch.stack([(p * p).sum() for p in params[step % 2 :]]).sum().backward()
        with pytest.MonkeyPatch.context() as patch:
            if step > 1:  # the first in each pattern may
                patch.setattr(torch, "tensor", watched(torch.tensor))
                patch.setattr(torch, "as_tensor", watched(torch.as_tensor))
            torch.nn.utils.clip_grad_norm_(params, 1e-3)
            torch.nn.utils.clip_grad_norm_(params, 1e-3, norm_type=float("inf"))
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 0.5)
            zero.clip_grad_norm_(1e-3, norm_type=3.0)
            zero.step()


@pytest.mark.parametrize("size", [1, 2])
def test_values_of_the_host_reach_a_gpu_without_waiting(ranks, size):
    assert ranks.run(size, copied_to_device) == [[]] * size
