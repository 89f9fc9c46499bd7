"""full_master, full_grad, full_state and their setters; what they give is the same on every rank."""

from typing import Any

import pytest
import torch
from models import DTYPES, build, loss_of, micro_batch
from own_groups import OwnGroups
from torch import Tensor, nn

import pyzero


def make(group: Any, dtype: torch.dtype, stage: int, **options: Any) -> tuple[nn.Module, pyzero.FusedZeroAdamW]:
    model = build(dtype)
    model.conv = nn.Conv2d(3, 5, 3).to(dtype=dtype, memory_format=torch.channels_last)
    options = {"lr": 1e-2, "stage": stage, "bucket_cap_mb": 1e-3, "loss_scale": 64.0, **options}
    return model, pyzero.FusedZeroAdamW(model.parameters(), process_group=group, **options)


def backward(model: nn.Module, optimizer: Any, step: int, rank: int) -> None:
    x = torch.ones(1, 3, 4, 4, dtype=model.conv.weight.dtype).mul_(0.5)
    optimizer.backward(loss_of(model, micro_batch(step, rank)) + (model.conv(x) * (rank + 1)).float().square().mean())


@pytest.fixture(scope="module")
def run(ranks):
    return OwnGroups(ranks)


def read(group: Any, dtype: torch.dtype, stage: int) -> list[dict[str, Any]]:
    model, optimizer = make(group, dtype, stage)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, step, group.rank())
        grads = [optimizer.full_grad(param) for param in model.parameters()]
        norm = optimizer.clip_grad_norm_(1e9)
        optimizer.step()
    found = []
    for param, grad in zip(model.parameters(), grads, strict=True):
        state = {name: value.clone() for name, value in optimizer.full_state(param).items()}
        found.append({"param": param.detach().clone(), "grad": grad, "norm": norm, **state})
    return found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_tensors_do_not_depend_on_the_number_of_ranks(ranks, dtype, stage):
    torch.manual_seed(7)
    for size in (1, 2, 3):
        results = ranks.run(size, read, dtype, stage)
        for index, whole in enumerate(results[0]):
            param = whole["param"]
            assert torch.equal(whole["master"].to(dtype), param)
            for name in ("master", "exp_avg", "exp_avg_sq", "grad"):
                assert whole[name].shape == param.shape and whole[name].dtype == torch.float32
                for result in results[1:]:
                    assert torch.equal(result[index][name], whole[name]), name
            assert whole["step"] == 3
        total = torch.stack([whole["grad"].double().square().sum() for whole in results[0]]).sum().sqrt()
        torch.testing.assert_close(total.float(), results[0][0]["norm"], rtol=1e-6, atol=0)


def move(group: Any, dtype: torch.dtype, stage: int, num_steps: int, state: list[Any] | None) -> list[Any]:
    """Train from whole tensors, or from the start; returns whole tensors. All ranks have the same gradients."""
    model, optimizer = make(group, dtype, stage)
    if state is not None:
        for param, whole in zip(model.parameters(), state, strict=True):
            optimizer.set_full_state(param, whole)
            assert torch.equal(optimizer.full_master(param).cpu(), whole["master"])
    begin = 0 if state is None else 3
    for step in range(begin, begin + num_steps):
        optimizer.zero_grad()
        backward(model, optimizer, step, 0)
        optimizer.step()
    return [optimizer.full_state(param) for param in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_moves_to_another_number_of_ranks_bit_for_bit(ranks, dtype):
    """Two ranks and four average the same gradients exactly."""
    start = ranks.run(4, move, dtype, 2, 3, None)[0]
    wanted = ranks.run(4, move, dtype, 2, 3, start)[0]
    for size, stage in ((1, 1), (2, 1), (2, 2)):
        for ours, theirs in zip(ranks.run(size, move, dtype, stage, 3, start)[0], wanted, strict=True):
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), name


def write_gradients(group: Any, stage: int) -> list[Tensor]:
    param = nn.Parameter(torch.zeros(70))
    other = nn.Parameter(torch.zeros(7, 3))
    optimizer = pyzero.FusedZeroAdam([param, other], lr=1.0, betas=(0.5, 0.5), process_group=group, stage=stage)
    (param.sum() * (1 + group.rank())).backward()
    assert torch.equal(optimizer.full_grad(param), torch.full((70,), (1 + group.size()) / 2))
    assert optimizer.full_grad(other) is None
    optimizer.set_full_grad(param, torch.full((70,), 4.0))
    optimizer.set_full_grad(other, torch.full((7, 3), float("nan")))
    optimizer.step()
    assert not optimizer.was_step_applied
    optimizer.set_full_grad(param, torch.full((70,), 4.0))
    optimizer.set_full_grad(other, torch.full((7, 3), 3.0))
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    return [norm, optimizer.full_state(param)["exp_avg"], optimizer.full_state(other)["exp_avg"], other.detach()]


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_gradients_can_be_written(ranks, size, stage):
    for norm, first, second, weights in ranks.run(size, write_gradients, stage):
        torch.testing.assert_close(norm, torch.tensor((70 * 16.0 + 21 * 9.0) ** 0.5))
        assert torch.equal(first, torch.full((70,), 2.0)) and torch.equal(second, torch.full((7, 3), 1.5))
        torch.testing.assert_close(weights, torch.full((7, 3), -1.0))


