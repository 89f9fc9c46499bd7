"""Ranks with different parts of a model that is split by hand. If one rank refuses something, none does it."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyzero


def part(group: Any, replicas: int, kind: Any = pyzero.FusedZeroAdamW, mark: str = "model_parallel") -> Any:
    """Return this rank's part, one of 4 / replicas, and its optimizer."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "pp"))
    torch.manual_seed(mesh["pp"].get_local_rank())
    model = nn.Linear(4, 4, bias=False)
    for param in model.parameters():
        setattr(param, mark, True)
    return model, kind(model.parameters(), lr=0.1, process_group=mesh["dp"], model_parallel_group=mesh["pp"])


def refused_step(group: Any, replicas: int) -> tuple[list[str], list[Tensor]]:
    """Rank 0 refuses the second step, and the third succeeds."""
    model, optimizer = part(group, replicas)
    outcomes, norms = [], []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = math.nan if (step, dist.get_rank()) == (1, 0) else 0.1
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + step)).sum().backward()
        before = model.weight.detach().clone()
        try:
            optimizer.step()
            outcomes.append("stepped")
            norms.append(optimizer.grad_norm)
        except (RuntimeError, ValueError) as error:
            assert torch.equal(model.weight, before)
            outcomes.append(str(error))
    return outcomes, norms


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_that_one_part_refuses_is_refused_on_all(ranks, replicas):
    found = ranks.run(4, refused_step, replicas)
    for rank, (outcomes, norms) in enumerate(found):
        assert outcomes[0] == outcomes[2] == "stepped"
        assert ("Invalid learning rate" if rank == 0 else "got an error on ranks") in outcomes[1]
        assert norms == found[0][1], "the norm is one of all parts, of the same batch"


def refused_load(group: Any, replicas: int) -> tuple[str, bool]:
    model, optimizer = part(group, replicas)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    before = model.weight.detach().clone()
    if dist.get_rank() == 1:
        saved["state"][0]["exp_avg"] = torch.zeros(3)
    try:
        optimizer.load_state_dict(saved)
        return "loaded", False
    except ValueError as error:
        return str(error), torch.equal(model.weight, before)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_state_dict_that_does_not_fit_one_part_is_loaded_by_none(ranks, replicas):
    for rank, (message, is_unchanged) in enumerate(ranks.run(4, refused_load, replicas)):
        assert is_unchanged and ("expected exp_avg" if rank == 1 else "for rank 1 could not") in message, message


def built_over_slices(group: Any, kind: Any, mark: str) -> str:
    try:
        part(group, 1, kind, mark)
        return "built"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", [pyzero.ZeroMuon, pyzero.ZeroLamb])
def test_rules_that_need_whole_weights_refuse_slices(ranks, kind):
    """They accept a pipeline stage, because its weights are whole."""
    for message in ranks.run(4, built_over_slices, kind, "tensor_model_parallel"):
        assert "got parameter 0 with tensor_model_parallel=True" in message, message
    assert ranks.run(4, built_over_slices, kind, "model_parallel") == ["built"] * 4
