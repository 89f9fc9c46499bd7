"""torch.nn.utils.clip_grad_norm_ kept in the loop, and what else asks `.grad`: as torch on the mean in one process."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import build, loss_of, micro_batch
from own_groups import is_refused
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import pyzero

ADAM = {"lr": 1e-2, "betas": (0.5, 0.5), "eps": 1e-2, "weight_decay": 0.0}
MAX_NORM = 0.125  # below all norms here
NORMS = (1.0, 2.0, 3.5, math.inf)
# fp32: sums of some thousand terms. bf16: gradients are rounded once more when sent, and torch's norms of them too.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}

STAGES = pytest.mark.parametrize("stage", [1, 2])
# One rank has no stages.
UP_TO_TWO = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2)])
UP_TO_THREE = pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
MIXED = pytest.mark.parametrize(
    ("size", "stage", "dtype"),
    [
        (1, 2, torch.float32),
        *[(2, stage, dtype) for stage in (1, 2) for dtype in (torch.float32, torch.bfloat16)],
        *[(3, stage, torch.bfloat16) for stage in (1, 2)],
    ],
    ids=str,
)
FOREACH = pytest.mark.parametrize("foreach", [None, True, False])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Nets:
    """The model on this rank; and fp32 weights with torch's AdamW, which gets the mean of all ranks' gradients."""

    def __init__(self, group: Any, stage: int, dtype: torch.dtype) -> None:
        self.rank, self.size, self.dtype = group.rank(), group.size(), dtype
        self.model = build(dtype)
        self.optimizer = pyzero.FusedZeroAdamW(
            self.model.parameters(), **ADAM, process_group=group, stage=stage, loss_scale=None, bucket_cap_mb=1e-2
        )
        # torch has no inf-norm of the empty one
        self.ours = [param for param in self.model.parameters() if param.numel()]
        self.theirs = [nn.Parameter(param.detach().float().clone()) for param in self.ours]
        self.adam = torch.optim.AdamW(self.theirs, **ADAM, foreach=False)

    def backward(self, number: int, sync: bool = True) -> None:
        """On both sides, with another micro-batch on each rank."""
        for rank in range(self.size):
            copy = build(self.dtype)
            copy.load_state_dict(self.model.state_dict())
            loss_of(copy, micro_batch(number, rank)).backward()
            grads = [param.grad for param in copy.parameters() if param.numel()]
            for param, grad in zip(self.theirs, grads, strict=True):
                param.grad = grad.float() / self.size + (0.0 if param.grad is None else param.grad)
        with nullcontext() if sync else self.optimizer.no_sync():
            loss_of(self.model, micro_batch(number, self.rank)).backward()

    def clip(self, which: slice = slice(None), max_norm: float = MAX_NORM, **options: Any) -> None:
        norm = clip_grad_norm_(self.ours[which], max_norm, **options)
        wanted = clip_grad_norm_(self.theirs[which], max_norm, **options)
        assert norm.dim() == 0 and wanted > MAX_NORM
        torch.testing.assert_close(norm.float(), wanted, rtol=RELATIVE[self.dtype], atol=0)

    def check_gradients(self) -> None:
        grads = [self.optimizer.full_grad(param) for param in self.ours]
        largest = max(float(param.grad.abs().max()) for param in self.theirs)
        for grad, param in zip(grads, self.theirs, strict=True):
            assert grad is not None
            torch.testing.assert_close(grad, param.grad, rtol=0, atol=RELATIVE[self.dtype] * largest)

    def step(self) -> None:
        self.optimizer.step()
        self.adam.step()
        self.optimizer.zero_grad()
        self.adam.zero_grad()

    def check_weights(self) -> None:
        masters = [self.optimizer.full_master(param) for param in self.ours]
        for master, param, other in zip(masters, self.ours, self.theirs, strict=True):
            # A step moves by less than lr * |gradient| / eps, and no gradient is above MAX_NORM.
            atol = 4 * RELATIVE[self.dtype] * ADAM["lr"]
            torch.testing.assert_close(master, other.detach(), rtol=1e-6, atol=atol)
            assert torch.equal(param, master.to(self.dtype))


class Lines:
    """Two parameters of 64 and 201 elements; gradients are numbers times 1 + rank."""

    def __init__(self, group: Any, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.first = nn.Parameter(torch.full((64,), 2.0, dtype=dtype))
        self.second = nn.Parameter(torch.full((3, 67), 2.0, dtype=dtype))
        self.params = [self.first, self.second]
        self.optimizer = pyzero.FusedZeroAdam(
            self.params, lr=0.125, betas=(0.5, 0.5), eps=1.0, process_group=group, stage=stage, **options
        )

    def mean(self, factor: float) -> float:
        return factor * (1 + self.size) / 2

    def loss(self, param: Tensor, factor: float) -> Tensor:
        return (param.float() * (factor * (1 + self.rank))).sum()

    def gradient(self, param: Tensor) -> float | None:
        """Of all elements alike, as the first step's exp_avg tells."""
        state = self.optimizer.full_state(param)
        if state["step"] == 0:
            return None
        assert state["step"] == 1 and (state["exp_avg"] == state["exp_avg"].view(-1)[0]).all()
        return 2 * float(state["exp_avg"].view(-1)[0])


