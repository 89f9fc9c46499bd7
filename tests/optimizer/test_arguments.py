"""Arguments, groups and state dicts as torch.optim.AdamW takes them, or refused by name before anything is changed."""

import collections
import contextlib
import copy
import gc
import inspect
import json
import math
import re
import warnings
import weakref
from typing import Any

import numpy
import pytest
import torch
from models import assert_same, build, loss_of, micro_batch, params_of
from torch import Tensor, nn

import pyzero
from pyzero.arguments.hyper_parameters import HyperParameters

PAIRS = [(pyzero.FusedZeroAdam, torch.optim.Adam), (pyzero.FusedZeroAdamW, torch.optim.AdamW)]


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_positional_arguments_are_torchs(ours, theirs):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    mine, wanted = (
        [(name, p.default) for name, p in inspect.signature(cls).parameters.items() if p.kind in kinds]
        for cls in (ours, theirs)
    )
    assert [name for name, _ in mine] == [name for name, _ in wanted]
    assert [default for _, default in mine] == [default for _, default in wanted]
    args = (1e-2, (0.8, 0.9), 1e-6, 0.25, False)
    left, right = ours(weights(), *args), theirs(weights(), *args)
    for name in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert left.defaults[name] == right.defaults[name]


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"capturable": True}], ids=str
)
def test_options_that_change_no_result_are_taken(options):
    (ours, left), (theirs, right) = ((p := weights(), pyzero.FusedZeroAdamW(p, **o)) for o in (options, {}))
    for params, optimizer in ((ours, left), (theirs, right)):
        (params[0].sum() + params[1].sum()).backward()
        optimizer.step()
    assert_same(params_of(nn.ParameterList(ours)), params_of(nn.ParameterList(theirs)))


BAD = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": torch.tensor(-1.0)}, "Invalid learning rate"),
    ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
    ({"lr": math.nan}, "Invalid learning rate"),
    ({"lr": math.inf}, "Invalid learning rate: inf; expected lr >= 0, and finite"),
    ({"lr": torch.tensor(math.inf)}, "Invalid learning rate"),
    ({"weight_decay": math.inf}, "Invalid weight_decay value: inf"),
    ({"eps": math.nan}, "Invalid epsilon value: nan"),
    ({"betas": (math.nan, 0.9)}, "Invalid beta parameter at index 0"),
    ({"betas": 0.9}, r"Invalid betas: 0.9; expected two, as in betas=\(0.9, 0.999\)"),
    ({"betas": "0.9, 0.999"}, "Invalid betas: '0.9, 0.999'; expected two"),
    ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
]


NO_NUMBERS = [
    ({"lr": "1e-3"}, r"expected lr as a number, got the text '1e-3'; pass 0.001, and in YAML write 1.0e-3"),
    ({"lr": None}, "expected lr as a number, got None; pass one, or leave lr out"),
    ({"betas": ("0.9", 0.999)}, r"expected betas\[0\] as a number, got the text '0.9'; pass 0.9"),
    ({"eps": None}, "expected eps as a number, got None"),
    ({"weight_decay": "x"}, "expected weight_decay as a number, got 'x'"),
    (
        {"weight_decay": torch.tensor(0.1, device="meta")},
        "expected weight_decay as a number, got a tensor on meta, for",
    ),
]


@pytest.mark.parametrize(
    ("options", "words", "error"),
    [*((*one, ValueError) for one in BAD), *((*one, TypeError) for one in NO_NUMBERS)],
    ids=str,
)
def test_values_out_of_range_in_torchs_words(options, words, error):
    with pytest.raises(error, match=words):
        pyzero.FusedZeroAdamW(weights(), **options)
    with pytest.raises(error, match=words):
        pyzero.FusedZeroAdamW([{"params": weights(), **options}])
    params = weights()
    optimizer = pyzero.FusedZeroAdamW(params)
    (params[0].sum() + params[1].sum()).backward()
    optimizer.param_groups[0].update(options)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all((param == 1).all() for param in params) and optimizer.state[params[0]]["step"] == 0


