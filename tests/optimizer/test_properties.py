"""FusedZeroAdam over random models, groups, ranks, micro-batches and overflows: against fp64, and bit against bit.

A parameter's gradient is a coefficient tensor, exactly: 3 * {1, 2, 3, 4} times a power of two. Up to 4 ranks with up to
3 micro-batches each add up to 144 at most in units of that power, which 8 bits hold; a third of it is whole, and
rounding it times fp32's 1/3 gives just that, for fp32's 1/3 is off by 2^-25 of itself. So every sum and every mean is
exact in every dtype and order, and bits are owed between any two ways to the same mean.

A gradient has the sign in which Adam moves its weight towards 0, and no weight gets there: nothing cancels, neither
between steps nor with the decay, and rounding errors stay what they are.
"""

import contextlib
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randn
from tolerances import ADAM, UNIT
from torch import Tensor, nn

import pyzero

SETTINGS = settings(max_examples=25, derandomize=True, deadline=None, print_blob=True, database=None)
FEWER = settings(SETTINGS, max_examples=16)
SMALLEST_WEIGHT = 0.5


# ---- cases: what is computed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Param:
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    frozen: bool
    transposed: bool  # in memory


@dataclass(frozen=True)
class Hyper:
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    decoupled: bool
    maximize: bool


@dataclass(frozen=True)
class Overflow:
    step: int
    backward: int
    rank: int
    value: float


@dataclass(frozen=True)
class Case:
    params: tuple[Param, ...]
    groups: tuple[Hyper, ...]
    num_ranks: int
    no_sync: tuple[tuple[bool, ...], ...]  # [step][backward]
    used: tuple[tuple[tuple[int, ...], ...], ...]  # [step][backward][rank]: bits of the trained parameters
    overflow: Overflow | None
    max_norm: float | None
    loss_scale: float | pyzero.LossScale | None
    seed: int
    rough: bool = False  # coefficients that round

    @property
    def trained(self) -> list[int]:
        return [index for index, spec in enumerate(self.params) if not spec.frozen]


@dataclass(frozen=True)
class Route:
    """How it is computed."""

    stage: int
    overlap: bool
    bucket_cap_mb: float
    hook_order: int  # a seed


def seeded(case: Case, *numbers: int) -> torch.Generator:
    seed = case.seed
    for number in numbers:
        seed = seed * 31 + number
    return torch.Generator().manual_seed(seed)


def signs(case: Case, index: int) -> Tensor:
    return torch.randint(0, 2, case.params[index].shape, generator=seeded(case, index, 1)) * 2.0 - 1.0


def start(case: Case, index: int) -> Tensor:
    spec = case.params[index]
    size = SMALLEST_WEIGHT + 1.5 * torch.rand(spec.shape, generator=seeded(case, index, 2))
    value = (signs(case, index) * size).to(spec.dtype)
    return value.mT.contiguous().mT if spec.transposed and value.dim() > 1 else value


def coefficient(case: Case, index: int, step: int, backward: int, rank: int) -> Tensor:
    shape, generator = case.params[index].shape, seeded(case, index, step, backward, rank)
    if case.rough:
        spread = torch.randint(-18, 1, shape, generator=generator)  # so that sums of 8-bit values round in fp32 too
        size = (0.1 + torch.rand(shape, generator=generator)) * 2.0**spread
    else:
        size = 3.0 * torch.randint(1, 5, shape, generator=generator)
    towards_zero = signs(case, index) * (-1.0 if case.groups[case.params[index].group].maximize else 1.0)
    return towards_zero * size * 2.0 ** (-(index % 5))


def gradients(case: Case, step: int, backward: int, rank: int) -> dict[int, Tensor]:
    """Of the parameters that this rank uses in this backward."""
    bits = case.used[step][backward][rank]
    found = {
        index: coefficient(case, index, step, backward, rank)
        for position, index in enumerate(case.trained)
        if bits >> position & 1
    }
    bad = case.overflow
    victim = next((grad for grad in found.values() if grad.numel()), None)
    if victim is not None and bad is not None and (bad.step, bad.backward, bad.rank) == (step, backward, rank):
        victim.view(-1)[-1] = bad.value
    return found