# ---- clip_grad_norm_ -----------------------------------------------------------------------------------------------


def every_norm(group: Any, stage: int, dtype: torch.dtype, foreach: bool | None) -> None:
    nets = Nets(group, stage, dtype)
    for number, norm_type in enumerate(NORMS):
        nets.backward(number)
        nets.clip(norm_type=norm_type, foreach=foreach)
        nets.check_gradients()
        nets.step()
    nets.check_weights()


@FOREACH
@MIXED
def test_every_norm(run, size, stage, dtype, foreach):
    run(size, every_norm, stage, dtype, foreach)


def accumulated(group: Any, stage: int, dtype: torch.dtype, how: str, foreach: bool | None) -> None:
    nets = Nets(group, stage, dtype)
    for step in range(2):
        for micro in range(3):
            nets.backward(3 * step + micro, sync="no_sync" not in how or (micro == 2 and how != "no_sync, all"))
            if "each" in how or micro == 2:
                nets.clip(foreach=foreach)
        nets.check_gradients()
        nets.step()
    nets.check_weights()


@pytest.mark.parametrize("how", ["last", "each", "no_sync", "no_sync, each", "no_sync, all"])
@pytest.mark.parametrize(("size", "dtype", "foreach"), [(2, torch.float32, None), (3, torch.bfloat16, False)], ids=str)
@STAGES
def test_clipping_with_accumulation(run, size, stage, dtype, how, foreach):
    run(size, accumulated, stage, dtype, how, foreach)


def a_subset(group: Any, stage: int, dtype: torch.dtype) -> None:
    nets = Nets(group, stage, dtype)
    for step in range(2):
        nets.backward(step)
        nets.clip(slice(0, 3))
        nets.clip(slice(4, 5), norm_type=1.0)
        nets.check_gradients()
        nets.step()
    nets.check_weights()


@MIXED
def test_a_subset_of_the_parameters(run, size, stage, dtype):
    run(size, a_subset, stage, dtype)


def norm_then_scale(group: Any, stage: int, dtype: torch.dtype) -> None:
    nets = Nets(group, stage, dtype)
    for number, norm_type in enumerate(NORMS):
        nets.backward(number)
        norm = get_total_norm([param.grad for param in nets.ours], norm_type)
        wanted = get_total_norm([param.grad for param in nets.theirs], norm_type)
        torch.testing.assert_close(norm.float(), wanted, rtol=RELATIVE[dtype], atol=0)
        clip_grads_with_norm_(nets.ours, MAX_NORM, norm)
        clip_grads_with_norm_(nets.theirs, MAX_NORM, wanted)
        nets.check_gradients()
        nets.step()
    nets.check_weights()


@MIXED
def test_get_total_norm(run, size, stage, dtype):
    run(size, norm_then_scale, stage, dtype)


def not_finite(group: Any, stage: int, value: float, foreach: bool | None) -> tuple[str, float, bool]:
    lines = Lines(group, stage)
    ours = value if lines.rank == lines.size - 1 else 1.0
    (lines.loss(lines.first, ours) + lines.loss(lines.second, 1.0)).backward()
    message = ""
    try:
        clip_grad_norm_(lines.params, 1.0, error_if_nonfinite=True, foreach=foreach)
    except RuntimeError as error:
        message = str(error)
    norm = float(clip_grad_norm_(lines.params, 1.0, foreach=foreach))
    lines.optimizer.step()
    return message, norm, lines.optimizer.was_step_applied