@pytest.mark.parametrize(
    ("of", "options"),
    [
        (pyzero.FusedZeroSGD, {"lr": "0.1"}),
        (pyzero.FusedZeroSGD, {"momentum": "0.9"}),
        (pyzero.FusedZeroSGD, {"momentum": None}),
        (pyzero.FusedZeroSGD, {"dampening": "0.9"}),
        (pyzero.FusedZeroLion, {"weight_decay": None}),
        (pyzero.ZeroLamb, {"max_coeff": "10"}),
        (pyzero.ZeroMuon, {"momentum": "0.95"}),
        (pyzero.ZeroMuon, {"eps": "1e-7"}),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused_by_every_rule(of, options):
    params = [nn.Parameter(torch.ones(3, 3))]
    (name,) = options
    with pytest.raises(TypeError, match=f"expected {name} as a number, got "):
        of(params, **options)


def test_numbers_of_other_kinds_are_taken():
    numpy = pytest.importorskip("numpy")
    lr, decay = numpy.float32(0.5), numpy.int64(0)
    params = weights()
    optimizer = pyzero.FusedZeroAdamW(params, lr=lr, betas=[0.9, 0.99], weight_decay=decay, eps=0)
    (params[0].sum() + params[1].sum()).backward()
    optimizer.step()
    assert all((param == 0.5).all() for param in params)


def test_a_model_is_no_parameters():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=r"got a model \((Linear|Sequential)\); pass model.parameters\(\)"):
            pyzero.FusedZeroAdamW(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grad_reduce_dtype": "bf16"}, "torch.bfloat16"),
        ({"grad_reduce_dtype": torch.float64}, "got torch.float64"),
        ({"max_consecutive_skips": 0}, "from 1, got 0"),
        ({"bucket_cap_mb": -1.0}, "bucket_cap_mb above 0"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm above 0"),
        ({"max_grad_norm": 0}, "max_grad_norm above 0"),
        ({"stage": 3}, r"got 3; call torch's fully_shard\(model\) for stage 3, and pass its parameters"),
        ({"stage": "2"}, "got '2'; pass stage=2"),
        ({"backend": "gpu"}, "expected backend as one of auto, cuda, cpu, triton, reference, got 'gpu'"),
        ({"transport": "pigeon"}, "auto, exact, collective, peer"),
        ({"loss_scale": "often"}, "dynamic"),
        ({"amsgrad": True}, "amsgrad"),
        ({"differentiable": True}, "differentiable"),
    ],
    ids=str,
)
def test_arguments_are_refused_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        pyzero.FusedZeroAdamW(weights(), **options)


@pytest.mark.parametrize("name", ["max_grad_norm", "bucket_cap_mb", "max_consecutive_skips"])
def test_arguments_that_are_text_are_refused_at_construction(name):
    with pytest.raises(TypeError, match=f"expected {name} as a number, got the text '1'; pass 1.0"):
        pyzero.FusedZeroAdamW(weights(), **{name: "1"})


@pytest.mark.parametrize("name", ["max_grad_norm", "bucket_cap_mb", "max_consecutive_skips"])
def test_a_switch_where_a_number_belongs_is_refused(name):
    with pytest.raises(TypeError, match=f"expected {name} as a number or None, got True"):
        pyzero.FusedZeroAdamW(weights(), **{name: True})


def test_a_load_shares_nothing_with_the_state_dict():
    one, other = (pyzero.FusedZeroAdamW([{"params": weights(), "tags": ["a"]}], betas=[0.9, 0.99]) for _ in "ab")
    saved = one.state_dict()
    other.load_state_dict(saved)
    for optimizer in (one, other):
        optimizer.param_groups[0]["tags"].append("b")
    assert other.param_groups[0]["tags"] == ["a", "b"] and other.param_groups[0]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize(
    ("param", "words"),
    [
        (
            nn.Parameter(torch.empty(3, device="meta")),
            "parameter 0 of the group on the meta device; call model.to_empty",
        ),
        (
            nn.Parameter(torch.eye(3).to_sparse()),
            "parameter 0 of the group in layout sparse_coo; pass torch.optim.Sparse",
        ),
    ],
    ids=["meta", "sparse"],
)
def test_parameters_without_memory_are_refused(param, words):
    with pytest.raises(TypeError, match=words):
        pyzero.FusedZeroAdamW([param])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"differentiable": True}, "differentiable=True"),
        ({"stage": 1}, "got stage in a parameter group"),
        ({"rule": "mine"}, "which state dicts use for notes of pyzero's, got 'rule'; give yours another name"),
        ({"scaler": 2.0}, "expected other names than zero, scaler, rule, master_steps in a parameter group"),
        ({"max_grad_norm": 1.0}, "got max_grad_norm in a parameter group"),
        ({"cpu_offload": True}, "got cpu_offload in a parameter group"),
        ({"backend": "reference"}, "got backend in a parameter group"),
        ({"weight_deacy": 0.1}, "got 'weight_deacy' in a parameter group, expected 'weight_decay'"),
        ({"beta": (0.9, 0.99)}, "expected 'betas'"),
        ({"learning_rate": 1.0}, "got 'learning_rate' in a parameter group, expected 'lr'"),
        ({"wd": 0.1}, "expected 'weight_decay'"),
        ({"epsilon": 1e-6}, "expected 'eps'"),
        ({"beta1": 0.9}, "expected 'betas'"),
        ({"betas_": (0.9, 0.99)}, "expected 'betas'"),
        ({"lr": 0.1, "learning_rate": 0.5}, "expected 'lr'"),
    ],
    ids=str,
)
def test_a_groups_own_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        pyzero.FusedZeroAdamW([{"params": weights(), **options}])
    optimizer = pyzero.FusedZeroAdamW(weights())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": weights(), **options})
    assert len(optimizer.param_groups) == 1


