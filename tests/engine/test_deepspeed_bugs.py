"""Bugs observed in DeepSpeed 0.19, by the number of the finding. Here each is right.

Numbers are powers of two and small integers, and beta1 = 1/2, so that moments are exact.
"""

import contextlib
import io
import itertools
from typing import Any

import pytest
import torch
from models import DTYPES, assert_same, build, loss_of, micro_batch, params_of
from tolerances import ADAM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyzero

HALVES = {"betas": (0.5, 0.5)}
NUM_RANKS = 4  # of the default group, which the engine uses


class Weight(nn.Module):
    """One weight, which forward() returns in fp32."""

    def __init__(self, value: float = 0.0, numel: int = 70) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((numel,), value))

    def forward(self) -> Tensor:
        return self.weight.float()


def adam_config(stage: int, **sections: Any) -> dict[str, Any]:
    optimizer = {"type": "Adam", "params": {"lr": 0.5, "betas": [0.5, 0.5]}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
        **sections,
    }


def by_engine(group: Any, config: dict[str, Any], factors: list[float]) -> dict[str, Any]:
    """Take one micro-batch per factor. The factor is its gradient on every rank."""
    engine, optimizer, _, _ = pyzero.initialize(model=Weight(), config=config)
    for factor in factors:
        engine.backward((engine() * factor).sum())
        engine.step()
    state = optimizer.full_state(engine.module.weight)
    return {
        "exp_avg": state["exp_avg"][0].item(),
        "step": state["step"].item(),
        "loss_scale": optimizer.loss_scale,
        "norm": engine.get_global_grad_norm(),
        "applied": engine.was_step_applied(),
    }


# ---- 1: the scale was updated before gradients were unscaled: half an update at each growth -------------------------