@FOREACH
@pytest.mark.parametrize("value", [math.inf, math.nan])
@UP_TO_TWO
def test_a_norm_that_is_not_finite_raises_on_every_rank(run, size, stage, value, foreach):
    for message, norm, applied in run(size, not_finite, stage, value, foreach):
        assert "non-finite" in message
        assert not math.isfinite(norm) and not applied


def different_use(group: Any, stage: int, dtype: torch.dtype, foreach: bool | None) -> tuple[list[float], Any]:
    """The second parameter is used on rank 0 alone."""
    lines = Lines(group, stage, dtype)
    loss = lines.loss(lines.first, 1.0)
    if lines.rank == 0:
        loss = loss + lines.loss(lines.second, 4.0 * lines.size)
    loss.backward()
    norms = [float(clip_grad_norm_(lines.params, max_norm, foreach=foreach)) for max_norm in (1e9, 1.0, 1e9)]
    lines.optimizer.step()
    return norms, [lines.gradient(param) for param in lines.params]


@FOREACH
@MIXED
def test_a_parameter_used_on_rank_0_alone(run, size, stage, dtype, foreach):
    mean = (1 + size) / 2
    norm = math.sqrt(64 * mean**2 + 201 * 4.0**2)
    rel = RELATIVE[dtype]
    for norms, gradients in run(size, different_use, stage, dtype, foreach):
        assert norms == pytest.approx([norm, norm, 1.0], rel=rel)
        assert gradients == pytest.approx([mean / norm, 4.0 / norm], rel=rel)


def unused(group: Any, stage: int, foreach: bool | None) -> tuple[list[float], Any, bool]:
    lines = Lines(group, stage, weight_decay=0.5)
    lines.loss(lines.first, 1.0).backward()
    norms = [float(clip_grad_norm_(lines.params, 1.0, foreach=foreach)) for _ in range(2)]
    grad = lines.optimizer.full_grad(lines.second)
    lines.optimizer.step()
    still = torch.equal(lines.second, torch.full_like(lines.second, 2.0))
    return norms, [grad, lines.gradient(lines.second)], still


@FOREACH
@UP_TO_THREE
def test_an_unused_parameter_stays(run, size, stage, foreach):
    for norms, gradients, still in run(size, unused, stage, foreach):
        assert norms == pytest.approx([8.0 * (1 + size) / 2, 1.0], rel=1e-5)
        assert gradients == [None, None] and still


def values_clipped(group: Any, stage: int, foreach: bool | None, after_a_read: bool) -> tuple[bool, Any]:
    lines = Lines(group, stage)
    (lines.loss(lines.first, 4.0) + lines.loss(lines.second, 1.0)).backward()
    if after_a_read:
        lines.optimizer.full_grad(lines.first)
    refused = is_refused(lambda: clip_grad_value_(lines.params, 0.5, foreach=foreach))
    lines.optimizer.step()
    return refused, [lines.gradient(param) for param in lines.params]


@pytest.mark.parametrize("after_a_read", [False, True])
@FOREACH
@UP_TO_TWO
def test_clip_grad_value_is_refused_on_several_ranks(run, size, stage, foreach, after_a_read):
    """A mean of clipped values is not the clipped mean. What is refused has changed nothing."""
    mean = (1 + size) / 2
    for refused, gradients in run(size, values_clipped, stage, foreach, after_a_read):
        assert refused == (size > 1)
        assert gradients == pytest.approx([4.0 * mean, mean] if size > 1 else [0.5, 0.5], rel=1e-6)


# ---- what else asks `.grad` ----------------------------------------------------------------------------------------


def logged(group: Any, stage: int, dtype: torch.dtype, how: str) -> tuple[list[float], Any]:
    lines, norms = Lines(group, stage, dtype), []
    for _ in range(2):
        lines.loss(lines.first, 1.0).backward()
        norms.append(float(lines.first.grad.data.norm(2)) if how == "data" else float(lines.first.grad.detach().norm()))
        for p in (2, 1.0, math.inf):
            norms.append(float(lines.first.grad.norm(p)))
        norms.append(float(lines.first.grad.norm()))
        norms.append(float(torch.norm(lines.first.grad)))
        norms.append(float(torch.linalg.vector_norm(lines.first.grad)))
    lines.optimizer.step()
    return norms, [lines.gradient(param) for param in lines.params]