def test_a_group_with_a_number_beyond_floats_is_not_kept():
    optimizer = pyzero.FusedZeroAdamW(weights())
    with pytest.raises(ValueError, match="expected weight_decay as a number that a float can hold, got 1000"):
        optimizer.add_param_group({"params": weights(), "weight_decay": 10**400})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["weight_decay_mult", "base_weight_decay", "max_betas", "param_name"])
def test_a_name_that_is_made_of_an_options_is_the_loops_own(name):
    assert pyzero.FusedZeroAdamW([{"params": weights(), name: 0.5}]).param_groups[0][name] == 0.5


def test_a_name_like_an_option_that_is_given_too_is_the_loops_own():
    optimizer = pyzero.FusedZeroAdamW([{"params": weights(), "weight_decay": 0.1, "weight_decays": 0.5}])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_a_group_may_hold_values_of_the_loops_own():
    optimizer = pyzero.FusedZeroAdamW([{"params": weights(), "name": "body", "lr_scale": 0.5, "layer_id": 3}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    lion = pyzero.FusedZeroLion([{"params": weights(), "epsilon": 0.1}])  # it has no eps that this could mean
    assert lion.param_groups[0]["epsilon"] == 0.1


def rates_that_differ(group: Any, options: dict[str, Any], how: str) -> tuple[str, bool, bool]:
    params = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(3))]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.1}]
    rate = torch.tensor(0.1) if how == "tensor" else 0.1
    optimizer = pyzero.FusedZeroAdamW(groups, lr=rate, process_group=group, **options)
    sum(param.sum() for param in params).backward()
    if group.rank() == 1:
        last = optimizer.param_groups[1]
        last.update({"betas": (0.8, 0.99)} if how == "betas" else {"lr": last["lr"] * 2})
    try:
        optimizer.step()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    stays = all(bool((param == 1).all()) for param in params)
    optimizer.param_groups[1].update(lr=0.1, betas=(0.9, 0.99))
    optimizer.step()
    return message, stays, all(bool((param < 1).all()) for param in params)


@pytest.mark.parametrize("how", ["number", "tensor", "betas"])
@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"reduce_grads": False}], ids=str)
def test_hyper_parameters_that_differ_between_ranks_are_refused_on_all(ranks, options, how):
    for message, stays, steps_then in ranks.run(2, rates_that_differ, options, how):
        assert "got others on ranks [1] of 2 than on rank 0" in message and stays and steps_then


