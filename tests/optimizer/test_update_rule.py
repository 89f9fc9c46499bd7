"""A rule of a test's own: what it names in its slots is kept, shown, saved and moved, and no other file knows it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyzero.estimate import estimate
from pyzero.optimizer import ZeroOptimizer
from pyzero.sharding.layout import GRANULE, Key, ParamSpec, RunKey, lay_out
from pyzero.update_rule import Cut, RunShard, StateSlot, Values

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((12, 11), (70,), (3, 5), (40, 2), (), (130,))
STEPS = 4


class NormalizedRule:
    """p -= lr * buf / |buf|, of a whole parameter at once, where buf += g. Keeps |g| of every 64 elements too."""

    name = "normalized"
    slots: tuple[StateSlot, ...] = (
        StateSlot("buf", torch.float64),
        StateSlot("size", values=Values.PER_GRANULE),
    )
    cut = Cut.WHOLE
    reads_lists = False
    writes_peer_weights = False

    def check(self, group: dict[str, Any]) -> None:
        if not group["lr"] > 0:
            raise ValueError(f"expected lr above 0, got {group['lr']}; pass a positive one")

    def update(
        self,
        shard: RunShard,
        grad: Tensor,
        group: dict[str, Any],
        *,
        grad_scale: float | Tensor,
        found_inf: Tensor,
        used: Tensor,
        backend: str,
    ) -> None:
        if bool(found_inf):
            return
        grad = grad.float() * grad_scale
        for part in shard.parts:
            if used[part.position]:
                whole, buf = part.view(shard.master), part.view(shard.state["buf"])
                buf += part.view(grad)
                whole -= group["lr"] * (buf / torch.linalg.vector_norm(buf)).float()
                granules = slice(part.begin // GRANULE, -(-part.end // GRANULE))
                shard.state["size"][granules] = sizes(grad[part.begin : part.end])
        if shard.weights is not None:
            shard.weights.copy_(shard.master)


def sizes(flat: Tensor) -> Tensor:
    padded = nn.functional.pad(flat, (0, -flat.numel() % GRANULE))
    return padded.view(-1, GRANULE).abs().sum(1)


def optimizer_over(model: nn.Module, group: Any, **options: Any) -> ZeroOptimizer:
    params = list(model.parameters())
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}]
    return ZeroOptimizer(groups, NormalizedRule(), {"lr": 0.25}, process_group=group, loss_scale=None, **options)


def build(dtype: torch.dtype) -> nn.ParameterList:
    torch.manual_seed(0)
    values = [torch.randint(-8, 8, shape, device="cpu").to(torch.get_default_device(), dtype) for shape in SHAPES]
    return nn.ParameterList(map(nn.Parameter, values))


def gradient(shape: tuple[int, ...], step: int, rank: int) -> Tensor:
    """Means over 1, 2 and 4 ranks are exact."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = torch.randint(1, 9, shape, generator=generator, device="cpu").float() * 4
    return size.to(torch.get_default_device())


def step(optimizer: ZeroOptimizer, model: nn.ParameterList, number: int, rank: int, size: int) -> None:
    optimizer.zero_grad()
    weights = [gradient(shape, number, 0 if size == 3 else rank) for shape in SHAPES]
    unused = number % len(SHAPES)
    loss = sum((p.float() * w).sum() for i, (p, w) in enumerate(zip(model, weights, strict=True)) if i != unused)
    loss.backward()
    optimizer.step()


def trained(group: Any, dtype: torch.dtype, stage: int) -> list[dict[str, Tensor]]:
    model = build(dtype)
    optimizer = optimizer_over(model, group, stage=stage, bucket_cap_mb=1e-3)
    for number in range(STEPS):
        step(optimizer, model, number, group.rank(), group.size())
        if number == 1:  # out and in again
            saved = optimizer.state_dict()
            optimizer = optimizer_over(model, group, stage=stage, bucket_cap_mb=1e-3)
            optimizer.load_state_dict(saved)
    states = [optimizer.full_state(param) for param in model]
    for param, state in zip(model, states, strict=True):
        assert torch.equal(param, state["master"].to(dtype))
        assert set(optimizer.state[param]) == set(state) == {"step", "master", "buf", "size"}
    return [{name: value.cpu() for name, value in state.items()} for state in states]


def wanted(dtype: torch.dtype, size: int) -> list[dict[str, Tensor]]:
    found = []
    for index, param in enumerate(build(dtype)):
        master, buf, last, count = param.detach().float(), torch.zeros(param.shape, dtype=torch.float64), None, 0
        for number in range(STEPS):
            if index != number % len(SHAPES):
                ranks = [0] if size == 3 else range(size)
                last = torch.stack([gradient(SHAPES[index], number, rank) for rank in ranks]).mean(0)
                buf += last
                master = master - [0.25, 0.5][index % 2] * (buf / torch.linalg.vector_norm(buf)).float()
                count += 1
        found.append({"master": master, "buf": buf, "size": sizes(last.flatten()), "step": torch.tensor(float(count))})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)])
