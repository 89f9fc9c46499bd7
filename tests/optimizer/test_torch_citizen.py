"""FusedZeroAdam where torch expects an optimizer: hooks, schedulers, closures, checkpoints, compile, profiler."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from tolerances import ADAM
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import pyzero

LR = 1e-2
NUM_STEPS = 12
SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3),  # cycles beta1 too
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=NUM_STEPS),  # and so does this
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=4),
}


def adam_tolerance(model: nn.Module, steps: int = NUM_STEPS) -> float:
    """Of two fp32 Adams that saw the same gradients."""
    largest = max(float(param.detach().abs().max()) for param in model.parameters() if param.numel())
    return 2**0.5 * ADAM[torch.float32].master(steps, largest, LR, beta2=0.999, decay=1.0)


def lone(cls: Any, **options: Any) -> tuple[list[Tensor], Any]:
    """Parameters whose gradients do not depend on them, so that two optimizers see the same ones."""
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (130,), ())]
    return params, cls([{"params": params[:2]}, {"params": params[2:], "lr": LR / 2}], lr=LR, **options)


def give_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) + 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_scheduler(name):
    (ours, left), (theirs, right) = lone(pyzero.FusedZeroAdam), lone(torch.optim.Adam, fused=True)
    schedules = [SCHEDULES[name](optimizer) for optimizer in (left, right)]
    for step in range(NUM_STEPS):
        for params, optimizer, schedule in zip((ours, theirs), (left, right), schedules, strict=True):
            give_gradients(params, step)
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
        for mine, other in zip(left.param_groups, right.param_groups, strict=True):
            assert (mine["lr"], mine["betas"]) == (other["lr"], other["betas"])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=adam_tolerance(nn.ParameterList(ours)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_rate_may_be_a_tensor_and_change(as_tensor):
    (ours, left), (theirs, right) = lone(pyzero.FusedZeroAdam), lone(torch.optim.Adam, fused=True)
    for step in range(NUM_STEPS):
        for params, optimizer in ((ours, left), (theirs, right)):
            give_gradients(params, step)
            for group in optimizer.param_groups:
                rate = LR / (step + 1)
                group["lr"] = torch.tensor(rate) if as_tensor else rate
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=adam_tolerance(nn.ParameterList(ours)))


def test_closure():
    model = build(torch.float32)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, micro_batch(0, 0))
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_hooks_are_called_in_order():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before state_dict"))
    optimizer.register_state_dict_post_hook(
        lambda o, d: calls.append(f"after state_dict, scaler: {'scaler' in d['param_groups'][0]}")
    )
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after load"))
    give_gradients(params, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [
        "before step",
        "after step",
        "before state_dict",
        "after state_dict, scaler: True",
        "before load",
        "after load",
    ]


def test_hooks_of_all_optimizers_are_called():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.step()
    calls: list[str] = []
    before = register_optimizer_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.step()
    before.remove()
    after = register_optimizer_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.step()
    after.remove()
    optimizer.step()
    assert calls == ["before step", "after step"]


def test_a_hook_that_a_closure_registers_is_called():
    _, optimizer = lone(pyzero.FusedZeroAdam)
    calls: list[str] = []
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: calls.append("after step")))
    assert calls == ["after step"]


def test_a_load_hook_may_replace_what_is_loaded():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda o, d: saved)
    give_gradients(params, 1)
    optimizer.step()
    optimizer.load_state_dict({"nothing": "useful"})
    assert all(state["step"] == 1 for state in optimizer.state.values())


class Imitation:
    """A wrapper as Lightning's: it has the optimizer's class among its own, and none of its attributes."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Imitation", (Imitation, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


def test_a_wrapper_that_imitates_the_class_answers_as_the_optimizer():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    wrapper = Imitation(optimizer)
    give_gradients(params, 0)
    norm = wrapper.clip_grad_norm_(1.0)
    optimizer.step()
    assert isinstance(wrapper, pyzero.FusedZeroAdam)
    torch.testing.assert_close(wrapper.grad_norm, norm)
    torch.testing.assert_close(wrapper.clipped_grad_norm, torch.tensor(1.0))
    assert wrapper.was_step_applied and wrapper.skipped_steps == 0


def test_zero_grad_to_zeros():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(param.grad, torch.zeros_like(param)) for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def test_on_one_rank_state_has_the_parameters_shape():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master"}
        assert state["step"] == 1 and torch.equal(state["master"], param.detach())
        assert torch.equal(state["exp_avg"], (param.grad * (1.0 - 0.9)))


def test_rows_of_state_can_be_edited_as_in_torch():
    table = nn.Parameter(torch.ones(4, 3).t().contiguous().t())  # column by column
    optimizer = pyzero.FusedZeroAdam([table])
    table.grad = torch.ones(4, 3)
    optimizer.step()
    optimizer.state[table]["exp_avg"][2] = 0.0
    assert optimizer.full_state(table)["exp_avg"].ne(0.0).all(1).tolist() == [True, True, False, True]
    optimizer.state[table]["exp_avg_sq"] = torch.zeros_like(table)
    assert not optimizer.full_state(table)["exp_avg_sq"].any()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pyzero.FusedZeroAdamW, {"weight_decay": 0.1, "max_grad_norm": 1.0}),
        (pyzero.FusedZeroAdam, {"loss_scale": pyzero.LossScale(growth_interval=2)}),
        (pyzero.FusedZeroSGD, {"momentum": 0.9}),
        (pyzero.FusedZeroLion, {}),
        (pyzero.ZeroLamb, {}),
        (pyzero.ZeroMuon, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_copies_train_on_bit_for_bit(kind, options, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).bfloat16()
    optimizer = kind(
        [{"params": [*model[0].named_parameters()], "lr": 0.05}, {"params": [*model[2].named_parameters()]}], **options
    )
    x = torch.randn(8, 5).bfloat16()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.backward(model(x).float().square().sum())
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer)
    twin, other = COPIES[how]((model, optimizer))
    assert type(other) is kind and other.param_groups[0]["params"][0] is twin[0].weight
    assert other.param_groups[0]["param_names"] == ["weight"] and other.param_groups[0]["lr"] == 0.05
    train(model, optimizer)
    train(twin, other)
    assert_same([*twin.parameters()], [*model.parameters()])
    assert other.loss_scale == optimizer.loss_scale
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same([*other.full_state(theirs).values()], [*optimizer.full_state(mine).values()])


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_the_state_of_what_is_frozen_now_and_what_groups_say(how, caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = pyzero.FusedZeroAdam(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["learning_rate"] = "a note of the caller's"

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer)
    model[0].requires_grad_(False)
    train(model, optimizer)
    twin, other = COPIES[how]((model, optimizer))
    assert not twin[0].weight.requires_grad and not caplog.records
    assert other.param_groups[0]["learning_rate"] == "a note of the caller's"
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        one[0].requires_grad_(True)
        train(one, its_optimizer)
    assert_same([*twin.parameters()], [*model.parameters()])


class Counting(pyzero.FusedZeroAdam):
    def __init__(self, params: Any) -> None:
        self.count = 0
        super().__init__(params)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


def test_copies_have_a_subclass_attributes_as_they_are_now():
    optimizer = Counting([nn.Parameter(torch.ones(3))])
    for _ in range(3):
        optimizer.step()
    assert copy.deepcopy(optimizer).count == 3


def test_copies_that_would_be_wrong_are_refused(tmp_path):
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(TypeError, match="expected copy.deepcopy"):
        copy.copy(optimizer)
    torch.save((param, optimizer), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(TypeError, match="save in torch's present format"):
        torch.load(tmp_path / "old.pt", weights_only=False)
    torch.save((param, optimizer), tmp_path / "new.pt")
    weight, _ = torch.load(tmp_path / "new.pt", weights_only=False)
    assert torch.equal(weight, param)
    leaf = torch.ones(3, requires_grad=True)
    of_leaf = pyzero.FusedZeroAdam([leaf])
    leaf.grad = torch.ones(3)
    with pytest.raises(TypeError, match="call zero_grad"):
        copy.deepcopy(of_leaf)


def given_to_a_process(optimizer: Any) -> None:
    """Nothing: it does not come so far."""


def test_an_optimizer_is_not_given_to_a_process_that_is_spawned():
    optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.ones(3))])
    process = torch.multiprocessing.get_context("spawn").Process(target=given_to_a_process, args=(optimizer,))
    with pytest.raises(TypeError, match="pass the model and state_dict"):
        process.start()