@pytest.mark.parametrize("how", ["data", "detach"])
@DTYPES
@UP_TO_THREE
def test_norms_in_a_logger_are_of_the_mean_and_change_nothing(run, size, stage, dtype, how):
    mean = (1 + size) / 2
    once = [8 * mean, 8 * mean, 64 * mean, mean, *[8 * mean] * 3]
    for norms, gradients in run(size, logged, stage, dtype, how):
        assert norms == pytest.approx([*once, *[2 * norm for norm in once]], rel=1e-6)
        assert gradients == [2 * mean, None]


def norms_of_a_matrix(group: Any, stage: int) -> list[Any]:
    """What torch.linalg.norm says of a reduced gradient of two dimensions, by order."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    optimizer = pyzero.FusedZeroAdamW([weight], process_group=group, stage=stage)
    weight.square().sum().backward()
    whole, found = optimizer.full_grad(weight), []
    for order in (None, "fro", 2, 1, -1, math.inf, -math.inf, "nuc"):
        try:
            norm = torch.linalg.norm(weight.grad, order)
        except RuntimeError as error:
            found.append("of a matrix" in str(error))
        else:
            torch.testing.assert_close(norm, torch.linalg.norm(whole, order))
            found.append("as torch's")
    precise = torch.linalg.vector_norm(weight.grad, dtype=torch.float64)
    (foreach,) = torch._foreach_norm([weight.grad], 2.0, dtype=torch.float64)
    return [*found, precise.dtype == foreach.dtype == torch.float64]


@UP_TO_TWO
def test_the_norm_of_a_matrix_is_torchs_or_refused(run, size, stage):
    refused = "as torch's" if size == 1 else True
    for found in run(size, norms_of_a_matrix, stage):
        assert found == ["as torch's", "as torch's", *[refused] * 6, True]


def test_gradients_that_were_clipped_are_freed_with_grad():
    param = nn.Parameter(torch.ones(8))
    optimizer = pyzero.FusedZeroAdamW([param])
    param.sum().backward()
    memory = StorageWeakRef(param.grad.untyped_storage())
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert not memory.expired()
    param.grad = None
    assert memory.expired()


def added_up_in_place(group: Any, stage: int) -> tuple[float, float]:
    lines = Lines(group, stage)
    lines.loss(lines.first, 1.0).backward()
    total = lines.first.grad.norm()
    before = float(total)
    total += lines.first.grad.norm()
    return before, float(lines.first.grad.norm())


@STAGES
def test_a_norm_is_the_callers_to_write(run, stage):
    for before, after in run(2, added_up_in_place, stage):
        assert before == after


def asked_whether_finite(group: Any, stage: int, value: float) -> list[bool]:
    lines = Lines(group, stage)
    ours = value if lines.rank == lines.size - 1 else 1.0
    (lines.loss(lines.first, ours) + lines.loss(lines.second, 1.0)).backward()
    first, second = (param.grad for param in lines.params)
    has_nan = [bool(torch.isnan(first).any()), bool(first.isnan().any()), bool(second.isnan().any())]
    assert has_nan == [math.isnan(value)] * 2 + [False]
    return [bool(torch.isfinite(first).all()), bool(first.isfinite().all()), bool(second.isfinite().all())]


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
@UP_TO_TWO
def test_isfinite_is_of_all_ranks(run, size, stage, value):
    assert run(size, asked_whether_finite, stage, value) == [[math.isfinite(value), math.isfinite(value), True]] * size


def negated(group: Any, stage: int, how: str) -> list[float]:
    lines = Lines(group, stage, max_grad_norm=1.0 if how == "step" else None)
    (lines.loss(lines.first, 1.0) + lines.loss(lines.second, 2.0)).backward()
    lines.optimizer.full_grad(lines.first)
    torch._foreach_mul_([param.grad for param in lines.params], -1.0)
    wanted = lines.mean((64 * 1.0 + 201 * 4.0) ** 0.5)
    if how != "step":
        clip = (
            torch.nn.utils.clip_grad_norm_ if how == "torch" else lambda _, most: lines.optimizer.clip_grad_norm_(most)
        )
        assert float(clip(lines.params, 1.0)) == pytest.approx(wanted, rel=1e-6)
    lines.optimizer.step()
    if how == "step":
        assert float(lines.optimizer.grad_norm) == pytest.approx(wanted, rel=1e-6)
    return [lines.gradient(param) * wanted / lines.mean(1.0) for param in lines.params]


@pytest.mark.parametrize("how", ["torch", "optimizer", "step"])
@UP_TO_TWO
def test_a_clip_keeps_the_sign_of_a_negative_factor(run, size, stage, how):
    for grads in run(size, negated, stage, how):
        assert grads == pytest.approx([-1.0, -2.0], rel=1e-5)


def multiplied(group: Any, stage: int, how: str) -> Any:
    lines = Lines(group, stage)
    (lines.loss(lines.first, 1.0) + lines.loss(lines.second, 2.0)).backward()
    lines.optimizer.full_grad(lines.first)
    for param in lines.params:
        if how == "mul_":
            assert param.grad.mul_(4.0) is param.grad
        elif how == "mul_ by a tensor":
            param.grad.mul_(torch.tensor(4.0))
        elif how == "div_":
            param.grad.div_(0.25)
        elif how == "div_ by a tensor":
            param.grad.div_(torch.tensor(0.25))
        elif how == "*=":
            param.grad *= 4.0
        elif how == "/=":
            param.grad /= 0.25
    if how == "foreach":
        torch._foreach_mul_([param.grad for param in lines.params], 4.0)
    elif how == "foreach by a tensor":
        torch._foreach_mul_([param.grad for param in lines.params], torch.tensor(4.0))
    grads = [lines.optimizer.full_grad(param) for param in lines.params]
    norm = float(lines.first.grad.norm())
    lines.optimizer.step()
    return norm, [float(grad.unique()) for grad in grads], [lines.gradient(param) for param in lines.params]


@pytest.mark.parametrize(
    "how", ["mul_", "mul_ by a tensor", "div_", "div_ by a tensor", "*=", "/=", "foreach", "foreach by a tensor"]
)
@UP_TO_TWO
def test_a_reduced_gradient_can_be_multiplied(run, size, stage, how):
    mean = (1 + size) / 2
    for norm, grads, gradients in run(size, multiplied, stage, how):
        assert norm == 8 * 4 * mean
        assert grads == gradients == [4 * mean, 8 * mean]


def zeroed(group: Any, stage: int, how: str) -> Any:
    lines = Lines(group, stage)
    lines.loss(lines.first, 1.0).backward()
    lines.optimizer.full_grad(lines.first)
    if how == "foreach":
        torch._foreach_zero_([lines.first.grad])
    else:
        assert lines.first.grad.requires_grad_(False) is lines.first.grad
        lines.first.grad.detach().zero_()
    norms = [float(lines.first.grad.norm())]
    lines.loss(lines.first, 4.0).backward()
    norms.append(float(lines.first.grad.norm()))
    lines.optimizer.step()
    return norms, lines.gradient(lines.first)


@pytest.mark.parametrize("how", ["one", "foreach"])
@UP_TO_TWO
def test_a_reduced_gradient_can_be_zeroed(run, size, stage, how):
    mean = (1 + size) / 2
    for norms, gradient in run(size, zeroed, stage, how):
        assert norms == [0.0, 32 * mean] and gradient == 4 * mean


def assigned_to_data(group: Any, dtype: torch.dtype) -> list[float]:
    """Of this rank's own sum of two backwards, in the manner of old loops."""
    lines = Lines(group, 2, dtype)
    with lines.optimizer.no_sync():
        for _ in range(2):
            (lines.loss(lines.first, 1.0) + lines.loss(lines.second, 1.0)).backward()
    lines.first.grad.data = lines.first.grad.data / 2
    lines.second.grad.data.mul_(0.5)
    found = []
    for _ in range(2):
        nn.ParameterList(lines.params).to(lines.first.device)  # nothing is to be moved
        found += [float(lines.optimizer.full_grad(param).unique()) for param in lines.params]
    return found