def mean_gradients(case: Case, step: int) -> dict[int, Tensor]:
    """Of the parameters that any rank uses in this step; summed over its backwards, in fp64."""
    total: dict[int, Tensor] = {}
    for backward in range(len(case.no_sync[step])):
        for rank in range(case.num_ranks):
            for index, grad in gradients(case, step, backward, rank).items():
                total[index] = total.get(index, 0.0) + grad.double()
    return {index: grad / case.num_ranks for index, grad in total.items()}


# ---- strategies ---------------------------------------------------------------------------------------------------

SIZES = st.integers(0, 9)
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (63,), (64,), (65,), (4, 0), (17, 19), (1500,)]),
    st.tuples(SIZES),
    st.tuples(SIZES, SIZES),
    st.tuples(SIZES, SIZES, SIZES),
)
LARGE = st.sampled_from([(63,), (130,), (17, 19), (40, 11), (1500,)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HYPERS = st.builds(
    Hyper,
    lr=st.sampled_from([1e-3, 1e-2, 3e-2]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.5, 0.9)]),
    decoupled=st.booleans(),
    maximize=st.booleans(),
)


def route_of(seed: int) -> Route:
    """Evenly spread over all routes, which a strategy's draws are not."""
    draw = random.Random(seed)
    cap = draw.choice([1e-6, 2e-4, 1e-3, 4e-3, 25.0])
    return Route(draw.choice([1, 2]), draw.choice([False, True]), cap, draw.randrange(100))


ROUTES = st.builds(route_of, st.integers(0, 2**32 - 1))
TWO_ROUTES = st.tuples(ROUTES, ROUTES).filter(lambda routes: routes[0] != routes[1])
LOSS_SCALES = st.sampled_from([None, 8.0, pyzero.LossScale(init_scale=8.0, growth_interval=1)])


@st.composite
def cases(draw: Any, rough: bool = False, min_ranks: int = 1) -> Case:
    """`rough`: the order of sums is the same by any route where each step has one backward and nothing is clipped.

    Its parameters are larger, for other buckets to be other shards.
    """
    groups = [draw(HYPERS) for _ in range(draw(st.sampled_from([3, 2, 1])))]
    one = st.builds(
        Param,
        LARGE if rough else SHAPES,
        DTYPES,
        st.integers(0, len(groups) - 1),
        st.sampled_from([False] * 5 + [True]),
        st.booleans(),
    )
    params = draw(st.lists(one, min_size=1, max_size=8).filter(lambda specs: not all(p.frozen for p in specs)))
    everything = 2 ** sum(not p.frozen for p in params) - 1
    bits = st.one_of(st.just(everything), st.integers(1, everything))  # any parameters but none
    num_ranks = draw(st.integers(min_ranks, 4))
    backwards = st.lists(st.booleans(), min_size=1, max_size=1 if rough else 3)
    no_sync = draw(st.lists(backwards, min_size=1, max_size=3))
    used = []
    for step in no_sync:
        by_any = draw(bits)
        on_each = st.lists(
            bits.map(lambda mine, by_any=by_any: mine & by_any or by_any), min_size=num_ranks, max_size=num_ranks
        )
        used.append(tuple(tuple(draw(on_each)) for _ in step))
    overflow = None
    if draw(st.booleans()):
        step = draw(st.integers(0, len(no_sync) - 1))
        value = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
        where = draw(st.tuples(st.integers(0, len(no_sync[step]) - 1), st.integers(0, num_ranks - 1)))
        overflow = Overflow(step, *where, value)
    return Case(
        params=tuple(params),
        groups=tuple(groups),
        num_ranks=num_ranks,
        no_sync=tuple(map(tuple, no_sync)),
        used=tuple(used),
        overflow=overflow,
        max_norm=None if rough else draw(st.sampled_from([None, 0.5, 20.0, 1e4])),
        loss_scale=draw(LOSS_SCALES),
        seed=draw(st.integers(0, 999)),
        rough=rough,
    )


# ---- what each rank runs ------------------------------------------------------------------------------------------

State = list[dict[str, Any]]  # of each parameter, numpy arrays