def test_flat_state_of_one_rank_is_loaded():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    wanted = copy.deepcopy(saved)
    for values in saved["state"].values():
        values.update({name: values[name].clone().reshape(-1) for name in ("exp_avg", "exp_avg_sq", "master")})
    _, other = lone(pyzero.FusedZeroAdam)
    other.load_state_dict(saved)
    for mine, theirs in zip(other.state_dict()["state"].values(), wanted["state"].values(), strict=True):
        assert_same([*mine.values()], [*theirs.values()])


def copied(group: Any) -> None:
    optimizer = pyzero.FusedZeroAdam([nn.Parameter(torch.zeros(3))], process_group=group)
    with pytest.raises(TypeError, match="build another over the copied model"):
        copy.deepcopy(optimizer)


def test_copies_are_refused_over_several_ranks(ranks):
    ranks.run(2, copied)


def test_a_state_dict_has_what_was_unfrozen_since_the_last_step():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = pyzero.FusedZeroAdam(model.parameters())
    assert len(get_optimizer_state_dict(model, optimizer)["state"]) == 2
    model[0].requires_grad_(True)
    assert len(get_optimizer_state_dict(model, optimizer)["state"]) == 4


def test_state_dict_is_plain_data():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, other = lone(pyzero.FusedZeroAdam)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(others, params)