@DTYPES
def test_what_is_written_to_the_data_of_a_local_sum_counts(run, dtype):
    assert run(2, assigned_to_data, dtype) == [[1.5] * 4] * 2


# ---- pyzero.ShardedGrad --------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "+": lambda g: g + 1,
    "*": lambda g: g * 2,
    "-": lambda g: -g,
    "==": lambda g: g == 0,
    "sum": lambda g: g.sum(),
    "max": lambda g: g.abs().max(),
    "index": lambda g: g[0],
    "write one": lambda g: g.__setitem__(0, 1.0),
    "add_": lambda g: g.add_(1.0),
    "clamp_": lambda g: g.clamp_(-1.0, 1.0),
    "copy_": lambda g: g.copy_(torch.zeros(g.shape)),
    "data": lambda g: setattr(g, "data", torch.zeros(g.shape)),
    "copy_ elsewhere": lambda g: torch.zeros(g.shape).copy_(g),
    "mul_ by elements": lambda g: g.mul_(torch.ones(g.shape)),
    "clone": lambda g: g.clone(),
    "view": lambda g: g.view(-1),
    "to": lambda g: g.to(torch.float64),
    "cat": lambda g: torch.cat([g, g]),
    "foreach": lambda g: torch._foreach_add([g], 1.0),
    "foreach, in place": lambda g: torch._foreach_add_([g], 1.0),
    "allclose": lambda g: torch.allclose(g, g),
    "norm over a dimension": lambda g: g.norm(dim=0),
    "norm that keeps dimensions": lambda g: torch.linalg.vector_norm(g, keepdim=True),
    "count of what is not zero": lambda g: g.norm(0),
    "smallest value": lambda g: torch.linalg.vector_norm(g, -math.inf),
    "div_ to whole numbers": lambda g: g.div_(3.0, rounding_mode="floor"),
}