def kept_by_errors(group: Any) -> list[bool]:
    """Whether what a caller of step() holds outlives each of its errors, without the collector."""
    params = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(3))]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group)
    group_of_all, data = optimizer.param_groups[0], params[1].data

    def fails() -> weakref.ref[Tensor]:
        activations = torch.ones(4)
        with contextlib.suppress(ValueError, TypeError, RuntimeError):
            optimizer.step()
            raise AssertionError(activations)
        return weakref.ref(activations)

    sum(param.sum() for param in params).backward()
    found = []
    gc.collect()
    gc.disable()
    try:
        group_of_all["lr"] = float("nan") if group.rank() == 0 else 0.1
        found.append(fails())
        group_of_all["lr"] = 0.1 if group.size() == 1 or group.rank() else 0.2
        if group.size() == 1:
            params[1].data = data.double()
        found.append(fails())
        return [ref() is not None for ref in found]
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_of_a_step_keeps_nothing_alive(ranks, size):
    assert ranks.run(size, kept_by_errors) == [[False, False]] * size


def error_on_rank_1(group: Any, options: dict[str, Any], how: str) -> tuple[str, bool, bool]:
    """What step() says, whether weights stay, and whether the next one is taken."""
    params = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(3))]
    optimizer = pyzero.FusedZeroAdamW([{"params": [param]} for param in params], process_group=group, **options)
    sum(param.sum() for param in params).backward()
    last, data = optimizer.param_groups[1], None if how == "model.double()" else params[1].data
    if group.rank() == 1:
        if how == "nan":
            last["lr"] = float("nan")
        elif how == "text":
            last["lr"] = "0.1"
        elif how == "no lr":
            del last["lr"]
        elif how == "huge":
            last["lr"] = 10**400
        elif how == "converted":
            params[1].data = data.double()
        elif how == "model.double()":
            nn.ParameterList(params).double()
        elif how == "taken out":
            last["params"].clear()
    try:
        optimizer.step()
        message = "no error"
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        message = f"{type(error).__name__}: {error}"
    stays = all(bool((param == 1).all()) for param in params)
    last.update(lr=0.1, params=[params[1]])
    if data is None:
        nn.ParameterList(params).float()
    else:
        params[1].data = data
    optimizer.step()
    return message, stays, all(bool((param < 1).all()) for param in params)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nan", "ValueError: .*nan"),
        ("text", "TypeError: .*'0.1'"),
        ("no lr", "ValueError: expected .lr. in param_groups"),
        ("huge", "ValueError: expected lr as a number that a float can hold"),
        ("converted", "TypeError: .*float64"),
        ("taken out", "ValueError: .*1 taken out"),
    ],
)
@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2}, {"reduce_grads": False}], ids=str)
def test_what_keeps_one_rank_from_a_step_is_told_on_all(ranks, options, how, words):
    (other, other_stays, other_steps), (own, stays, steps) = ranks.run(2, error_on_rank_1, options, how)
    assert other.startswith("RuntimeError: ") and "an error on ranks [1]" in other
    assert re.match(words, own)
    assert stays and other_stays and steps and other_steps


def test_a_model_that_one_rank_converts_with_its_gradients_is_told_on_all(ranks):
    (other, *_), (own, *_) = ranks.run(2, error_on_rank_1, {"reduce_grads": False}, "model.double()")
    assert "an error on ranks [1]" in other and "convert and move the model first" in own


def frozen_with_an_error(group: Any) -> str:
    optimizer = pyzero.FusedZeroAdamW([nn.Parameter(torch.ones(3), requires_grad=False)], process_group=group)
    optimizer.param_groups[0]["lr"] = float("nan")
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_error_of_a_step_without_trained_parameters_is_raised(ranks):
    assert all("nan" in said for said in ranks.run(2, frozen_with_an_error))