def test_groups_added_later():
    first, second = nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(30, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdamW([first], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (first.sum() + second.float().sum()).backward()
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [second], "lr": 0.5})
    assert optimizer.state[first]["step"] == 2 and optimizer.state[second]["step"] == 1
    assert (second < 0.6).all()
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [second]})


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as in a Lookahead or a SAM: torch's add_param_group appends to their groups."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups


def with_a_group_of_a_wrapper(group: Any, stage: int, frozen: bool) -> None:
    mean, rank = (1 + group.size()) / 2, 1 + group.rank()
    finals = []
    for ours in (True, False):
        first, second, third = (nn.Parameter(torch.linspace(1, 2, numel)) for numel in (70, 30, 7))
        options: Any = {"process_group": group, "stage": stage} if ours else {}
        optimizer = (pyzero.FusedZeroAdamW if ours else torch.optim.AdamW)([first], lr=0.1, **options)
        for step in range(5):
            if step == 1:
                second.requires_grad_(not frozen)
                Wrapper(optimizer).add_param_group({"params": [second], "lr": 0.5})
                optimizer.add_param_group({"params": [third]})
            if step == 3:
                second.requires_grad_(True)
                Wrapper(optimizer).add_param_group({"params": []})
            sum((each * (rank if ours else mean)).sum() for each in (first, second, third)).backward()
            optimizer.step()
            for each in (first, second, third):
                each.grad = None
        finals.append([first, second, third])
    for mine, right in zip(*finals, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_groups_that_a_wrapper_adds(ranks, size, stage, frozen):
    ranks.run(size, with_a_group_of_a_wrapper, stage, frozen)


@pytest.mark.parametrize("params", [[], [nn.Parameter(torch.ones(3), requires_grad=False)]], ids=["empty", "frozen"])
def test_groups_with_nothing_to_train(params):
    trained = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdamW([{"params": params}, {"params": [trained]}], lr=0.1, max_grad_norm=1.0)
    trained.sum().backward()
    optimizer.step()
    assert (trained < 1).all()
    idle = pyzero.FusedZeroAdamW([{"params": params}])
    idle.step()
    assert idle.clip_grad_norm_(1.0) == 0


def checkpointed(group: Any) -> list[Any]:
    """torch.distributed.checkpoint's view of the optimizer: names, no step taken, and back."""
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, process_group=group)
    before = params_of(model)
    fresh = get_optimizer_state_dict(model, optimizer)
    assert_same(params_of(model), before)
    assert set(fresh["state"]) == {name for name, _ in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = build(torch.bfloat16)
    resumed = pyzero.FusedZeroAdamW(other.parameters(), lr=0.5, process_group=group)
    set_optimizer_state_dict(other, resumed, saved)
    assert resumed.param_groups[0]["lr"] == LR
    for name, param in model.named_parameters():
        left, right = optimizer.state[param], resumed.state[dict(other.named_parameters())[name]]
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert_same(params_of(other), params_of(model))
    return []


@pytest.mark.parametrize("size", [1, 2])
def test_distributed_checkpoints_state_dict(ranks, size):
    ranks.run(size, checkpointed)


def compiled(group: Any, stage: int) -> list[list[Tensor]]:
    results = []
    for backend in (None, "aot_eager"):
        model = build(torch.float32)
        call = model if backend is None else torch.compile(model, backend=backend)
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, process_group=group, stage=stage)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(call, micro_batch(step, group.rank())).backward()
            optimizer.step()
        results.append(params_of(model))
    return results


@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_models(ranks, stage):
    for eager, by_compiler in ranks.run(2, compiled, stage):
        assert_same(eager, by_compiler)


def test_a_step_that_is_called_from_compiled_code():
    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert optimizer.was_step_applied and optimizer.grad_norm > 0


def in_inference_mode(group: Any, stage: int, enabled: bool) -> list[Tensor]:
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR, process_group=group, stage=stage, bucket_cap_mb=1e-3)
    for step in range(3):
        optimizer.zero_grad(set_to_none=step == 1)
        loss_of(model, micro_batch(step, 0)).backward()
        with torch.inference_mode(enabled):
            if step == 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
            if step == 2:
                optimizer.clip_grad_norm_(0.25)
            optimizer.step()
    return params_of(model)