def refusals(group: Any, stage: int) -> tuple[dict[str, str], Any]:
    """What each says, and the gradient afterwards."""
    lines, found = Lines(group, stage), {}
    lines.loss(lines.first, 1.0).backward()
    lines.optimizer.full_grad(lines.first)
    for name, action in REFUSED.items():
        try:
            action(lines.first.grad)
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    lines.optimizer.step()
    return found, lines.gradient(lines.first)


@STAGES
@pytest.mark.parametrize("size", [2])
def test_all_else_is_refused_and_says_what_to_call(run, size, stage):
    for found, gradient in run(size, refusals, stage):
        for name, said in found.items():
            assert said.startswith("RuntimeError: ") and "full_grad" in said, f"{name}: {said}"
        assert gradient == (1 + size) / 2


def sharded(group: Any, stage: int, dtype: torch.dtype) -> list[Any]:
    lines = Lines(group, stage, dtype)
    lines.loss(lines.second, 1.0).backward()
    lines.optimizer.full_grad(lines.second)
    found = []
    for param in lines.params:
        grad = param.grad
        try:
            num_bytes = grad.untyped_storage().nbytes()
        except RuntimeError:  # there is none to be asked
            num_bytes = 0
        kind = [type(grad) is pyzero.ShardedGrad, isinstance(grad, Tensor), "ShardedGrad" in repr(grad)]
        like = [grad.shape == param.shape, grad.dtype == param.dtype, grad.device == param.device]
        found.append([*kind, *like, grad.numel() == param.numel(), num_bytes == 0])
    return found


@DTYPES
@STAGES
@pytest.mark.parametrize("size", [2])
def test_a_sharded_gradient_is_like_its_parameter_and_takes_no_storage(run, size, stage, dtype):
    for found in run(size, sharded, stage, dtype):
        assert found == [[True] * 8] * 2


def read_on_one_rank(group: Any, stage: int) -> str:
    """A norm that rank 0 alone logs."""
    param = nn.Parameter(torch.ones(70))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=stage)
    param.sum().backward()
    try:
        if group.rank() == 0:
            param.grad.norm()
        optimizer.step()
    except pyzero.CollectiveError as error:
        return str(error)
    return "no error"


@STAGES
@pytest.mark.parametrize("size", [2])
def test_a_norm_read_on_one_rank_alone_is_an_error_on_all(run, size, stage):
    for message in run(size, read_on_one_rank, stage):
        assert "got a norm of .grad on rank 0, step on rank 1" in message


def read_after_a_backward_on_one_rank(group: Any) -> str:
    param = nn.Parameter(torch.ones(70))
    optimizer = pyzero.FusedZeroAdam([param], process_group=group, stage=1)
    for is_run in (True, group.rank() == 0):
        if is_run:
            param.sum().backward()
        try:
            param.grad.norm()  # of which rank 1 knows the earlier one
        except pyzero.CollectiveError as error:
            return str(error)
    with pytest.raises(pyzero.CollectiveError) as raised:
        optimizer.step()
    return str(raised.value)


@pytest.mark.parametrize("size", [2])
def test_a_norm_that_some_ranks_know_from_before_a_backward_of_the_others_is_told(run, size):
    for message in run(size, read_after_a_backward_on_one_rank):
        assert "got a norm of .grad on rank 0, step on rank 1" in message
        assert "a backward ran on some ranks only between two norms" in message