def build(case: Case, rank: int) -> list[nn.Parameter]:
    """Ranks start apart: rank 0's values count."""
    values = [start(case, index) for index in range(len(case.params))]
    specs = zip(values, case.params, strict=True)
    return [nn.Parameter(v if s.frozen else v + rank, requires_grad=not s.frozen) for v, s in specs]


def groups_of(case: Case, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    groups = []
    for number, hyper in enumerate(case.groups):
        members = [param for param, spec in zip(params, case.params, strict=True) if spec.group == number]
        options = dict(lr=hyper.lr, weight_decay=hyper.weight_decay, betas=hyper.betas, maximize=hyper.maximize)
        groups.append({"params": members, **options})
    return groups


def make(group: Any, case: Case, route: Route, params: list[nn.Parameter]) -> pyzero.FusedZeroAdam:
    groups = groups_of(case, params)
    for options, hyper in zip(groups, case.groups, strict=True):
        options["decoupled_weight_decay"] = hyper.decoupled
    return pyzero.FusedZeroAdam(
        groups,
        process_group=group,
        stage=route.stage,
        overlap=route.overlap,
        bucket_cap_mb=route.bucket_cap_mb,
        max_grad_norm=case.max_norm,
        loss_scale=case.loss_scale,
    )


def loss_of(params: list[nn.Parameter], grads: dict[int, Tensor], order: tuple[int, ...]) -> Tensor:
    """Its gradients are `grads`; autograd computes them in an order of chance, the last term's first."""
    terms = [(params[index].float() * grad).sum() for index, grad in shuffled(grads, order)]
    return sum(terms[1:], terms[0])


def shuffled(grads: dict[int, Tensor], order: tuple[int, ...]) -> list[tuple[int, Tensor]]:
    items = list(grads.items())
    random.Random(str(order)).shuffle(items)
    return items


def train(group: Any, case: Case, route: Route, already_reduced: bool = False) -> tuple[State, list[bool]]:
    """Everything about every parameter at the end, and which steps were applied."""
    rank = group.rank()
    params = build(case, rank)
    optimizer = make(group, case, route, params)
    applied = []
    for step, no_syncs in enumerate(case.no_sync):
        optimizer.zero_grad()
        for backward, no_sync in enumerate([False] if already_reduced else no_syncs):
            grads = mean_gradients(case, step) if already_reduced else gradients(case, step, backward, rank)
            with optimizer.no_sync() if no_sync else contextlib.nullcontext():
                optimizer.backward(loss_of(params, grads, (route.hook_order, step, backward, rank)))
        optimizer.step()
        applied.append(optimizer.was_step_applied)
    return [whole(optimizer, param) for param in params], applied


def whole(optimizer: pyzero.FusedZeroAdam, param: nn.Parameter) -> dict[str, Any]:
    state = {"master": optimizer.full_master(param), **optimizer.full_state(param)}
    return {"weight": param.detach().float().numpy(), **{name: value.numpy() for name, value in state.items()}}


def assert_same_bits(one: tuple[State, list[bool]], two: tuple[State, list[bool]]) -> None:
    assert one[1] == two[1], "the same steps are applied"
    for index, (left, right) in enumerate(zip(one[0], two[0], strict=True)):
        assert left.keys() == right.keys()
        for name in left:
            where = f"{name} of parameter {index}:\n{left[name]}\n{right[name]}"
            assert left[name].tobytes() == right[name].tobytes(), where


def on_ranks(ranks: Any, case: Case, route: Route) -> tuple[State, list[bool]]:
    """All ranks end with the same bits."""
    first, *others = ranks.run(case.num_ranks, train, case, route)
    for other in others:
        assert_same_bits(first, other)
    return first


# ---- against fp64 -------------------------------------------------------------------------------------------------


def by_torch(case: Case) -> tuple[list[dict[str, Any]], list[bool]]:
    """torch's Adam and AdamW in fp64, in one process: `step`, `master`, `exp_avg`, `exp_avg_sq`, `largest` gradient."""
    params = [nn.Parameter(param.detach().double(), param.requires_grad) for param in build(case, rank=0)]
    groups = zip(groups_of(case, params), case.groups, strict=True)
    optimizers = [
        (torch.optim.AdamW if hyper.decoupled else torch.optim.Adam)([group], foreach=False)
        for group, hyper in groups
        if group["params"]
    ]
    largest = [0.0] * len(params)
    applied = []
    for step in range(len(case.no_sync)):
        grads = mean_gradients(case, step)
        applied.append(all(bool(grad.isfinite().all()) for grad in grads.values()))
        if not applied[-1]:
            continue
        for index, param in enumerate(params):
            param.grad = grads.get(index)
        if case.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, case.max_norm)
        for index in grads:
            largest[index] = max([largest[index], *params[index].grad.abs().view(-1).tolist()])
        for optimizer in optimizers:
            optimizer.step()
    known = {param: state for optimizer in optimizers for param, state in optimizer.state.items()}
    return [
        {"master": p.detach(), "largest": g, **known.get(p, {})} for p, g in zip(params, largest, strict=True)
    ], applied


