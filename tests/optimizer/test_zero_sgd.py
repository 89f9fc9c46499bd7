"""FusedZeroSGD against torch.optim.SGD over fp32 masters, on one and more ranks; torch's state dicts; skips."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import DTYPES, assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero

PLAIN = dict(lr=0.05, weight_decay=0.1)
CASES = {
    "plain": dict(lr=0.05),
    "decay": PLAIN,
    "momentum": dict(**PLAIN, momentum=0.9),
    "nesterov": dict(**PLAIN, momentum=0.9, nesterov=True),
    "dampening": dict(**PLAIN, momentum=0.9, dampening=0.25),
    "maximize": dict(**PLAIN, momentum=0.5, maximize=True),
}
STEPS = 4


def train(
    group: Any, dtype: torch.dtype, stage: int, hyper: dict[str, Any]
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor], list[Tensor]]:
    """(weights at first, gradients of each step, masters after them, weights); micro-batches are shared out."""
    rank, size = group.rank(), group.size()
    model = build(dtype)
    before = params_of(model)
    optimizer = pyzero.FusedZeroSGD(
        model.parameters(), **hyper, process_group=group, stage=stage, bucket_cap_mb=1e-3, loss_scale=None
    )
    grads = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(rank, 12, size):
            (loss_of(model, micro_batch(step, index)) * size / 12).backward()
        grads.append([optimizer.full_grad(param) for param in model.parameters()])
        optimizer.step()
    return before, grads, [optimizer.full_master(param) for param in model.parameters()], params_of(model)


def reference(before: list[Tensor], grads: list[list[Tensor]], hyper: dict[str, Any]) -> list[Tensor]:
    masters = [nn.Parameter(param.float()) for param in before]
    optimizer = torch.optim.SGD(masters, **hyper, foreach=False)
    for of_step in grads:
        for master, grad in zip(masters, of_step, strict=True):
            master.grad = grad.float()
        optimizer.step()
    return [master.detach() for master in masters]


@pytest.mark.parametrize(
    ("size", "stage", "dtype", "case"),
    [
        *[(size, 2, dtype, case) for size, dtype in ((1, torch.float32), (2, torch.bfloat16)) for case in CASES],
        *[(size, stage, dtype, "nesterov") for size, stage in ((1, 2), (2, 1), (3, 2)) for dtype in DTYPES],
    ],
    ids=str,
)
def test_against_torch(ranks, size, stage, dtype, case):
    for before, grads, masters, weights in ranks.run(size, train, dtype, stage, CASES[case]):
        wanted = reference(before, grads, CASES[case])
        for master, value, weight in zip(masters, wanted, weights, strict=True):
            torch.testing.assert_close(master, value, rtol=STEPS * 2**-23, atol=STEPS * 2**-24)
            assert torch.equal(weight, master.to(dtype))


def test_by_hand():
    """Momentum 2, then 0.5 * 2 + 2 = 3."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroSGD([param], lr=0.25, momentum=0.5)
    for value in (0.5, -0.25):
        param.grad = torch.full((4,), 2.0)
        optimizer.step()
        assert torch.equal(param, torch.full((4,), value))
    assert torch.equal(optimizer.full_state(param)["momentum_buffer"], torch.full((4,), 3.0))


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_gradients_of_each_dtype_and_a_clip(lr):
    param = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroSGD([param], lr=lr, max_grad_norm=1.0)
    param.grad = torch.full((4,), 2.0, dtype=torch.bfloat16)
    optimizer.step()
    torch.testing.assert_close(optimizer.full_master(param), torch.full((4,), -0.25))


def test_a_skipped_step_changes_nothing():
    model = build(torch.float16)
    optimizer = pyzero.FusedZeroSGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    before = params_of(model)
    optimizer.backward(loss_of(model, micro_batch(0, 0)) * float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(params_of(model), before)
    states = [optimizer.full_state(param) for param in model.parameters()]
    assert all(not state[name].any() for state in states for name in ("step", "momentum_buffer"))


def test_a_parameter_without_a_gradient_stays_and_its_first_is_not_dampened():
    params = [nn.Parameter(torch.ones(70)) for _ in range(2)]
    optimizer = pyzero.FusedZeroSGD(params, lr=1.0, momentum=0.5, dampening=0.5, weight_decay=0.5)
    params[0].sum().backward()
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(70)) and torch.equal(params[1], torch.ones(70))
    optimizer.zero_grad()
    params[1].sum().backward()
    optimizer.step()
    assert torch.equal(params[1], torch.full((70,), -0.5))


