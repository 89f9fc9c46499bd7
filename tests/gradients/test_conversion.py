"""A model that is converted to another dtype and back. torch drops the autograd nodes that hooks are on."""

from typing import Any

import pytest
import torch
from torch import nn
from twins import UP_TO_TWO, Twins


def convert_and_back(model: nn.Module, dtype: torch.dtype) -> None:
    model.double()
    model.to(dtype)


def converted_and_back(group: Any, stage: int, sync: bool, dtype: torch.dtype, scale: float | None) -> None:
    twins = Twins(group, stage, dtype, loss_scale=scale)
    for step in range(3):
        if step == 1:
            convert_and_back(twins.model, dtype)
        for micro in (1.0, 2.0):
            with twins.no_sync(sync or micro == 2.0):
                twins.optimizer.backward(twins.loss(micro))
            twins.expect(twins.mean(micro))
        twins.optimizer.backward(twins.loss(4.0, index=1))
        twins.expect(twins.mean(4.0), index=1)
        twins.step()
        twins.check()
        twins.drop("model")


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sync", [True, False])
@UP_TO_TWO
def test_a_model_converted_and_back_trains_on(run, size, stage, sync, dtype, scale):
    run(size, converted_and_back, stage, sync, dtype, scale)


def converted_with_frozen(group: Any, stage: int, scale: float | None) -> None:
    twins = Twins(group, stage, torch.bfloat16, loss_scale=scale)
    for step in range(3):
        for param, other in zip(twins.model, twins.theirs, strict=True):
            param.requires_grad_(step != 1 or param is not twins.second)
            other.requires_grad_(param.requires_grad)
        if step == 1:
            convert_and_back(twins.model, torch.bfloat16)
        for index, param in enumerate((twins.first, twins.second)):
            if param.requires_grad:
                twins.optimizer.backward(twins.loss(2.0, index))
                twins.expect(twins.mean(2.0), index)
        twins.step()
        twins.check()
        twins.drop("model")


@pytest.mark.parametrize("scale", [None, 1024.0])
@UP_TO_TWO
def test_so_does_one_of_which_a_part_is_frozen(run, size, stage, scale):
    run(size, converted_with_frozen, stage, scale)


def converted_with_a_gradient(group: Any, stage: int, dtype: torch.dtype, scale: float | None) -> None:
    twins = Twins(group, stage, dtype, loss_scale=scale)
    for factor in (1.0, 2.0):
        with twins.no_sync(factor == 2.0):
            twins.optimizer.backward(twins.loss(factor))
        twins.expect(twins.mean(factor))
        if factor == 1.0:
            convert_and_back(nn.ParameterList([twins.first]), dtype)  # the others' gradients refuse it
    twins.step()
    twins.check()


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@UP_TO_TWO
def test_a_gradient_kept_over_a_conversion_counts_once(run, size, stage, dtype, scale):
    run(size, converted_with_a_gradient, stage, dtype, scale)