def limits_of(case: Case, index: int, wanted: dict[str, Any]) -> dict[str, float]:
    """The table's, and what clipping adds.

    The coefficient max_norm / (norm + 1e-6) is off by 3 u: the norm, whose sum of squares is exact, the sum and the
    quotient round once each. exp_avg is off by as much, exp_avg_sq by twice as much, and their quotient, the update,
    by 3 u for each of the two: 6 u of at most lr in each step. All steps may err in the same direction.
    """
    hyper, row, unit = case.groups[case.params[index].group], ADAM[torch.float32], UNIT[torch.float32]
    steps, beta2 = int(wanted["step"]), hyper.betas[1]
    magnitude = float(start(case, index).abs().max())  # weights only shrink
    decay = 1.0 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0
    largest = wanted["largest"] + (0.0 if hyper.decoupled else hyper.weight_decay * magnitude)
    by_clip = 0.0 if case.max_norm is None else unit
    return {
        "master": row.master(steps, magnitude, hyper.lr, beta2, decay) + 6 * by_clip * steps * hyper.lr,
        "exp_avg": row.exp_avg(largest) + 3 * by_clip * largest,
        "exp_avg_sq": row.exp_avg_sq(largest, beta2) + 6 * by_clip * largest**2,
    }


def assert_untouched(case: Case, index: int, got: dict[str, Any]) -> None:
    begin = start(case, index).float().numpy()
    assert got["weight"].tobytes() == got["master"].tobytes() == begin.tobytes(), f"parameter {index} was touched"
    for name in {"step", "exp_avg", "exp_avg_sq"} & got.keys():
        assert not got[name].any(), f"{name} of parameter {index} was touched"


@SETTINGS
@given(case=cases(), route=ROUTES)
def test_follows_torch_in_fp64(ranks, case, route):
    state, applied = on_ranks(ranks, case, route)
    oracle, wanted_applied = by_torch(case)
    assert applied == wanted_applied
    for index, (got, wanted) in enumerate(zip(state, oracle, strict=True)):
        assert ("step" in got) != case.params[index].frozen
        if "step" not in wanted:  # frozen, or no rank had a gradient in any step that was applied
            assert_untouched(case, index, got)
            continue
        assert got["step"] == wanted["step"]
        rounded = torch.from_numpy(got["master"]).to(case.params[index].dtype).float()
        assert rounded.numpy().tobytes() == got["weight"].tobytes(), f"parameter {index} is not its master, rounded"
        if got["weight"].size == 0:
            continue
        for name, limit in limits_of(case, index, wanted).items():
            error = float((torch.from_numpy(got[name]).double() - wanted[name]).abs().max())
            assert error <= limit, f"{name} of parameter {index}: off by {error:.3g}, at most {limit:.3g}"


# ---- bit against bit ----------------------------------------------------------------------------------------------


@SETTINGS
@given(case=cases(), routes=TWO_ROUTES)
def test_bits_are_the_same_by_any_route(ranks, case, routes):
    """And on one rank that is given the mean of all gradients in one backward."""
    first, second = (on_ranks(ranks, case, route) for route in routes)
    assert_same_bits(first, second)
    assert_same_bits(first, ranks.run(1, train, case, routes[0], True)[0])


@FEWER
@given(case=cases(rough=True, min_ranks=3), routes=TWO_ROUTES)
def test_bits_are_the_same_where_sums_round(ranks, case, routes):
    assert_same_bits(*(on_ranks(ranks, case, route) for route in routes))


