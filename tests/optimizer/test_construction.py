"""What FusedZeroAdam makes of its parameters: agreement of ranks, tiny shards, several optimizers, few launches."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import assert_same, build, loss_of, micro_batch, params_of
from ranks import ON_GPU
from torch import Tensor, nn

import pyzero
from pyzero import ops
from pyzero.comm.group import Group

DIFFERENCES = {  # shapes and dtypes on rank 0 and on the others; the parameter that differs, and how it is spelt
    "number": ([(3,), (4,)], [(3,)], 1, "(4,) float32 in group 0", "nothing"),
    "shape": ([(3,), (4,)], [(3,), (5,)], 1, "(4,) float32 in group 0", "(5,) float32 in group 0"),
    "order": ([(3,), (4,)], [(4,), (3,)], 0, "(3,) float32 in group 0", "(4,) float32 in group 0"),
}


def disagreeing(group: Any, case: str) -> str:
    shapes = DIFFERENCES[case][min(group.rank(), 1)]
    try:
        pyzero.FusedZeroAdam([nn.Parameter(torch.zeros(shape)) for shape in shapes], process_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("case", DIFFERENCES)
def test_ranks_that_disagree_are_told_where(ranks, case):
    _, _, index, first, other = DIFFERENCES[case]
    for message in ranks.run(3, disagreeing, case):
        assert f"got parameter {index} as {first} on rank 0 and {other} on rank 1" in message


def disagreeing_otherwise(group: Any, what: str) -> str:
    odd = group.rank() == 1
    params = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16 if odd and what == "dtype" else None)) for _ in range(2)]
    if what == "frozen" and odd:
        params[0].requires_grad_(False)
    groups: Any = [{"params": [param]} for param in params] if what == "group" and odd else params
    try:
        pyzero.FusedZeroAdam(groups, process_group=group)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"), [("dtype", "bfloat16"), ("group", "in group 1"), ("frozen", "nothing on rank 1")]
)
def test_dtypes_groups_and_what_is_frozen_must_agree(ranks, what, words):
    for message in ranks.run(2, disagreeing_otherwise, what):
        assert words in message


OPTIONS: dict[str, tuple[Any, Any]] = {  # on rank 0, and on the others
    "stage": (1, 2),
    "max_grad_norm": (0.001, 1000),
    "loss_scale": (None, 128),
    "bucket_cap_mb": (1, 0.002),
    "overlap": (True, False),
    "grad_reduce_dtype": (None, torch.bfloat16),
    "reduce_grads": (True, False),
    "init_sync": (True, False),
    "cpu_offload": (False, True),
    "max_consecutive_skips": (50, None),
    "transport": ("auto", "exact"),
}


def error_of(construct: Any) -> str:
    try:
        construct()
    except ValueError as error:
        return str(error)
    return "no error"


def with_another_option(group: Any, name: str, is_of_other_parts: bool) -> str:
    options = {name: OPTIONS[name][min(group.rank(), 1)], "process_group": group}
    if is_of_other_parts:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        options |= {"process_group": alone, "model_parallel_group": group}
    return error_of(lambda: pyzero.FusedZeroAdam([nn.Parameter(torch.zeros(3))], **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_differ_are_named_on_all_ranks(run, name):
    first, other = OPTIONS[name]
    for message in run(3, with_another_option, name, False):
        assert f"got {name}={first!r} on rank 0 and {other!r} on ranks 1, 2; pass" in message


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_with_other_parts_of_the_model_share_what_concerns_all_of_it(run, name):
    is_shared = name in ("max_grad_norm", "loss_scale", "max_consecutive_skips")
    for message in run(2, with_another_option, name, True):
        assert (f"got {name}=" in message) == is_shared


REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # what rank 1 passes, and its error
    "an option": ({"stage": 7}, "ValueError: expected stage 1 or 2, got 7"),
    "a default": ({"lr": -1.0}, "ValueError: Invalid learning rate: -1.0"),
    "an argument that is not supported": ({"amsgrad": True}, "ValueError: got amsgrad=True"),
    "a name": ({"stagee": 2}, "TypeError: got 'stagee'"),
    "no parameters": ({"params": []}, "ValueError: optimizer got an empty parameter list"),
    "a dtype": ({"params": [nn.Parameter(torch.ones(3).double())]}, "TypeError: expected parameters in float32"),
    "a model": ({"params": nn.Linear(2, 2)}, "TypeError: expected parameters or groups, got a model"),
    "weights tied by pointer": ({}, "ValueError: expected parameters with memory of their own"),
}


def refused_on_rank_1(group: Any, case: str, is_of_other_parts: bool) -> str:
    options = {"process_group": group}
    if is_of_other_parts:
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        options = {"process_group": alone, "model_parallel_group": group}
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    given: dict[str, Any] = {"params": model[0].parameters()}
    if group.rank() == 1:
        given |= REFUSED[case][0]
        if case == "weights tied by pointer":
            model[0].weight.data = model[1].weight.data
    try:
        pyzero.FusedZeroAdam(**given, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_refuses_is_told_to_all(run, case):
    text = REFUSED[case][1]
    first, second, third = run(3, refused_on_rank_1, case, False)
    assert second.startswith(text)
    assert first == third
    assert "rank 1" in first and text in first


def test_what_one_rank_refuses_is_told_to_ranks_with_other_parts_of_the_model(run):
    first, second = run(2, refused_on_rank_1, "an option", True)
    assert second.startswith("ValueError: expected stage 1 or 2, got 7")
    assert "refused on rank 1: ValueError: expected stage 1 or 2, got 7" in first


def with_another_rule(group: Any) -> str:
    kind = pyzero.FusedZeroLion if group.rank() else pyzero.FusedZeroAdam
    return error_of(lambda: kind([nn.Parameter(torch.zeros(3))], process_group=group))


def test_rules_must_agree(ranks):
    for message in ranks.run(2, with_another_rule):
        assert "got rule='adam' on rank 0 and 'lion' on rank 1" in message


def with_a_norm_in_other_words(group: Any) -> str:
    norm: Any = [1, 1.0, torch.tensor(1.0)][group.rank()]
    params = [nn.Parameter(torch.zeros(3))]
    return error_of(lambda: pyzero.FusedZeroAdam(params, process_group=group, max_grad_norm=norm))


def test_equal_options_are_equal_however_they_are_written(ranks):
    assert ranks.run(3, with_a_norm_in_other_words) == ["no error"] * 3


def with_other_strides(group: Any) -> str:
    weight = torch.arange(12.0).view(3, 4)
    if group.rank() == 1:
        weight = weight.t().contiguous().t()
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(weight)]
    return error_of(lambda: pyzero.FusedZeroAdam(params, process_group=group))


def test_strides_must_agree(ranks):
    for message in ranks.run(2, with_other_strides):
        where = "got parameter 1 as (3, 4) float32 in group 0 with strides"
        assert f"{where} (4, 1) on rank 0 and (3, 4) float32 in group 0 with strides (1, 3) on rank 1" in message


def with_strides_of_no_matter(group: Any) -> str:
    """Of a dimension of one element, and of a tensor with gaps, whose slot has none."""
    odd = group.rank() == 1
    column = torch.ones(3, 1).as_strided((3, 1), (1, 7 if odd else 1))
    gaps = torch.ones(3, 8)[:, :4] if odd else torch.ones(3, 4)
    params = [nn.Parameter(column), nn.Parameter(gaps), nn.Parameter(torch.ones(0, 2 + odd)[:, :2])]
    return error_of(lambda: pyzero.FusedZeroAdam(params, process_group=group))


def test_strides_that_order_nothing_may_differ(ranks):
    assert ranks.run(2, with_strides_of_no_matter) == ["no error"] * 2


class Twins(nn.Module):
    """Parameters of one shape, some of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.ParameterList(nn.Parameter(torch.zeros(3), requires_grad=False) for _ in range(2))