def test_a_rule_that_needs_whole_parameters(ranks, size, stage, dtype):
    for states in ranks.run(size, trained, dtype, stage):
        for state, want in zip(states, wanted(dtype, size), strict=True):
            for name, value in want.items():
                assert torch.equal(state[name], value), name


def test_its_hyper_parameters_are_checked():
    with pytest.raises(ValueError, match="expected lr above 0, got -1"):
        ZeroOptimizer([nn.Parameter(torch.zeros(3))], NormalizedRule(), {"lr": -1.0})
    optimizer = ZeroOptimizer([nn.Parameter(torch.zeros(3))], NormalizedRule(), {"lr": 1.0})
    with pytest.raises(ValueError, match="expected lr above 0, got 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0})
    with pytest.raises(ValueError, match="lrr"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lrr": 1.0})
    with pytest.raises(ValueError, match="expected names of step, master, buf, size, got 'exp_avg'"):
        optimizer.set_full_state(optimizer.param_groups[0]["params"][0], {"exp_avg": torch.zeros(3)})


def test_state_bytes_go_by_slots():
    model = nn.ParameterList([nn.Parameter(torch.zeros(1024, dtype=torch.bfloat16))])
    optimizer = ZeroOptimizer(model.parameters(), NormalizedRule(), {"lr": 1.0})
    assert optimizer.state_bytes() == 1024 * (4 + 8) + 1024 // GRANULE * 4
    by_slots = estimate(model, rule=NormalizedRule()).state
    assert by_slots == optimizer.state_bytes() + 4 * (1024 // GRANULE) + 4  # segment ids, step count


def trained_by_the_recipe(group: Any, dtype: torch.dtype) -> list[list[Tensor]]:
    """Weights and momentum after each step, of which the third is skipped; in the first a parameter is unused."""
    recipe = (ROOT / "docs" / "recipes.md").read_text().partition("## An update rule of your own")[2]
    names = {"model": build(dtype)}
    rule, made = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    exec(rule, names)
    names["ZeroOptimizer"] = functools.partial(ZeroOptimizer, process_group=group)
    exec(made, names)
    model, optimizer, found = names["model"], names["optimizer"], []
    for number in range(STEPS):
        if number != 2:
            step(optimizer, model, number, group.rank(), group.size())
        else:
            optimizer.zero_grad()
            sum(p.float().sum() * float("nan") for p in model).backward()
            optimizer.step()
        found.append([p.detach().cpu().clone() for p in model])
        found[-1] += [optimizer.full_state(p)["momentum"].cpu() for p in model]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_the_rule_of_the_recipes(ranks, size, dtype):
    start = [p.detach().cpu() for p in build(dtype)]
    for found in ranks.run(size, trained_by_the_recipe, dtype):
        first, second, skipped, last = found
        num = len(SHAPES)
        assert torch.equal(first[0], start[0]) and not first[num].any(), "unused"
        assert torch.equal(first[1], (start[1].float() - 1e-3).to(dtype)) and (first[num + 1] > 0).all()
        assert all(torch.equal(a, b) for a, b in zip(second, skipped, strict=True))
        means = torch.cat([first[num + i].flatten() for i in range(1, num)])
        assert torch.linalg.vector_norm(means) == pytest.approx(1.0, rel=1e-6)  # it was clipped
        assert (last[num + 1] > 0.9 * skipped[num + 1]).all()


def specs(*numels: int, cut: Cut = Cut.WHOLE) -> list[ParamSpec]:
    key = Key("fp32", "cpu", cut=cut)
    return [ParamSpec(index, numel, 4, key, RunKey(0, True)) for index, numel in enumerate(numels)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_whole_cuts_go_between_parameters(num_ranks):
    layout = lay_out(specs(64, 1000, 3, 640, 0, 500, 64, 64), num_ranks)
    for slot in layout.param_slots:
        parts = [layout.overlap(slot, rank) for rank in range(num_ranks)]
        assert sorted(high - low for low, high in parts)[:-1] == [0] * (num_ranks - 1)
        assert max(high - low for low, high in parts) == slot.numel
    ends = [slot.offset + slot.numel for slot in layout.param_slots]
    assert all(end <= after.offset for end, after in zip(ends, layout.param_slots[1:], strict=False))
    assert ends[-1] <= layout.numel and layout.shard_numel % GRANULE == 0


def test_whole_shards_are_as_short_as_can_be():
    assert lay_out(specs(640, 640, 640, 640), 2).shard_numel == 1280
    assert lay_out(specs(640, 64, 64, 64), 2).shard_numel == 640
    assert lay_out(specs(128, 128, 128), 2).shard_numel == 256
    assert lay_out(specs(128, 128, 128, cut=Cut.ANYWHERE), 2).shard_numel == 192