def grow(group: Any, stage: int, loss_scale: Any) -> dict[str, Any]:
    param = nn.Parameter(torch.ones(70, dtype=torch.float16))
    optimizer = pyzero.FusedZeroAdam(
        [param], lr=2.0**-6, **HALVES, process_group=group, stage=stage, loss_scale=loss_scale
    )
    scales = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward((param.float() * 2).sum())
        optimizer.step()
        scales.append(optimizer.loss_scale)
    return {"scales": scales, **optimizer.full_state(param)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_01_a_step_at_which_the_scale_grows_is_a_whole_step(ranks, size, stage):
    plain = ranks.run(size, grow, stage, None)
    grown = ranks.run(size, grow, stage, pyzero.LossScale(init_scale=8.0, growth_interval=1))
    for wanted, got in zip(plain, grown, strict=True):
        assert got.pop("scales") == [16.0, 32.0, 64.0]
        wanted.pop("scales")
        assert_same(list(got.values()), list(wanted.values()))
        assert torch.equal(got["exp_avg"], torch.full((70,), 2 * (1 - 0.5**3)))


# ---- 2: stage 0 with fp16 did not scale the loss, and unscaled the gradients ----------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_02_fp16_scales_the_loss_and_unscales_at_every_stage(ranks, stage):
    small = 2.0**-30
    assert torch.tensor(small).half() == 0  # exists only if the loss was scaled
    config = adam_config(stage, fp16={"enabled": True, "initial_scale_power": 16})
    for result in [by_engine(None, config, [small]), *ranks.run(NUM_RANKS, by_engine, config, [small])]:
        assert (result["exp_avg"], result["loss_scale"]) == (small / 2, 2.0**16)


# ---- 3: grad_accum_dtype: fp32 was ignored --------------------------------------------------------------------------

LARGE_THEN_SMALL = [1.0, *[2.0**-9] * 8, *[0.0] * 7]  # bf16 would lose each of the eight


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_03_accumulation_is_in_fp32(ranks, stage):
    types = {"grad_accum_dtype": "fp32"}
    config = adam_config(stage, bf16={"enabled": True}, gradient_accumulation_steps=16, data_types=types)
    for result in ranks.run(NUM_RANKS, by_engine, config, LARGE_THEN_SMALL):
        assert (result["exp_avg"], result["step"]) == ((1 + 8 * 2.0**-9) / 16 / 2, 1)


def sum_of_three(group: Any, stage: int, no_sync: tuple[bool, ...]) -> float:
    """Sum -1, 1 and 2^-9. In bf16, 1 + 2^-9 rounds to 1, so that the last term would be lost."""
    param = nn.Parameter(torch.zeros(70, dtype=torch.bfloat16))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    for factor, quiet in zip((-1.0, 1.0, 2.0**-9), no_sync, strict=True):
        with optimizer.no_sync() if quiet else contextlib.nullcontext():
            (param.float() * factor).sum().backward()
    return optimizer.full_grad(param)[0].item()


# Except where 1 + 2^-9 alone is sent, because sending rounds it.
NO_SYNC = [quiet for quiet in itertools.product([False, True], repeat=3) if quiet[:2] != (False, True)]


@pytest.mark.parametrize("no_sync", NO_SYNC, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_03_accumulation_is_in_fp32_with_no_sync_too(ranks, stage, no_sync):
    assert ranks.run(2, sum_of_three, stage, no_sync) == [2.0**-9] * 2


def test_03_grad_accum_dtype_is_not_silently_ignored():
    """One rank adds micro-batches in .grad's own dtype."""
    sections = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    pyzero.initialize(model=Weight(), config=adam_config(2, **sections))
    with pytest.raises(ValueError, match="grad_accum_dtype is fp32.*torch.bfloat16; run two ranks"):
        pyzero.initialize(model=Weight(), config=adam_config(2, **sections, gradient_accumulation_steps=2))


# ---- 4: of a parameter used on some ranks only, gradients landed in other parameters --------------------------------


def used_here_and_there(group: Any, stage: int, overlap: bool) -> list[Tensor | None]:
    """Parameter i has the gradient i + 1 on every rank but rank i, which does not use it."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    params = [nn.Parameter(torch.zeros(70)) for _ in range(4)]
    options = {"process_group": group, "stage": stage, "overlap": overlap, "bucket_cap_mb": 1e-6}
    optimizer = pyzero.FusedZeroAdam(params, **options)
    sum((param * (i + 1.0)).sum() for i, param in enumerate(params) if i != rank).backward()
    grads = [optimizer.full_grad(param) for param in params]
    optimizer.step()
    return grads


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_04_gradients_stay_with_their_parameters_whoever_uses_them(ranks, size, stage, overlap):
    for grads in ranks.run(size, used_here_and_there, stage, overlap):
        for i, grad in enumerate(grads):
            users = size - (i < size)
            assert torch.equal(grad, torch.full((70,), (i + 1.0) * users / size))


# ---- 5: round_robin_gradients returned other parameters' masters ----------------------------------------------------


def round_robin(group: Any, stage: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, 5) for width in (5, 5, 5, 5)])
    values = [param.detach().bfloat16() for param in model.parameters()]
    config = adam_config(stage, bf16={"enabled": True})
    config["zero_optimization"] |= {"round_robin_gradients": True, "reduce_bucket_size": 8}
    engine, optimizer, _, _ = pyzero.initialize(model=model, config=config)
    for param, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(optimizer.full_master(param), value.float())
    engine.backward(sum((param.float() * (i + 1)).sum() for i, param in enumerate(model.parameters())))
    optimizer.step()
    for i, param in enumerate(model.parameters()):
        assert torch.equal(optimizer.full_state(param)["exp_avg"], torch.full(param.shape, (i + 1) / 2))
        assert torch.equal(optimizer.full_master(param).bfloat16(), param)


@pytest.mark.parametrize("stage", [1, 2])
def test_05_round_robin_gradients_gives_each_parameter_its_own_master(ranks, stage):
    ranks.run(NUM_RANKS, round_robin, stage)


# ---- 6: gradients that are all zero failed an assertion --------------------------------------------------------------


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_06_a_step_on_gradients_that_are_all_zero(ranks, stage, clipping):
    config = adam_config(stage, bf16={"enabled": True}, gradient_clipping=clipping)
    for result in ranks.run(NUM_RANKS, by_engine, config, [0.0, 0.0]):
        assert (result["norm"], result["exp_avg"], result["step"], result["applied"]) == (0.0, 0.0, 2, True)


# ---- 7: NaN gradients were reported as a norm of 1 -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}], ids=str)
def test_07_the_norm_of_nan_gradients_is_not_finite(ranks, section, value):
    config = adam_config(2, **section, gradient_clipping=1.0)
    for result in [by_engine(None, config, [value]), *ranks.run(NUM_RANKS, by_engine, config, [value])]:
        norm = torch.tensor(result["norm"])
        assert norm.isnan() if value != value else not norm.isfinite()
        assert (result["applied"], result["step"], result["exp_avg"]) == (False, 0, 0.0)


# ---- 8: a group that is all frozen was an IndexError -----------------------------------------------------------------


def all_frozen(group: Any, stage: int) -> list[Tensor]:
    frozen, free = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    groups = [{"params": [frozen]}, {"params": [free], "lr": 0.25}]
    optimizer = pyzero.FusedZeroAdam(groups, lr=1.0, **HALVES, process_group=group, stage=stage)
    (frozen * free).sum().backward()
    optimizer.step()
    return [frozen, free.detach()]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_08_a_group_may_be_all_frozen(ranks, size, stage):
    for frozen, free in ranks.run(size, all_frozen, stage):
        assert torch.equal(frozen, torch.ones(3))
        torch.testing.assert_close(free, torch.full((3,), 0.75), rtol=0, atol=2.0**-24)


# ---- 9: one layer in two reentrant checkpoints failed an assertion ---------------------------------------------------


def one_layer_in_two_checkpoints(group: Any, stage: int, dtype: torch.dtype) -> list[Tensor]:
    """x * w * w * v: the gradient of w is 2 * x * w * v, half of it from each checkpoint."""
    import torch.distributed as dist

    first, middle, last = (nn.Parameter(torch.full((70,), value, dtype=dtype)) for value in (1.0, 3.0, 2.0))
    options = {"process_group": group, "stage": stage, "bucket_cap_mb": 1e-6, "loss_scale": None}
    optimizer = pyzero.FusedZeroAdam([first, middle, last], lr=0.0, **options)
    grads = []
    for step in range(2):
        optimizer.zero_grad()
        x = torch.full((70,), float(dist.get_rank(group) + step), dtype=dtype, requires_grad=True)
        for param in (first, middle, middle, last):
            x = checkpoint(lambda x, param=param: x * param, x, use_reentrant=True)  # an argument would be one use
        x.float().sum().backward()
        grads += [optimizer.full_grad(param) for param in (first, middle, last)]
        optimizer.step()
    return grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_09_one_layer_in_two_reentrant_checkpoints(ranks, stage, dtype):
    for grads in ranks.run(2, one_layer_in_two_checkpoints, stage, dtype):
        wanted = [x * factor for x in (0.5, 1.5) for factor in (18.0, 12.0, 9.0)]
        assert [grad.tolist() for grad in grads] == [[value] * 70 for value in wanted]


# ---- 10: the export of stage 1 dropped frozen parameters -------------------------------------------------------------


def export(group: Any, stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    model = build(dtype)
    model.hidden.weight.requires_grad_(False)
    optimizer = pyzero.FusedZeroAdam(model.parameters(), process_group=group, stage=stage)
    loss_of(model, micro_batch(0, 0)).backward()
    optimizer.step()
    masters = {name: optimizer.full_master(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        assert torch.equal(masters[name].to(dtype), param.detach())
    return masters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
def test_10_masters_of_frozen_parameters_are_there_too(ranks, stage, dtype):
    model = build(dtype)
    for masters in ranks.run(2, export, stage, dtype):
        assert set(masters) == {name for name, _ in model.named_parameters()}
        assert torch.equal(masters["hidden.weight"], model.hidden.weight.detach().float())


# ---- 11: only the last parameter's step advanced, twice with mixed dtypes --------------------------------------------


def steps_of(group: Any, stage: int) -> list[float]:
    params = [nn.Parameter(torch.ones(70, dtype=dtype)) for dtype in (*DTYPES, *DTYPES)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = pyzero.FusedZeroAdam(groups, process_group=group, stage=stage, loss_scale=None)
    for step in range(6):
        optimizer.zero_grad()
        sum(param.float().sum() for param in params[: step + 1]).backward()
        optimizer.step()
    return [float(optimizer.full_state(param)["step"]) for param in params]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_11_every_parameter_counts_its_own_steps(ranks, size, stage):
    assert ranks.run(size, steps_of, stage) == [[6, 5, 4, 3, 2, 1]] * size


# ---- 12: zero_grad(set_to_none=...) was a TypeError ------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_12_zero_grad_takes_set_to_none(set_to_none):
    engine, optimizer, _, _ = pyzero.initialize(model=Weight(), config=adam_config(2))
    weight = engine.module.weight
    for zero_grad in (optimizer.zero_grad, engine.zero_grad):
        engine.backward(engine().sum())
        zero_grad(set_to_none=set_to_none)
        assert weight.grad is None if set_to_none else torch.equal(weight.grad, torch.zeros(70))


# ---- 13: parameters that are not contiguous were silently never updated ----------------------------------------------

STRIDED = {
    "transposed": lambda: torch.ones(4, 6).mT,
    "channels_last": lambda: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "every second": lambda: torch.ones(4, 6)[:, ::2],
}


def update_strided(group: Any, stage: int, name: str, dtype: torch.dtype) -> Tensor:
    param = nn.Parameter(STRIDED[name]().to(dtype))
    options = {"process_group": group, "stage": stage, "loss_scale": None}
    optimizer = pyzero.FusedZeroAdam([param], lr=0.25, **HALVES, **options)
    factor = torch.arange(1.0, param.numel() + 1).view(param.shape)
    (param.float() * factor).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.full_state(param)["exp_avg"], factor / 2)
    return param.detach()


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("size", [1, 2])
def test_13_parameters_that_are_not_contiguous_are_updated(ranks, size, name):
    for dtype in DTYPES:
        for weight in ranks.run(size, update_strided, 2, name, dtype):
            # eps of 1e-8 beside 1, and the roundings of the update, of which 1/4 is left
            torch.testing.assert_close(weight.float(), torch.full(weight.shape, 0.75), rtol=0, atol=2.0**-23)


# ---- 14: adam_w_mode=False was ignored on the CPU --------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "reference"), [(False, torch.optim.Adam), (True, torch.optim.AdamW)])
def test_14_adam_w_mode_decides_between_adam_and_adamw(mode, reference):
    hyper, num_steps = {"lr": 1e-2, "weight_decay": 0.1}, 5
    config = adam_config(2, optimizer={"type": "Adam", "params": {**hyper, "adam_w_mode": mode}})
    engine, *_ = pyzero.initialize(model=Weight(2.0), config=config)
    twin = Weight(2.0)
    theirs = reference(twin.parameters(), **hyper)
    for step in range(num_steps):
        factor = torch.arange(1.0, 71.0) + step
        engine.backward((engine() * factor).sum())
        engine.step()
        theirs.zero_grad()
        (twin() * factor).sum().backward()
        theirs.step()
    atol = 2**0.5 * ADAM[torch.float32].master(num_steps, 2.0, 1e-2, beta2=0.999, decay=1 - 1e-3)
    torch.testing.assert_close(engine.module.weight, twin.weight, rtol=0, atol=atol)


# ---- 15: another number of ranks at resume was an error --------------------------------------------------------------


def make_for_resume(
    group: Any, dtype: torch.dtype, stage: int, weights: dict[str, Tensor] | None = None
) -> tuple[nn.Module, pyzero.FusedZeroAdamW]:
    model = build(dtype)
    if weights is not None:
        model.load_state_dict(weights)
    return model, pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, stage=stage, bucket_cap_mb=1e-3
    )


def save_whole(group: Any, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    import torch.distributed as dist

    model, optimizer = make_for_resume(group, dtype, stage=2)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, micro_batch(step, dist.get_rank(group))))
        optimizer.step()
    return [optimizer.full_state(param) for param in model.parameters()]


def load_whole(group: Any, dtype: torch.dtype, stage: int, saved: list[dict[str, Tensor]]) -> list[Any]:
    model, optimizer = make_for_resume(group, dtype, stage)
    for param, state in zip(model.parameters(), saved, strict=True):
        optimizer.set_full_state(param, state)
    return [[optimizer.full_state(param) for param in model.parameters()], params_of(model)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_15_state_of_three_ranks_goes_on_on_another_number(ranks, size, dtype):
    saved = ranks.run(3, save_whole, dtype)[0]
    for stage in (1, 2):
        for states, weights in ranks.run(size, load_whole, dtype, stage, saved):
            for state, wanted, weight in zip(states, saved, weights, strict=True):
                assert state.keys() == wanted.keys() == {"step", "master", "exp_avg", "exp_avg_sq"}
                assert_same(list(state.values()), [wanted[name] for name in state])
                assert torch.equal(weight, wanted["master"].to(dtype))


# ---- 16: checkpoints held pickled objects ----------------------------------------------------------------------------


def resume_from_a_safe_file(group: Any, dtype: torch.dtype, model_first: bool) -> list[list[Tensor]]:
    """Return the weights after six steps, once without a break and once with a resume after three.

    The weights are loaded before the optimizer is built, or after it, as most loops do.
    """

    def run(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(loss_of(model, micro_batch(step, 0)))
            optimizer.step()

    model, optimizer = make_for_resume(group, dtype, stage=2)
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if model_first:
        resumed, other = make_for_resume(group, dtype, stage=2, weights=saved["model"])
    else:
        resumed, other = make_for_resume(group, dtype, stage=2)
        resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, range(3, 6))
    return [params_of(model), params_of(resumed)]


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_16_state_loads_with_weights_only(ranks, size, dtype, model_first):
    for unbroken, resumed in ranks.run(size, resume_from_a_safe_file, dtype, model_first):
        assert_same(unbroken, resumed)


# ---- and: clipping that nobody asked for, averages in half before the sum, unknown keys ------------------------------


@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}], ids=str)
def test_nothing_is_clipped_unless_asked_for(ranks, section):
    section = {name: {**keys, **({"loss_scale": 2.0} if name == "fp16" else {})} for name, keys in section.items()}
    for result in ranks.run(NUM_RANKS, by_engine, adam_config(2, **section), [1024.0]):
        assert result["exp_avg"] == 512.0
        assert result["norm"] == pytest.approx(1024 * 70**0.5, rel=2.0**-23)


def mean_of_ranks(group: Any, stage: int, dtype: torch.dtype, factors: list[float]) -> float:
    import torch.distributed as dist

    param = nn.Parameter(torch.zeros(70, dtype=dtype))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage, loss_scale=None)
    (param.float() * factors[dist.get_rank(group)]).sum().backward()
    return optimizer.full_grad(param)[0].item()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float16, [2.0**-24] * 4),  # a quarter of it is 0 in fp16
        (torch.float16, [65504.0] * 4),  # twice as much is inf
        (torch.bfloat16, [1.0, 2.0**-9, 2.0**-9, -1.0]),  # bf16 would lose the small ones in the sum
    ],
    ids=["tiny", "huge", "mixed"],
)
def test_16_bit_gradients_are_summed_in_fp32_before_the_division(ranks, stage, dtype, factors):
    assert ranks.run(4, mean_of_ranks, stage, dtype, factors) == [sum(factors) / 4] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: unknown key"),
        ({"compression_training": {"enabled": True}}, "compression_training: got"),
    ],
    ids=["misspelt", "nested", "of another result"],
)
def test_unknown_keys_are_errors(change, words):
    with pytest.raises(ValueError, match=words):
        pyzero.initialize(model=Weight(), config={**adam_config(2), **change})