def test_frozen_and_foreign_parameters():
    frozen, free = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([frozen, free])
    assert torch.equal(optimizer.full_master(frozen), torch.ones(3))
    assert optimizer.full_state(frozen) == {} and optimizer.full_grad(frozen) is None
    with pytest.raises(ValueError, match="frozen"):
        optimizer.set_full_master(frozen, torch.zeros(3))
    with pytest.raises(ValueError, match="of this optimizer"):
        optimizer.full_master(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(4,\)"):
        optimizer.set_full_state(free, {"step": 4, "exp_avg": torch.zeros(4)})
    with pytest.raises(TypeError, match="expected exp_avg as a tensor, got list"):
        optimizer.set_full_state(free, {"step": 4, "exp_avg": [0.0] * 3})
    with pytest.raises(ValueError, match="expected step as a number"):
        optimizer.set_full_state(free, {"exp_avg": torch.ones(3), "step": torch.zeros(2)})
    assert optimizer.full_state(free)["step"] == 0 and not optimizer.full_state(free)["exp_avg"].any()
    with pytest.raises(ValueError, match="momentum"):
        optimizer.set_full_state(free, {"momentum": torch.zeros(3)})


def test_a_master_that_was_set_is_no_outside_write(caplog):
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.0)
    fine = torch.tensor([1.001, 2.003, 3.007])
    optimizer.set_full_master(param, fine)
    assert torch.equal(param, fine.bfloat16())
    param.float().sum().backward()
    with caplog.at_level("INFO", logger="pyzero"):
        optimizer.step()
    assert torch.equal(optimizer.full_master(param), fine)  # not rounded to the weights
    assert "written outside" not in caplog.text


def test_what_is_returned_is_the_callers_to_write():
    trained, frozen = (nn.Parameter(torch.ones(3), requires_grad=trains) for trains in (True, False))
    optimizer = pyzero.FusedZeroAdam([trained, frozen])
    trained.sum().backward()
    optimizer.step()

    def values() -> list[Tensor]:
        masters = [*map(optimizer.full_master, (trained, frozen)), optimizer.local_state(frozen)["master"]]
        grads = [optimizer.full_grad(trained), optimizer.local_grad(trained)]
        return [*masters, *grads, *optimizer.full_state(trained).values(), *optimizer.local_state(trained).values()]

    wanted = [value.clone() for value in values()]
    for value in values():
        value.fill_(7.0)
    assert all(map(torch.equal, values(), wanted)) and torch.equal(frozen, torch.ones(3))


def test_writes_through_data_are_followed_on_request():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.0)
    param.data.fill_(5.0)
    optimizer.refresh_fp32_params()
    assert torch.equal(optimizer.full_master(param), torch.full((3,), 5.0))


def test_what_is_read_or_saved_follows_outside_writes():
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdam([param])
    with torch.no_grad():
        param.fill_(2.0)
    assert torch.equal(optimizer.full_master(param), torch.full((3,), 2.0))
    with torch.no_grad():
        param.fill_(3.0)
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], torch.full((3,), 3.0))


def read_in_another_order(group: Any) -> tuple[list[str], bool, list[Any]]:
    """Of parameters of one size and of two, and one where another rank reads all."""
    params = [nn.Parameter(torch.full((n,), float(n))) for n in (40, 40, 7)]
    optimizer = pyzero.FusedZeroAdam(params, process_group=group)
    sum(param.square().sum() for param in params).backward()
    alone = group.rank() == 1

    said = []
    for read in (
        lambda: optimizer.full_master(params[1 if alone else 0]),
        lambda: optimizer.full_master(params[2 if alone else 0]),
        lambda: optimizer.full_grad(params[1 if alone else 0]),
        lambda: optimizer.full_state_dict() if alone else optimizer.full_state(params[0]),
    ):
        with pytest.raises(RuntimeError) as caught:
            read()
        said.append(str(caught.value))
    optimizer.step()
    return said, all(torch.isfinite(param).all() for param in params), [optimizer.full_master(p) for p in params]


def test_ranks_that_read_different_whole_tensors_are_told(ranks):
    (said, *there), (elsewhere, *here) = ranks.run(2, read_in_another_order)
    assert said == elsewhere and str(there) == str(here)
    for words, theirs in zip(
        said,
        (
            "rank 0 reads the master of parameter 0; rank 1 reads the master of parameter 1",
            "rank 0 reads the master of parameter 0; rank 1 reads the master of parameter 2",
            "rank 0 reads the gradient of parameter 0; rank 1 reads the gradient of parameter 1",
            "rank 0 reads the state of parameter 0; rank 1 reads the full state dict",
        ),
        strict=True,
    ):
        assert words == f"{theirs}. Read whole tensors equally often and in the same order on every rank"


def read_of_a_model_converted_on_one_rank(group: Any) -> list[str]:
    model = nn.Linear(3, 5)
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group)
    if group.rank() == 1:
        model.double()
    said = []
    for read in (
        lambda: optimizer.full_master(model.weight),
        lambda: optimizer.full_state(model.bias),
        lambda: optimizer.local_state(model.bias),
        lambda: optimizer.full_state_dict(),
    ):
        with pytest.raises((TypeError, RuntimeError)) as caught:
            read()
        said.append(str(caught.value))
    model.float()
    assert torch.equal(optimizer.full_master(model.weight), model.weight)
    return said


def test_an_error_of_one_rank_in_a_read_is_told_to_all(run):
    there, here = run(2, read_of_a_model_converted_on_one_rank)
    assert all("rank 1 reads nothing: it has an error" in words for words in there)
    assert all("expected a parameter in float32" in words for words in here)