EXCHANGED = {  # two places of model.parameters() that rank 1 exchanges, and what is said
    "weights": (0, 2, "parameter 0 as layers.0.weight on rank 0 and layers.1.weight on rank 1"),
    "roles": (6, 7, "parameter 6 as norm.weight on rank 0 and norm.bias on rank 1"),
    "frozen": (8, 9, "frozen parameter 0 as frozen.0 on rank 0 and frozen.1 on rank 1"),
    "wrapped": (0, 2, "number 0 of the model as parameter 0 on rank 0 and parameter 2 on rank 1"),
    "given": (0, 2, "parameter 0 as 0 on rank 0 and 2 on rank 1"),
    "later": (2, 4, "parameter 0 as layers.1.weight on rank 0 and layers.2.weight on rank 1"),
}


def in_another_order(group: Any, how: str) -> str:
    model = Twins()
    params: list[Any] = list(model.parameters())
    if how == "given":
        params = [(str(place), param.detach().clone().requires_grad_()) for place, param in enumerate(params)]
    one, other, _ = EXCHANGED[how]
    kept = model
    if group.rank() == 1:
        params[one], params[other] = params[other], params[one]
        kept = nn.ModuleDict({"inner": model}) if how == "wrapped" else model
    if how == "later":
        optimizer = pyzero.FusedZeroAdam(params[:2], process_group=group)
        found = error_of(lambda: optimizer.add_param_group({"params": params[2:]}))
        assert len(optimizer.param_groups) == 1
    else:
        found = error_of(lambda: pyzero.FusedZeroAdam(params, process_group=group))
    assert list(kept.parameters())
    return found


