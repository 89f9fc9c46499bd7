"""Parameters that are none of ours: frozen ones of other dtypes are left alone, FSDP's parts are refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyzero

FROZEN = (torch.uint8, torch.int64, torch.float64, torch.bool)


class Quantised(nn.Module):
    """One weight to train beside frozen ones of many dtypes."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        self.frozen = nn.ParameterList(
            nn.Parameter(torch.full((3,), fill).to(dtype), requires_grad=False) for dtype in FROZEN
        )
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.weight * self.frozen[0]).sum()


def train(group: Any, stage: int) -> tuple[list[Tensor], Tensor]:
    rank = group.rank()
    model = Quantised(1 - rank)  # rank 0's are everyone's
    optimizer = pyzero.FusedZeroAdam(model.parameters(), lr=0.25, eps=0.0, process_group=group, stage=stage)
    model().backward()
    optimizer.step()
    assert optimizer.full_state(model.frozen[0]) == {}
    optimizer.load_state_dict(optimizer.state_dict())
    return [param.detach() for param in model.frozen], model.weight.detach()


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_frozen_parameters_of_other_dtypes_are_left_alone(ranks, size, stage):
    for frozen, weight in ranks.run(size, train, stage):
        assert [param.dtype for param in frozen] == list(FROZEN)
        assert all(param.tolist() == [1, 1, 1] for param in frozen)
        torch.testing.assert_close(weight, torch.full((3,), 0.75), rtol=0, atol=2.0**-24)


def test_a_trained_one_is_refused_at_once_and_when_it_is_unfrozen():
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="parameter 0 of the group in float64; convert it, freeze it"):
        pyzero.FusedZeroAdam([double])
    double.requires_grad_(False)
    weight = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([weight, double])
    double.requires_grad_(True)
    (weight.sum() + double.sum()).backward()
    with pytest.raises(TypeError, match="in float64; convert it, freeze it"):
        optimizer.step()


def over_fsdp(group: Any, use_orig_params: bool, reduce_grads: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        nn.Linear(4, 4), process_group=group, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    try:
        pyzero.FusedZeroAdam(model.parameters(), process_group=group, reduce_grads=reduce_grads)
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduce_grads", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parts_of_fsdp_are_refused_by_name(ranks, use_orig_params, reduce_grads):
    for message in ranks.run(2, over_fsdp, use_orig_params, reduce_grads):
        assert "of FullyShardedDataParallel; pass torch.optim.AdamW(fused=True) those" in message