def test_state_is_what_groups_need():
    """Masters of 4 bytes, and 4 of momentum in one of two groups."""
    params = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = pyzero.FusedZeroSGD([{"params": params[:1]}, {"params": params[1:], "momentum": 0.9}], lr=0.1)
    assert optimizer.state_bytes() == (4 + 8) * 4096
    assert [set(optimizer.state[param]) for param in params] == [
        {"step", "master"},
        {"step", "master", "momentum_buffer"},
    ]


@pytest.mark.parametrize("case", ["plain", "dampening"])
def test_a_torch_state_dict_goes_on(case):
    models = [build(torch.float32) for _ in range(2)]
    optimizers = [
        torch.optim.SGD(models[0].parameters(), **CASES[case]),
        pyzero.FusedZeroSGD(models[1].parameters(), **CASES[case]),
    ]

    def step(index: int, number: int) -> None:
        optimizers[index].zero_grad()
        loss_of(models[index], micro_batch(number, 0)).backward()
        optimizers[index].step()

    step(0, 0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for index in range(2):
        step(index, 1)
    torch.testing.assert_close(params_of(models[1]), params_of(models[0]), rtol=2**-20, atol=2**-22)


@pytest.mark.parametrize("case", ["plain", "momentum"])
def test_a_state_dict_of_its_own_goes_on(case):
    models = [build(torch.bfloat16) for _ in range(2)]
    first, second = (pyzero.FusedZeroSGD(model.parameters(), **CASES[case]) for model in models)
    for number in range(3):
        first.zero_grad()
        loss_of(models[0], micro_batch(number, 0)).backward()
        first.step()
        if number == 1:
            second.load_state_dict(first.state_dict())
    loss_of(models[1], micro_batch(2, 0)).backward()
    second.step()
    assert_same(params_of(models[1]), params_of(models[0]))


def resume(group: Any, folder: Any, starts: bool) -> list[Tensor]:
    """Two steps, saved; or loaded, and a third. Half of the parameters have momentum."""
    model = build(torch.bfloat16)
    params = list(model.parameters())
    groups = [{"params": params[::2], "momentum": 0.5}, {"params": params[1::2]}]
    optimizer = pyzero.FusedZeroSGD(groups, **PLAIN, process_group=group, loss_scale=None)
    if not starts:
        pyzero.load_checkpoint(folder, model=model, optimizer=optimizer)
    for step in (0, 1) if starts else (2,):
        optimizer.zero_grad()
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
    if starts:
        pyzero.save_checkpoint(folder, model=model, optimizer=optimizer, step=2)
        return resume(group, folder, False)
    return [optimizer.full_master(param) for param in params]


def test_a_checkpoint_loads_on_another_number_of_ranks(ranks, tmp_path):
    wanted = ranks.run(2, resume, tmp_path, True)[0]
    for size in (1, 3):
        assert_same(ranks.run(size, resume, tmp_path, False)[0], wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"differentiable": True}, "differentiable"),
        ({"nesterov": True}, "requires a momentum and zero dampening; got momentum=0.0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "zero dampening; got momentum=0.9 and dampening=0.1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pyzero.FusedZeroSGD([nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize("options", [{"dampening": 0.5}, {"nesterov": True, "fused": True}])
def test_momentum_that_becomes_0_leaves_its_buffer_alone(options):
    """As torch does, which does not dampen then either, nor asks Nesterov's for momentum."""
    params = [nn.Parameter(torch.ones(70)) for _ in range(2)]
    hyper = dict(lr=0.25, momentum=0.5, **options)
    optimizers = [torch.optim.SGD(params[:1], **hyper), pyzero.FusedZeroSGD(params[1:], **hyper)]
    for momentum in (0.5, 0.0, 0.5):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.param_groups[0]["momentum"] = momentum
            param.grad = torch.full((70,), 2.0)
            optimizer.step()
        assert torch.equal(*params)


def test_momentum_cannot_come_later():
    param = nn.Parameter(torch.zeros(3))
    optimizer = pyzero.FusedZeroSGD([param], lr=0.1)
    optimizer.param_groups[0]["momentum"] = 0.9
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="expected momentum 0 as when the group was added, got 0.9"):
        optimizer.step()
    assert torch.equal(param, torch.zeros(3))


@pytest.mark.parametrize("how", ["state_dict", "full_state_dict", "checkpoint"])
def test_state_of_groups_whose_momentum_has_become_0_goes_on(how, tmp_path):
    """In an optimizer that has the momentum as a default, where the saved one had it in its group."""
    params = [nn.Parameter(torch.ones(70)) for _ in range(2)]
    groups = [[{"params": params[:1], "momentum": 0.5}], [{"params": params[1:]}]]
    first, second = (pyzero.FusedZeroSGD(groups[i], lr=0.25, momentum=0.5 * i) for i in range(2))
    for momentum in (0.5, 0.0):
        first.param_groups[0]["momentum"] = momentum
        params[0].grad = torch.full((70,), 2.0)
        first.step()
    if how == "checkpoint":
        first.zero_grad()
        pyzero.save_checkpoint(tmp_path, model=nn.ParameterList(params[:1]), optimizer=first, step=2)
        pyzero.load_checkpoint(tmp_path, model=nn.ParameterList(params[1:]), optimizer=second)
    else:
        second.load_state_dict(getattr(first, how)())
    assert second.param_groups[0]["momentum"] == 0.0
    for param, optimizer in zip(params, (first, second), strict=True):
        optimizer.param_groups[0]["momentum"] = 0.5
        param.grad = torch.full((70,), 2.0)
        optimizer.step()
        assert torch.equal(optimizer.full_state(param)["momentum_buffer"], torch.full((70,), 3.0))
    assert torch.equal(*params)


def test_a_copy_may_be_made_while_momentum_is_0():
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroSGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model: Any, optimizer: Any, *momenta: float) -> None:
        for step, momentum in enumerate(momenta):
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.zero_grad()
            loss_of(model, micro_batch(step, 0)).backward()
            optimizer.step()

    train(model, optimizer, 0.9, 0.9, 0.0)
    both = [(model, optimizer), copy.deepcopy((model, optimizer))]
    assert both[1][1].param_groups[0]["momentum"] == 0.0
    for one in both:
        train(*one, 0.0, 0.9, 0.9)
    assert_same(*(params_of(one) for one, _ in both))


def test_a_hook_may_load_torchs_state():
    """Which has no step counts."""
    params = [nn.Parameter(torch.ones(70)) for _ in range(2)]
    hyper = dict(lr=0.25, momentum=0.5, dampening=0.5)
    optimizers = [torch.optim.SGD(params[:1], **hyper), pyzero.FusedZeroSGD(params[1:], **hyper)]
    params[0].grad = torch.full((70,), 2.0)
    optimizers[0].step()
    optimizers[1].register_load_state_dict_pre_hook(lambda optimizer, state_dict: optimizers[0].state_dict())
    optimizers[1].load_state_dict(optimizers[1].state_dict())
    buffer = optimizers[1].full_state(params[1])["momentum_buffer"]
    assert torch.equal(buffer, torch.full((70,), 2.0))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_torchs_sgd_and_muon_are_not_taken_for_each_other():
    """Their buffers have one name, and another scale."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    saved = [torch.optim.Muon(params[:1]), torch.optim.SGD(params[:1], momentum=0.9)]
    ours = [pyzero.FusedZeroSGD(params[1:], momentum=0.9), pyzero.ZeroMuon(params[1:])]
    for theirs, optimizer in zip(saved, ours, strict=True):
        params[0].grad = torch.ones(4, 4)
        theirs.step()
        with pytest.raises(ValueError, match="expected options of the update rule that group 0 was built with"):
            optimizer.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_buffer_of_none_is_no_state(momentum):
    """Older torch saved it for SGD without momentum."""
    param = nn.Parameter(torch.ones(4))
    optimizer = pyzero.FusedZeroSGD([param], lr=0.25, momentum=momentum)
    groups = torch.optim.SGD([param], lr=0.5, momentum=momentum).state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": groups})
    param.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert torch.equal(param, torch.zeros(4))