@pytest.mark.parametrize("how", EXCHANGED)
def test_parameters_in_another_order_are_told_by_name(ranks, how):
    for message in ranks.run(2, in_another_order, how):
        assert f"got {EXCHANGED[how][2]}; the groups list" in message


def otherwise_held(group: Any, how: str) -> str:
    """The same parameters in the same order, which one rank has in other modules, or under other names."""
    model: Any = Twins()
    if how == "a layer further":
        model = nn.Sequential(*[nn.Flatten()] * group.rank(), *model.layers)
    params: list[Any] = list(model.parameters())
    others: Any = None
    if group.rank() == 1:
        if how == "wrapped":
            others = nn.Sequential(nn.Identity(), model)
        elif how == "in a second module":
            others = nn.Sequential(*reversed(model.layers))
        elif how == "in none":
            model = None
        elif how == "named":
            params = list(model.named_parameters("module"))
    found = error_of(lambda: pyzero.FusedZeroAdam(params, process_group=group))
    del model, others
    return found


@pytest.mark.parametrize("how", ["wrapped", "a layer further", "in a second module", "in none", "named"])
def test_modules_around_them_may_differ(ranks, how):
    assert ranks.run(2, otherwise_held, how) == ["no error"] * 2


def in_inference_mode(group: Any, stage: int, what: str) -> list[Tensor]:
    """Two steps; `what` is done under torch.inference_mode()."""

    def within(name: str) -> Any:
        return torch.inference_mode(name == what)

    model = build(torch.bfloat16)
    first, *rest = model.parameters()
    rest[0].requires_grad_(what != "unfreeze")
    with within("build"):
        optimizer = pyzero.FusedZeroAdamW([first], process_group=group, stage=stage)
    with within("add"):
        optimizer.add_param_group({"params": rest})
    rest[0].requires_grad_(True)
    with within("unfreeze"):
        optimizer._place_found(optimizer._find_unfrozen())
    for step in range(2):
        loss_of(model, micro_batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    other = pyzero.FusedZeroAdamW(groups, process_group=group, stage=stage, bucket_cap_mb=1e-3)
    with within("load"):
        other.load_state_dict(saved)
    loss_of(model, micro_batch(2, 0)).backward()
    other.step()
    return [*params_of(model), *(other.full_master(param) for param in model.parameters())]


@pytest.mark.parametrize("what", ["build", "add", "unfreeze", "load"])
@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_what_is_built_in_inference_mode_trains_on(ranks, size, stage, what):
    assert_same(*(ranks.run(size, in_inference_mode, stage, how)[0] for how in (what, "nothing")))


def test_parameters_of_inference_mode_are_refused_by_name():
    with torch.inference_mode():
        frozen, param = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"got parameter 1 of the group made under torch.inference_mode\(\); .*clone"):
        pyzero.FusedZeroAdamW([frozen, param])


def tiny(group: Any, stage: int, dtype: torch.dtype) -> list[Any]:
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = pyzero.FusedZeroAdam([param], lr=0.1, process_group=group, stage=stage, loss_scale=None)
    for _ in range(2):
        optimizer.zero_grad()
        (param.float() * (1.0 + group.rank())).sum().backward()
        optimizer.step()
    return [param.detach().float(), optimizer.state[param]["master"].numel(), float(optimizer.grad_norm)]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_that_are_all_padding(ranks, stage, dtype):
    results = ranks.run(4, tiny, stage, dtype)
    assert [held for _, held, _ in results] == [3, 0, 0, 0]
    for weights, _, norm in results:
        torch.testing.assert_close(weights, torch.full((3,), 0.8), rtol=0, atol=2**-9)
        assert norm == pytest.approx(3**0.5 * 2.5)