def alike(group: Any) -> bool:
    """Two steps with values that are equal, and objects of other addresses on each rank."""
    is_first = group.rank() == 0
    params = [nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(3))]
    numbers = ([0.9, 0.99], 0.0, numpy.float64(1e-2)) if is_first else ((0.9, 0.99), -0.0, 1e-2)
    groups = [
        {"params": params[:1], "betas": numbers[0], "weight_decay": numbers[1], "lr": numbers[2]},
        {"params": params[1:], "lr": 0.1 if is_first else float(torch.tensor(0.1))},  # as fp32 brought it from rank 0
    ]
    optimizer = pyzero.FusedZeroAdamW(groups, process_group=group)
    optimizer._hyper_parameters = HyperParameters([*optimizer.defaults, "schedule"])  # as of a rule that has this one
    for own in optimizer.param_groups:
        own["schedule"] = lambda: is_first
    for _ in range(2):
        sum(param.sum() for param in params).backward()
        optimizer.step()
    return optimizer.was_step_applied


def test_equal_hyper_parameters_are_equal_however_they_are_written(ranks):
    assert all(ranks.run(2, alike))


def test_a_sequence_that_was_edited_in_place_has_changed():
    group = {"betas": [0.9, 0.99]}
    compared = HyperParameters(["betas"])
    before = compared.checksum([group])
    group["betas"][1] = 0.999
    assert compared.checksum([group]) != before


def test_a_parameter_twice_in_a_group_is_warned_of_and_updated_once():
    param, once = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = pyzero.FusedZeroAdamW([param, param], lr=0.1)
    other = pyzero.FusedZeroAdamW([once], lr=0.1)
    for p, o in ((param, optimizer), (once, other)):
        p.sum().backward()
        o.step()
    assert torch.equal(param, once)