# ---- beside DDP ---------------------------------------------------------------------------------------------------

DDP_STEPS = 4
DDP_HYPER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Layers:
    widths: tuple[int, ...]
    activation: type[nn.Module]
    normed: bool
    seed: int

    def build(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), self.activation()]
            if self.normed:
                layers.append(nn.LayerNorm(outputs))
        return nn.Sequential(*layers)

    def batch(self, step: int, rank: int) -> Tensor:
        return randn(3, self.widths[0], seed=self.seed + 10 * step + rank)


LAYERS = st.builds(
    Layers,
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU]),
    normed=st.booleans(),
    seed=st.integers(0, 999),
)


def loss_on(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 0.5).square().mean()


def largest_gradient(group: Any, model: nn.Module, batch: Tensor) -> float:
    """On any rank."""
    import torch.distributed as dist

    grads = torch.autograd.grad(loss_on(model, batch), list(model.parameters()))
    largest = torch.stack([grad.abs().max() for grad in grads]).max()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return float(largest)


def ddp_limits(steps: int, size: int, largest: float, magnitude: float) -> dict[str, float]:
    """Both sides see the same weights in every forward, so gradients differ by rounding only.

    A mean over W ranks takes W - 1 sums and one or two products with 1/W: it is off by (W + 1) u of the largest
    gradient on any rank, and two of them by d = 2 (W + 1) u of that. exp_avg and sqrt(exp_avg_sq) are weighted means,
    of power 1 and 2, so they differ by d at most, and exp_avg_sq by 2 d * largest. The update is lr * m / D with
    D > eps, and in the first 5 steps |m| < 1.1 D: it differs by lr * (1 + 1.1) * d / eps.
    The rest is the table's, of two results in fp32.
    """
    row, beta2 = ADAM[torch.float32], DDP_HYPER["betas"][1]
    decay = 1 - DDP_HYPER["lr"] * DDP_HYPER["weight_decay"]
    d = 2 * (size + 1) * UNIT[torch.float32] * largest
    return {
        "master": 2**0.5 * row.master(steps, magnitude, DDP_HYPER["lr"], beta2, decay)
        + 2.1 * DDP_HYPER["lr"] * d / DDP_HYPER["eps"],
        "exp_avg": 2**0.5 * row.exp_avg(largest) + d,
        "exp_avg_sq": 2**0.5 * row.exp_avg_sq(largest, beta2) + 2 * d * largest,
    }


def beside_ddp(group: Any, layers: Layers, route: Route) -> None:
    rank, size = group.rank(), group.size()
    ours, ddp = layers.build(), nn.parallel.DistributedDataParallel(layers.build(), process_group=group)
    cap = dict(bucket_cap_mb=route.bucket_cap_mb, stage=route.stage, overlap=route.overlap)
    left = pyzero.FusedZeroAdamW(ours.parameters(), process_group=group, **DDP_HYPER, **cap)
    right = torch.optim.AdamW(ddp.parameters(), fused=True, **DDP_HYPER)
    largest = 0.0
    for step in range(DDP_STEPS):
        batch = layers.batch(step, rank)
        largest = max(largest, largest_gradient(group, ours, batch))
        for model, optimizer in ((ours, left), (ddp, right)):
            optimizer.zero_grad()
            loss_on(model, batch).backward()
            optimizer.step()
        magnitude = max(float(param.detach().abs().max()) for param in ddp.parameters())
        limits = ddp_limits(step + 1, size, largest, magnitude)
        for (name, param), other in zip(ours.named_parameters(), ddp.parameters(), strict=True):
            mine, theirs = left.full_state(param), {"master": other.detach(), **right.state[other]}
            for key, limit in limits.items():
                error = float((mine[key] - theirs[key]).abs().max())
                assert error <= limit, f"{key} of {name}, step {step}: off by {error:.3g}, at most {limit:.3g}"
            with torch.no_grad():
                param.copy_(other)


@FEWER
@given(layers=LAYERS, size=st.integers(2, 4), route=ROUTES)
def test_follows_ddp(ranks, layers, size, route):
    ranks.run(size, beside_ddp, layers, route)