def two_over_one_model(group: Any, stage: int) -> list[Tensor]:
    found = []
    for split in (False, True):
        model = build(torch.float32)
        params = list(model.parameters())
        parts = [params[:4], params[4:]] if split else [params]
        optimizers = [pyzero.FusedZeroAdamW(part, lr=1e-2, process_group=group, stage=stage) for part in parts]
        for step in range(4):
            loss_of(model, micro_batch(step, group.rank())).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(params_of(model))
    assert_same(*found)
    return found[0]


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_two_optimizers_over_one_model(ranks, size, stage):
    ranks.run(size, two_over_one_model, stage)


def one_after_another(group: Any) -> None:
    """The second takes over the weights; the first one's hooks are gone, though a traceback may keep it on one rank."""
    found = []
    for before in (None, "gone", "kept on rank 0"):
        model = build(torch.bfloat16)
        first = None
        if before:
            first = pyzero.FusedZeroAdamW(model.parameters(), lr=1.0, process_group=group)
            loss_of(model, micro_batch(9, 0)).backward()
            first.zero_grad()
        if before == "gone" or group.rank() > 0:
            first = None
        optimizer = pyzero.FusedZeroAdamW(model.parameters(), lr=1e-2, process_group=group)
        for step in range(3):
            loss_of(model, micro_batch(step, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(params_of(model))
        if first is not None and group.size() > 1:
            with pytest.raises(RuntimeError, match="expected the optimizer that was built last"):
                first.step()
    assert_same(*found[:2])
    assert_same(*found[1:])


@pytest.mark.parametrize("size", [1, 2])
def test_an_optimizer_after_another(ranks, size):
    ranks.run(size, one_after_another)


def count_launches(group: Any, num_params: int, options: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Ops and messages of one backward and step."""
    params = [nn.Parameter(torch.ones(10)) for _ in range(num_params)]
    optimizer = pyzero.FusedZeroAdamW(params, process_group=group, max_grad_norm=1.0, bucket_cap_mb=4e-3, **options)
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ops.__all__:
            patch.setattr(ops, name, counted(counts, name, getattr(ops, name)))
        patch.setattr(Group, "gather_rows", counted(counts, "gather_rows", Group.gather_rows))
        for name in ("start", "gather"):
            patch.setattr(optimizer._transport, name, counted(counts, name, getattr(optimizer._transport, name)))
        sum(param.sum() for param in params).backward()
        optimizer.step()
    return len(optimizer._buckets), dict(counts)


def counted(counts: Counter[str], name: str, call: Any) -> Any:
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return call(*args, **kwargs)

    return counting


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
def test_launches_grow_with_buckets_not_with_parameters(ranks, size, stage):
    for num_buckets, counts in ranks.run(size, count_launches, 1000, {"stage": stage}):
        assert num_buckets == 10  # 4,194 bytes hold 104 parameters of 40
        assert counts["adam_"] == num_buckets
        assert counts.get("gather", 0) == (num_buckets if size > 1 else 0)
        # A GPU's host does not know of a clean step that there is nothing to count.
        assert counts.get("loss_scale_update_", 0) == ON_GPU and counts.get("gather_rows", 0) == (size > 1)
        if size == 1:
            assert "pack_" not in counts and counts["unscale_"] <= 2
        else:
            assert counts["start"] == counts["reduce_scatter_"] == num_buckets
            # Gradients; and, where ranks share memory, weights out of the shard, and the others' in.
            assert counts["pack_"] == num_buckets * (1 if ON_GPU else 3)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_a_parameter_that_comes_twice_leaves_the_others_their_names():
    tied, bias, last = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    pairs = [("tied", tied), ("again", tied), ("bias", bias), ("last", last)]
    group = pyzero.FusedZeroAdam([{"params": pairs}]).param_groups[0]
    assert (group["param_names"], len(group["params"])) == (["tied", "bias", "last"], 3)