@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_steps_and_clipping_in_inference_mode(ranks, size, stage):
    wanted = ranks.run(size, in_inference_mode, stage, False)[0]
    for got in ranks.run(size, in_inference_mode, stage, True):
        assert_same(got, wanted)


def test_autocast():
    ours, theirs = build(torch.float32), build(torch.float32)
    left = pyzero.FusedZeroAdamW(ours.parameters(), lr=LR)
    right = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    for model, optimizer in ((ours, left), (theirs, right)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, micro_batch(0, 0))
        loss.backward()
        optimizer.step()
    assert all(param.dtype == torch.float32 for param in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=adam_tolerance(ours, steps=1))


def ranges(group: Any) -> set[str]:
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), process_group=group)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(model, micro_batch(0, 0)).backward()
        optimizer.step()
    return {event.key for event in profile.key_averages()}


def test_profiler_ranges(ranks):
    wanted = {"Optimizer.step#FusedZeroAdamW.step", "pyzero::reduce_scatter", "pyzero::adam", "pyzero::all_gather"}
    for seen in ranks.run(2, ranges):
        assert wanted <= seen


def test_profiler_of_all_threads():
    from torch._C._profiler import _ExperimentalConfig

    params, optimizer = lone(pyzero.FusedZeroAdam)
    give_gradients(params, 0)
    if "profile_all_threads" not in (_ExperimentalConfig.__init__.__doc__ or ""):
        pytest.skip("this torch does not profile all threads")
    everyones = _ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=everyones) as profile:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    seen = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#FusedZeroAdam.step", "pyzero::adam"} <= seen


def test_weights_tied_after_construction():
    model = build(torch.bfloat16)
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR)
    model.head.weight = model.embedding.weight
    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert torch.equal(optimizer.full_master(model.embedding.weight).bfloat16(), model.embedding.weight)


def test_an_average_copied_into_the_model_is_followed(caplog):
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    average.update_parameters(model)
    with torch.no_grad():
        for param, mean in zip(model.parameters(), average.module.parameters(), strict=True):
            param.copy_(mean)
    loss_of(model, micro_batch(0, 0)).backward()
    with caplog.at_level("INFO", logger="pyzero"):
        optimizer.step()
    assert caplog.text.count("written outside the optimizer") == 1
    for param, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        assert torch.equal(param, mean) and torch.equal(optimizer.full_master(param), mean.float())


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_weights_that_leave_shared_memory_are_told_of(when, caplog):
    """torch's optimizers write them in place, where other processes see it."""
    model = nn.Linear(3, 2)
    if when == "before":
        model.share_memory()
    optimizer = pyzero.FusedZeroAdam(model.parameters(), lr=LR)
    if when == "after":
        model.share_memory()
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert caplog.text.count("are moved out of it, and other processes see no later step") == (when != "never")


def test_a_copied_model_is_whole_and_free():
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=LR)
    twin = copy.deepcopy(model)
    assert_same(params_of(twin), params_of(model))
    assert all(param.untyped_storage().nbytes() <= param.nbytes for param in twin.parameters())
    loss_of(twin, micro_batch(0, 0)).backward()
    optimizer.step()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_default_device_does_not_matter(ranks, stage):
    """Whoever calls torch.set_default_device means tensors of the model, not ours."""
    for weights, plain in ranks.run(2, under_a_default_device, stage):
        assert_same(weights, plain)


def under_a_default_device(group: Any, stage: int) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for device in ("meta", "cpu"):
        model = build(torch.bfloat16)
        loss = loss_of(model, micro_batch(0, 0))
        with torch.device(device):
            everything(model, loss, group, stage)
        results.append(params_of(model))
    return results[0], results[1]


def everything(model: nn.Module, loss: Tensor, group: Any, stage: int) -> None:
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, stage=stage, max_grad_norm=0.1, loss_scale=8.0
    )
    optimizer.backward(loss)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.full_state(param := next(model.parameters()))
    optimizer.set_full_grad(param, state["exp_avg"])
    assert optimizer.full_grad(param).dtype == torch.float32
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "stage"), [(1, 1), (2, 1), (2, 2)])
def test_a_default_dtype_does_not_matter(ranks, size, stage, dtype):
    """Whoever calls torch.set_default_dtype means tensors of the model, not ours."""
    for weights, plain in ranks.run(size, under_a_default_dtype, stage, dtype):
        assert_same(weights, plain)


def under_a_default_dtype(group: Any, stage: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for chosen in (dtype, torch.float32):
        model = build(torch.bfloat16)
        loss = loss_of(model, micro_batch(0, 0))
        torch.set_default_dtype(chosen)
        try:
            everything(model, loss, group, stage)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(params_of(model))
    return results[0], results[1]