def test_what_is_no_leaf_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        pyzero.FusedZeroAdamW([torch.ones(3, requires_grad=True) * 2])
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        pyzero.FusedZeroAdamW(nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        pyzero.FusedZeroAdamW([])


def test_error_if_nonfinite():
    param = nn.Parameter(torch.ones(3))
    optimizer = pyzero.FusedZeroAdam([param])
    (param * math.inf).sum().backward()
    with pytest.raises(RuntimeError, match="The total norm of order 2.0 for gradients is non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert not torch.isfinite(optimizer.clip_grad_norm_(1.0))


@pytest.mark.parametrize("how", ["taken out", "moved", "popped", "state", "new state", "entry"])
def test_groups_and_state_edited_by_hand(how):
    params = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = pyzero.FusedZeroAdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    groups = optimizer.param_groups
    if how == "taken out":
        groups[0]["params"] = params[:1]
    elif how == "moved":
        groups[1]["params"].append(groups[0]["params"].pop(0))
    elif how == "popped":
        groups.pop(0)
    elif how == "state":
        optimizer.state.clear()
    elif how == "new state":
        optimizer.state = collections.defaultdict(dict)
    else:
        optimizer.state[params[0]] = dict(optimizer.state[params[0]])
    sum(params).backward()
    told = {"state": "optimizer.state with 3 entries", "new state": "3 entries, .* got 0", "entry": "others assigned"}
    with pytest.raises(ValueError, match=told.get(how, "out of param_groups")):
        optimizer.step()
    assert all(param == 1 for param in params)


def test_parameters_that_are_appended():
    named = [(name, nn.Parameter(torch.ones(3))) for name in "ab"]
    optimizer = pyzero.FusedZeroAdamW(named[:1])
    (_, param), (_, new) = named
    optimizer.param_groups[0]["params"].append(new)
    (param + new * math.nan).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == 1 and len(optimizer.state) == 2
    new.grad = None
    assert len(copy.deepcopy(optimizer).state) == 2
    params = optimizer.param_groups[0]["params"]
    for refused, told in (
        ([param], "each parameter once in param_groups, got 1 that were appended"),
        ([nn.Parameter(torch.ones(3))] * 2, "each parameter once in param_groups, got 1 that were appended"),
        ([torch.ones(3, requires_grad=True) * 2], "can't optimize a non-leaf Tensor"),
        ([nn.Parameter(param.data)], "parameters with memory of their own"),
    ):
        params += refused
        with pytest.raises(ValueError, match=told):
            optimizer.step()
        del params[2:]
    optimizer.step()


@pytest.mark.parametrize("cls", [pyzero.FusedZeroAdamW, pyzero.FusedZeroSGD, pyzero.ZeroMuon])
def test_appended_groups_that_are_refused_can_be_mended(cls):
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = cls(params[:1], lr=0.1)
    sum(param.sum() for param in params).backward()
    optimizer.param_groups.append({"params": params[1:]})
    with pytest.raises(ValueError, match=r"call optimizer.add_param_group\(optimizer.param_groups.pop\(1\)\)"):
        optimizer.step()
    optimizer.param_groups[1] = {**optimizer.param_groups[0], "params": params}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.step()
    assert all((param == 1).all() for param in params)
    optimizer.param_groups[1] = {"params": params[1:]}
    optimizer.add_param_group(optimizer.param_groups.pop(1))
    optimizer.step()
    assert not any((param == 1).all() for param in params)


def with_assigned_state(group: Any) -> None:
    mine, right = nn.Parameter(torch.ones(70)), nn.Parameter(torch.ones(70))
    optimizer, adamw = pyzero.FusedZeroAdamW([mine], process_group=group), torch.optim.AdamW([right])
    for step in range(4):
        for param, each in ((mine, optimizer), (right, adamw)):
            param.grad = torch.linspace(-1, 1, 70)
            if step == 2:
                state = each.state[param]
                state["exp_avg"] = torch.ones_like(state["exp_avg"])
                state.update(exp_avg_sq=state["exp_avg_sq"] * 4)
                state["step"] += 7
            each.step()
    torch.testing.assert_close(mine, right)
    state = optimizer.state[mine]
    with pytest.raises(ValueError, match="optimizer.set_full_state"):
        state["exp_avg"] = torch.ones(7, 10)
    with pytest.raises(ValueError, match="got mine; keep what is yours elsewhere"):
        state["mine"] = "a note"
    with pytest.raises(ValueError, match="keep its entries"):
        del state["exp_avg"]
    taken = copy.deepcopy(state)
    taken["exp_avg"] = torch.ones(1)
    assert type(taken) is dict and optimizer.state[mine]["exp_avg"].numel() != 1


def test_state_that_is_assigned_counts(ranks):
    for size in (1, 2):
        ranks.run(size, with_assigned_state)


# ---- state dicts ----------------------------------------------------------------------------------------------------


def test_a_rate_that_is_a_tensor_is_copied_on_load():
    optimizer, other = (pyzero.FusedZeroAdamW(weights(), lr=torch.tensor(0.1)) for _ in range(2))
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(5.0)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


def test_a_load_on_one_rank_leaves_what_a_cuda_graph_has_addresses_of():
    params, other = weights(), pyzero.FusedZeroAdamW(weights(), bucket_cap_mb=1.0)
    optimizer = pyzero.FusedZeroAdamW([{"params": params, "lr": torch.tensor(0.1)}], bucket_cap_mb=1e-6)
    (params[0].sum() + params[1].sum()).backward()
    optimizer.step()
    optimizer._updater.keep_for_graph(optimizer._param_buckets.steps, optimizer.param_groups)
    rate = weakref.ref(optimizer.param_groups[0]["lr"])

    def addresses() -> list[int]:
        buckets = [(b.flat, b.master, b.steps, *b.state.values()) for b in optimizer._buckets]
        return [tensor.data_ptr() for tensor in [*params, *(tensor for bucket in buckets for tensor in bucket)]]

    before = addresses()
    for state in (other.state_dict(), other.full_state_dict(), copy.deepcopy(optimizer.state_dict())):
        optimizer.load_state_dict(state)
        assert addresses() == before
    gc.collect()
    assert rate() is not None and rate() is not optimizer.param_groups[0]["lr"]


def trained(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
    return params_of(model)


def from_torch(group: Any, as_number: bool) -> None:
    ours, theirs = build(torch.float32), build(torch.float32)
    right = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    trained(theirs, right, range(3))
    saved = copy.deepcopy(right.state_dict())
    if as_number:
        for state in saved["state"].values():
            state["step"] = float(state["step"])
    ours.load_state_dict(theirs.state_dict())
    left = pyzero.FusedZeroAdamW(ours.parameters(), lr=1.0, process_group=group)
    left.load_state_dict(saved)
    assert left.param_groups[0]["lr"] == 1e-2
    wanted, got = trained(theirs, right, range(3, 6)), trained(ours, left, range(3, 6))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("as_number", [False, True])
def test_torchs_state_dict_loads(ranks, size, as_number):
    ranks.run(size, from_torch, as_number)


def rank_0s_state(group: Any, what: str) -> str:
    """All ranks load rank 0's; or one rank's file does not fit."""
    import torch.distributed as dist

    rank = group.rank()
    model = build(torch.bfloat16)
    optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group)
    trained(model, optimizer, range(2))
    saved = [copy.deepcopy(optimizer.state_dict())]
    if what == "rank 0's":
        dist.broadcast_object_list(saved, src=0, group=group)
    elif rank == 1:
        saved[0]["state"][0]["exp_avg"] = torch.zeros(1)
    trained(model, optimizer, range(2, 3))
    before = [t.clone() for state in optimizer.state.values() for t in state.values()] + params_of(model)
    try:
        optimizer.load_state_dict(saved[0])
    except ValueError as error:
        after = [t for state in optimizer.state.values() for t in state.values()] + params_of(model)
        assert_same(before, after)
        return str(error)
    return "no error"


def test_rank_0s_state_dict_is_refused_by_all_ranks(ranks):
    first, second = ranks.run(2, rank_0s_state, "rank 0's")
    assert "expected the state of rank 1 of 2, got that of rank 0 of 2" in second
    assert "every rank save state_dict() to a file of its own" in second
    assert first.startswith("nothing was loaded, for rank 1 could not") and second in first


def test_a_state_dict_that_does_not_fit_on_one_rank_is_loaded_on_none(ranks):
    first, second = ranks.run(2, rank_0s_state, "shape")
    assert "exp_avg of parameter 0" in second and "rank 1 could not" in first


def test_a_state_dict_says_whose_it_is():
    saved = pyzero.FusedZeroAdamW(weights()).state_dict()
    zero = json.loads(saved["param_groups"][0]["zero"])
    tensors = [[[[4], [1]], [[3], [1]]]]  # by bucket and parameter: shape, strides
    assert zero == {"rank": 0, "num_ranks": 1, "buckets": [[1, 0]], "tensors": tensors, "has_learned": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyzero.FusedZeroAdamW(weights()).load_state_dict(saved)


# ---- compiled autograd ----------------------------------------------------------------------------------------------


def with_compiled_autograd(group: Any, stage: int, clips: bool, compiled: bool) -> list[Tensor]:
    import torch._dynamo.compiled_autograd as compiled_autograd

    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    optimizer = pyzero.FusedZeroAdamW(
        model.parameters(), lr=1e-2, process_group=group, stage=stage, loss_scale=8.0, bucket_cap_mb=1e-3
    )
    for step in range(3):
        loss = model(torch.full((2, 16), 1.0 + group.rank() + step)).square().mean()
        if compiled:
            with enable(torch.compile(backend="eager")):
                optimizer.backward(loss)
        else:
            optimizer.backward(loss)
        if clips:  # by each rank's own norm, the ranks' gradients would get other factors
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        optimizer.zero_grad()
    return params_of(model)


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("clips", [False, True])
def test_compiled_autograd_runs_the_hooks(ranks, size, stage, clips):
    if torch.__version__ < "2.7":
        pytest.skip("compiled autograd of torch 2.6 runs no hooks of parameters, and no callbacks at its end")
    wanted = ranks.run(size, with_compiled_autograd, stage, clips, False)[0]
    for got in ranks.run(size, with_compiled_autograd, stage, clips, True):
        assert_same(got, wanted)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("amsgradd", "amsgrad"),
        ("overlap_grad_sync", "overlap"),
        ("grad_sync_dtype", "grad_reduce_dtype"),
        ("learning_rate", "lr"),
        ("beta1", "betas"),
        ("clip_grad", "max_grad_norm"),
        ("grad_clip", "max_grad_norm"),
        ("gradient_clipping", "max_grad_norm"),
        ("stages", "stage"),
        ("foo", "one of lr, betas, eps, .*, backend"),
    ],
)
def test_an_argument_that_there_is_not_is_refused_with_the_closest(name, meant):
    for optimizer in (pyzero.FusedZeroAdam, pyzero.FusedZeroAdamW):
        message = f"^got '{name}' as an argument of {optimizer.__name__}, expected {meant}; correct the name$"
        with pytest.raises(TypeError, match=message):
            optimizer(weights(), **{name: True})
    if name == "beta1":
        with pytest.raises(TypeError, match="got 'beta1' as an argument of FusedZeroSGD, expected (?!betas)"):
            pyzero.FusedZeroSGD(weights(), beta1=0.9)


@pytest.mark.parametrize("name", ["reduce_grads", "overlap", "init_sync", "cpu_offload"])
def test_what_is_on_or_off_is_true_or_false(name):
    for value in (None, "no", "", 2, 0.5, []):
        with pytest.raises(TypeError, match=re.escape(f"expected {name} as True or False, got {value!r}; pass one")):
            pyzero.FusedZeroAdam(weights(), **{name: value})
    for value in (True, False, 1, 0):
        pyzero.FusedZeroAdam(weights(), **{name: value})


def test_a_largest_norm_is_read_as_torch_reads_it():
    for max_norm in ("1", torch.tensor(1.0), numpy.float32(1.0)):
        params = weights()
        optimizer = pyzero.FusedZeroSGD(params, lr=1.0)
        twins = [nn.Parameter(param.detach().clone()) for param in params]
        for param in (*params, *twins):
            param.grad = torch.full_like(param, 3.0)
        wanted = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        torch.testing.assert_close(optimizer.clip_grad_norm_(max_norm), wanted)
        optimizer.step()
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param.detach(), (twin - twin.grad).detach())
    with pytest.raises(ValueError, match="could not convert"):
        optimizer.clip_grad_norm_("much")


