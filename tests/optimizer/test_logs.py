"""What is the same on all ranks is logged on the first alone: of a host's, what its kernels are."""

import logging
from typing import Any

import pytest
import torch
from logs import logged
from torch import nn

import pyzero
from pyzero.ops import native, registry

CPU = torch.device("cpu")


def told_of_steps(group: Any) -> list[str]:
    """What a rank logs of steps of fp16 and bf16 weights, of a state without a loss scale, and of a write."""
    registry.forget()
    with logged(logging.INFO) as lines:
        optimizers = []
        for dtype in (torch.float16, torch.bfloat16):
            model = nn.Linear(4, 3).to(dtype)
            optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group, cpu_offload=True)
            model(torch.ones(2, 4, dtype=dtype)).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizers.append(optimizer)
        with torch.no_grad():
            model.weight.mul_(2)
        optimizers[0].load_state_dict(optimizers[1].full_state_dict())
    return lines


def test_what_all_ranks_would_log_is_logged_by_the_first(ranks):
    first, second = ranks.run(2, told_of_steps)
    text = "\n".join(first)
    for told in (
        "adam_ on cpu tensors: backend",
        "fp16 weights from a plain backward",
        "cpu_offload has nothing to do",
        "1 parameters were written outside",
        "has no loss scale",
    ):
        assert told in text
    assert second == []


def told_of_kernels(group: Any, environ: dict[str, str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, logged(logging.INFO) as lines:
        for name in ("RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setenv("PYZERO_JIT", "0")
        patch.setattr(native, "ahead_of_time_path", lambda kind: None)
        registry.forget()
        registry.pick("adam_", "auto", CPU)
        patch.undo()
        registry.forget()
    return lines


def test_a_host_without_kernels_is_told_of_once(ranks):
    first, second = ranks.run(2, told_of_kernels, {})
    assert "slow reference" in first[0] and "adam_ on cpu tensors: backend reference" in first[1] and second == []
    for lines in ranks.run(2, told_of_kernels, {"LOCAL_RANK": "0"}):  # each is the first of its host
        assert len(lines) == 2
    assert told_of_kernels(None, {"RANK": "1"}) == [], "of a launcher whose ranks have not met yet"
    assert len(told_of_kernels(None, {})) == 2