RULES = ["FusedZeroAdam", "FusedZeroLion", "FusedZeroSGD", "ZeroLamb", "ZeroMuon"]
CHANGE_NOTHING = ("params", "param_names", "foreach", "capturable", "fused", "amsgrad", "differentiable")


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_lacks_what_its_rule_needs_is_named(rule):
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "use_muon": False} if rule == "ZeroMuon" else params[1:]]
    groups = [group if isinstance(group, dict) else {"params": group} for group in groups]
    optimizer = getattr(pyzero, rule)(groups)
    needed = {0: {*optimizer.defaults}, 1: {*optimizer.defaults}}
    if rule == "ZeroMuon":
        needed[1] = {"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "bias_correction"}
    for index, names in needed.items():
        for name in names.difference(CHANGE_NOTHING):
            group = optimizer.param_groups[index]
            value = group.pop(name)
            for param in params:
                param.grad = torch.ones_like(param)
            before = params_of(nn.ParameterList(params))
            said = f"expected '{name}' in param_groups[{index}], a hyper-parameter of the rule "
            with pytest.raises(ValueError, match=re.escape(said) + rf".*; set optimizer.param_groups\[{index}\]"):
                optimizer.step()
            assert_same(params_of(nn.ParameterList(params)), before)
            group[name] = value
    for name in CHANGE_NOTHING[2:]:
        optimizer.param_groups[0].pop(name, None)
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(3, 4))


@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_supported_is_refused_after_construction_too(rule, name):
    params = [nn.Parameter(torch.ones(3, 4))]
    optimizer = getattr(pyzero, rule)(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.param_groups[0][name] = True
    with pytest.raises(ValueError, match=f"got {name}=True, which is not supported; leave it out"):
        optimizer.step()
    assert torch.equal(params[0], torch.ones(3, 4))
    optimizer.param_groups[0][name] = False
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(3, 4))
