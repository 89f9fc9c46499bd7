"""An optimizer as a state machine: any order of backward, reads, edits, zero_grad, freezing, writes, saving and step.

hypothesis builds a program, a list of tuples; teardown runs it once on some ranks, where each rank has beside the
optimizer a model of what torch owes: tests/support/program_model.py, and program_run.py with its ops in
program_gradients.py and program_state.py. It runs a second time with another bucket size and overlap, and without its
reads: the bits must be the same.

A failure prints `replay(program, config)`. A long hunt:

    PYTHONPATH=tests/support python tests/optimizer/test_state_machine.py --examples 2000 --seed 7
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from program_hunt import fixed_fields, hunt, parser
from program_model import Config, Program, World
from program_rules import GROUPS
from program_run import Outcome, run_program
from ranks import Ranks

NUM_EXAMPLES = 60
MOST_REFUSED = 0.4  # of the programs; more, and the test tests refusals
SETTINGS = settings(
    max_examples=NUM_EXAMPLES,
    stateful_step_count=16,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


# ---- both runs, and what they must have in common -----------------------------------------------------------------

TALLY: collections.Counter[str] = collections.Counter()


class ProgramFailed(AssertionError):
    """With a text that can be pasted."""


def spell(program: Program, config: Config) -> str:
    ops = "".join(f"    {op!r},\n" for op in program)
    return f"replay([\n{ops}], {config!r})"


def fail(program: Program, config: Config, text: str) -> None:
    raise ProgramFailed(f"{text.strip()}\n\n{spell(program, config)}")


def on_all_ranks(pool: Ranks, config: Config, program: Program, quiet: bool) -> Outcome:
    """Rank 0's outcome, after a comparison with the others'."""
    try:
        outcomes = pool.run(config.size, run_program, config, program, quiet)
    except Exception:
        pool.stop()
        raise
    which = "second run (other buckets, no reads), " if quiet else ""
    failed = [f"{which}rank {r}, op {o.at}: {o.text}" for r, o in enumerate(outcomes) if o.status == "failed"]
    if failed:
        if any("went apart" in text or "CollectiveError" in text or "Timed out" in text for text in failed):
            pool.stop()  # what is under way in its groups would meet the next program's
        fail(program, config, "\n".join(failed))
    first = next((outcome for outcome in outcomes if outcome.status == "refused" and ": " in outcome.text), outcomes[0])
    for rank, other in enumerate(outcomes):
        if (other.at, first.status) != (first.at, other.status):
            fail(program, config, f"{which}rank {rank} ended at op {other.at}, {other.status}; another {first}")
        if first.status == "done":
            compare_records(outcomes[0].records, other.records, program, config, f"{which}ranks 0 and {rank} differ")
    return first


def compare_records(
    one: list[tuple[str, str]], two: list[tuple[str, str]], program: Program, config: Config, what: str
) -> None:
    for left, right in zip(one, two, strict=False):
        if left != right:
            fail(program, config, f"{what}: {left} and {right}")
    if len(one) != len(two):
        fail(program, config, f"{what}: {len(one)} and {len(two)} records")


def at_the_end(outcome: Outcome) -> list[tuple[str, str]]:
    return [record for record in outcome.records if record[0].startswith("op -1")]


def check(pool: Ranks, program: Program, config: Config) -> Outcome:
    """Run it twice; raises ProgramFailed."""
    TALLY["programs"] += 1
    first = on_all_ranks(pool, config, program, quiet=False)
    if first.status == "refused":
        TALLY["refused: " + first.text.split(": ")[0]] += 1
        return first
    other = replace(config, cap_mb=config.other_cap_mb, overlap=config.other_overlap, transport=config.other_transport)
    quiet = not first.order_matters
    second = on_all_ranks(pool, other, program, quiet)
    if second.status == "refused":
        TALLY["refused without reads: " + second.text.split(": ")[0]] += 1
        if not quiet:
            fail(program, config, f"refused with other buckets: {second.text}")
        return second
    if first.rounds or second.rounds:
        TALLY["not compared"] += 1
        return second
    what = "two runs differ, the second with other buckets"
    if quiet:
        compare_records(at_the_end(first), at_the_end(second), program, config, what + " and without reads")
    else:
        compare_records(first.records, second.records, program, config, what)
    TALLY["compared " + ("without reads" if quiet else "with the same reads")] += 1
    return second


def replay(program: Program, config: Config) -> Outcome:
    """Run a program that a failure printed."""
    with lone_pool() as pool:
        return check(pool, program, config)


@contextlib.contextmanager
def lone_pool() -> Iterator[Ranks]:
    pool = Ranks()
    try:
        yield pool
    finally:
        pool.stop()


# ---- strategies ---------------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(5,), (64,), (), (0,), (1,), (63,), (65,), (4, 3), (17, 19)])
SPECS = st.tuples(SHAPES, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from([False] * 5 + [True]))
SPARES = st.tuples(SHAPES, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from([False] * 3 + [True]))
CAPS = st.sampled_from([25.0, 1e-6, 2e-4, 1e-3])
CONFIGS = st.builds(
    Config,
    params=st.lists(SPECS, min_size=1, max_size=4).filter(lambda specs: not all(s[2] for s in specs)).map(tuple),
    spares=st.lists(SPARES, max_size=2).map(tuple),
    size=st.sampled_from([2, 2, 3, 1]),
    stage=st.sampled_from([2, 1]),
    cap_mb=CAPS,
    overlap=st.booleans(),
    transport=st.sampled_from(["auto", "auto", "exact", "exact", "collective"]),
    other_cap_mb=CAPS,
    other_overlap=st.booleans(),
    other_transport=st.sampled_from(["exact", "auto"]),
    reduce_grads=st.sampled_from([True] * 5 + [False]),
    transposed=st.sampled_from([False, False, True]),
    grad_reduce_dtype=st.sampled_from([None, None, None, "fp32"]),
    has_second=st.sampled_from([False, False, False, True]),
    loss_scale=st.sampled_from([None, None, 8.0, "dynamic"]),
    max_grad_norm=st.sampled_from([None, None, 2.0]),
    rule=st.sampled_from(sorted(GROUPS)),
    seed=st.integers(0, 99),
)
NUMBERS = st.integers(0, 9)
INDICES = st.integers(0, 5)
MASKS = st.one_of(st.just(63), st.integers(1, 63))
ONE_MASK = MASKS.map(lambda mask: (mask,) * 3)
MANY_MASKS = st.tuples(*[st.one_of(MASKS, st.integers(0, 63))] * 3)
BAD = st.tuples(st.integers(0, 2), st.sampled_from(["inf", "-inf", "nan"]))
USUALLY = st.sampled_from([True, True, False])
READS = st.sampled_from(
    ["clip", "full_grad", "grad_norm", "state_dict", "full_state_dict", "model", "norm", "isfinite", "full_master"]
)
HOWS = st.sampled_from(["scale", "twice", "tied", "create_graph", "inputs", "autograd.grad", "reentrant", "hook"])
OPTIONS = st.sampled_from(
    [
        ("lr", 0.05),
        ("lr", 0.0),
        ("lr tensor", 0.02),
        ("betas", (0.7, 0.9)),
        ("momentum", 0.7),
        ("momentum", 0.0),
        ("weight_decay", 0.2),
        ("maximize", True),
        ("decoupled_weight_decay", False),
        ("schedule", 0.5),
    ]
)
STATE_NAMES = st.sampled_from(
    [("master",), ("exp_avg", "exp_avg_sq", "momentum_buffer"), ("step",), ("step", "exp_avg", "master")]
)
MAX_NORMS = st.sampled_from([0.5, 3.0, 40.0])


# Found by hunts: what each of them held against.
FOUND: list[tuple[str, Program, Config]] = [
    (
        "what one rank has cleared in another order is no edit",
        [
            ("broken", 9, 3, "model", (63, 63)),
            ("broken", 1, 1, "optimizer", (63, 63)),
            ("zero_grad", "model", True),
            ("backward", 9, False, True, (63, 63), None),
            ("step",),
        ],
        Config((((4, 3), "fp32", False), ((1,), "fp16", False)), stage=2, cap_mb=1e-6, transport="exact"),
    ),
    (
        "a gradient that was set lies as the parameter does, whatever strides that was given",
        [("write", "transposed data", 1), ("set_full_grad", 5, 1), ("step",)],
        Config((((5,), "bf16", False), ((4, 3), "fp16", False)), stage=1),
    ),
    (
        "zero_grad forgets the norm of a clip, on a rank without gradients too",
        [
            ("clip", 3.0, 2.0),
            ("zero_grad", "optimizer", True),
            ("backward", 7, True, True, (0, 63), None),
            ("step",),
        ],
        Config((((5,), "fp32", False),), stage=1, transport="exact", loss_scale=8.0),
    ),
    (
        "a gradient that comes on one rank after a clip makes all forget the norm of the clip",
        [
            ("backward", 7, True, True, (63, 63), None),
            ("clip", 3.0, 2.0),
            ("backward", 7, True, True, (0, 63), None),
            ("step",),
        ],
        Config((((5,), "fp32", False),), stage=1, transport="exact", loss_scale=8.0),
    ),
    (
        "a momentum buffer that was set counts at the first step, dampened or not",
        [
            ("add_group",),
            ("set_state", 0, ("momentum_buffer",), 2),
            ("backward", 0, False, True, (63, 63), None),
            ("step",),
        ],
        Config((((5,), "fp32", False),) * 2, (((5,), "fp32", False),), rule="sgd"),
    ),
    (
        "a clip by an infinite norm is seen after the step too",
        [("backward", 0, True, True, (63,), (0, "inf")), ("clip", 0.5, 2.0), ("step",)],
        Config((((5,), "fp32", False),), size=1),
    ),
    (
        "a backward that was broken off places nothing that is unfrozen after it",
        [
            ("broken", 9, 2, "model", (63, 63)),
            ("thaw", 0),
            ("backward", 3, True, True, (36, 7), None),
            ("step",),
        ],
        Config((((5,), "fp32", True), ((5,), "fp32", False), ((1,), "fp16", False)), stage=2, transport="exact"),
    ),
    (
        "a factor of a gradient of which only zeros were sent is no edit on the ranks without a part of their own",
        [("clip", 0.5, 2.0), ("backward", 0, True, False, (63, 2), None), ("multiply", "mul_", -1.0, 63)],
        Config((((5,), "fp32", False),), stage=2),
    ),
    (
        "a gradient that is set when all are cleared carries no scale of a backward that was broken off",
        [
            ("broken", 0, 0, "model", (63,)),
            ("set_full_grad", 0, 0),
            ("backward", 0, False, True, (63,), None),
            ("step",),
        ],
        Config((((5,), "fp32", False),) * 2, size=1, loss_scale=8.0),
    ),
    (
        "unscale_ of GradScaler unscales parameters that were appended",
        [("append", 0), ("grad_scaler", 1, True, None, None, True, (63, 63))],
        Config((((5,), "fp32", False),), (((5,), "fp32", False),)),
    ),
    (
        "unscale_ of GradScaler unscales parameters that were unfrozen and trained in no_sync()",
        [("thaw", 1), ("grad_scaler", 1, True, None, None, False, (63, 63))],
        Config((((5,), "fp32", False), ((5,), "fp32", True))),
    ),
    (
        "a frozen parameter that was appended joins, and its gradient is averaged in the backward after it is unfrozen",
        [
            ("append", 0),
            ("step",),
            ("thaw", 1),
            ("backward", 2, False, True, (63, 63), None),
            ("read", "norm", 1),
        ],
        Config((((5,), "fp32", False),), (((5,), "fp32", True),)),
    ),
]


class Machine(RuleBasedStateMachine):
    """Writes a program down; teardown runs it."""

    pool: Ranks

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.second: World | None = None  # of the other optimizer
        self.config: Config | None = None
        self.program: Program = []

    @initialize(config=CONFIGS)
    def begin(self, config: Config) -> None:
        self.start(config)

    def start(self, config: Config) -> None:
        self.config, self.world = config, World(config)
        self.second = World(config.second()) if config.has_second else None

    def then(self, *op: Any) -> None:
        assert self.world is not None
        if op[0] == "backward":  # the same masks for all, where this one is not legal
            op = (*op[:4], op[4][: self.world.config.size], *op[5:])
        if self.world.legal(op):
            self.program.append(op if self.world.config == self.config else ("also", *op))
            self.world.follow(op)

    def teardown(self) -> None:
        if self.config is not None and self.program:
            check(self.pool, self.program, self.config)

    @rule()
    def turn_to_the_other(self) -> None:
        if self.second is not None:
            self.world, self.second = self.second, self.world

    @rule(number=NUMBERS, sync=USUALLY, masks=st.one_of(ONE_MASK, MANY_MASKS))
    def backward_of_both(self, number: int, sync: bool, masks: tuple[int, ...]) -> None:
        op = ("joint", number, sync, masks)
        if self.world is not None and self.second is not None and self.world.legal(op) and self.second.legal(op):
            self.program.append(op)

    @rule(number=NUMBERS)
    def backward(self, number: int) -> None:
        assert self.world is not None
        self.then("backward", number, self.world.config.loss_scale is not None, True, (63,) * 3, None)

    @rule(number=NUMBERS, scaled=USUALLY, sync=USUALLY, masks=ONE_MASK)
    def backward_of_some(self, number: int, scaled: bool, sync: bool, masks: tuple[int, ...]) -> None:
        self.then("backward", number, scaled, sync, masks, None)

    @rule(number=NUMBERS, sync=USUALLY, masks=ONE_MASK, how=HOWS)
    def backward_in_other_ways(self, number: int, sync: bool, masks: tuple[int, ...], how: str) -> None:
        assert self.world is not None
        self.then("backward", number, self.world.config.loss_scale is not None, sync, masks, None, how)

    @rule(number=NUMBERS, masks=st.one_of(ONE_MASK, MANY_MASKS), how=HOWS)
    def closure(self, number: int, masks: tuple[int, ...], how: str) -> None:
        self.then("closure", number, how, masks)

    @rule(number=NUMBERS, who=st.integers(0, 3), by=st.sampled_from(["optimizer", "model"]), masks=ONE_MASK)
    def broken(self, number: int, who: int, by: str, masks: tuple[int, ...]) -> None:
        self.then("broken", number, who, by, masks)

    @rule(
        number=NUMBERS,
        unscale=st.booleans(),
        max_norm=st.sampled_from([None, 3.0]),
        bad=st.one_of(st.none(), st.none(), BAD),
        sync=USUALLY,
        masks=st.one_of(ONE_MASK, MANY_MASKS),
    )
    def grad_scaler(
        self,
        number: int,
        unscale: bool,
        max_norm: float | None,
        bad: tuple[int, str] | None,
        sync: bool,
        masks: tuple[int, ...],
    ) -> None:
        self.then("grad_scaler", number, unscale, max_norm, bad, sync, masks)

    @rule(mask=MASKS)
    def zero(self, mask: int) -> None:
        self.then("zero", mask)

    @rule(number=NUMBERS, sync=st.booleans(), masks=MANY_MASKS)
    def backward_of_others_on_each(self, number: int, sync: bool, masks: tuple[int, ...]) -> None:
        self.then("backward", number, True, sync, masks, None)

    @rule(number=NUMBERS, sync=st.booleans(), masks=st.one_of(ONE_MASK, MANY_MASKS), bad=BAD)
    def backward_of_nan(self, number: int, sync: bool, masks: tuple[int, ...], bad: tuple[int, str]) -> None:
        self.then("backward", number, True, sync, masks, bad)

    @rule()
    def step(self) -> None:
        self.then("step")

    @rule(number=NUMBERS, by=st.sampled_from(["optimizer", "model"]), set_to_none=st.booleans())
    def iteration(self, number: int, by: str, set_to_none: bool) -> None:
        self.then("zero_grad", by, set_to_none)
        self.backward(number)
        self.then("step")

    @rule(what=READS, index=INDICES)
    def read(self, what: str, index: int) -> None:
        self.then("read", what, index)

    @rule(max_norm=MAX_NORMS, norm_type=st.sampled_from([2.0, 2.0, math.inf, 1.0]))
    def clip(self, max_norm: float, norm_type: float) -> None:
        self.then("clip", max_norm, norm_type)

    @rule(max_norm=MAX_NORMS, foreach=st.sampled_from([None, True, False]), mask=MASKS)
    def torch_clip(self, max_norm: float, foreach: bool | None, mask: int) -> None:
        self.then("torch_clip", max_norm, foreach, mask)

    @rule(how=st.sampled_from(["plain", "strided"]), number=NUMBERS, index=INDICES)
    def assign(self, how: str, number: int, index: int) -> None:
        self.then("assign", how, number, index)

    @rule(number=NUMBERS, index=INDICES)
    def set_full_grad(self, number: int, index: int) -> None:
        self.then("set_full_grad", number, index)

    @rule(how=st.sampled_from(["mul_", "div_", "*=", "foreach"]), factor=st.sampled_from([-1.0, 0.5, 2.0]), mask=MASKS)
    def multiply(self, how: str, factor: float, mask: int) -> None:
        self.then("multiply", how, factor, mask)

    @rule(by=st.sampled_from(["optimizer", "model"]), set_to_none=st.booleans())
    def zero_grad(self, by: str, set_to_none: bool) -> None:
        self.then("zero_grad", by, set_to_none)

    @rule(index=INDICES)
    def drop(self, index: int) -> None:
        self.then("drop", index)

    @rule(index=INDICES)
    def freeze_or_thaw(self, index: int) -> None:
        assert self.world is not None
        self.then("freeze" if index in self.world.trained else "thaw", index)

    @rule(grad=st.sampled_from([None, None, 3]))
    def add_group(self, grad: int | None) -> None:
        self.then("add_group", grad)

    @rule(number=st.sampled_from([None, 0, 1, 2]), grad=st.sampled_from([None, None, 3]))
    def append(self, number: int | None, grad: int | None) -> None:
        self.then("append", number, grad)

    @rule(change=OPTIONS, index=INDICES)
    def option(self, change: tuple[str, Any], index: int) -> None:
        self.then("option", *change, index)

    @rule(number=NUMBERS, names=STATE_NAMES, index=INDICES)
    def set_state(self, number: int, names: tuple[str, ...], index: int) -> None:
        self.then("set_state", number, names, index)

    @rule(
        how=st.sampled_from(["in place", "assign", "update"]),
        name=st.sampled_from(["exp_avg", "exp_avg", "exp_avg_sq", "momentum_buffer", "step"]),
        factor=st.sampled_from([0.5, 4.0]),
        index=INDICES,
    )
    def edit_state(self, how: str, name: str, factor: float, index: int) -> None:
        self.then("edit_state", how, name, factor, index)

    @rule(
        how=st.sampled_from(["copy_", "data", "transposed data", "behind its back", "load_state_dict"]), index=INDICES
    )
    def write(self, how: str, index: int) -> None:
        self.then("write", how, index)

    @rule(how=st.sampled_from(["state_dict", "bytes", "full"]))
    def save(self, how: str) -> None:
        self.then("save", how)

    @rule()
    def torch_state(self) -> None:
        self.then("torch_state")

    @rule()
    def load(self) -> None:
        self.then("load")

    @rule(how=st.sampled_from(["state_dict", "full", "checkpoint"]), stage=st.sampled_from([2, 1]))
    def rebuild(self, how: str, stage: int) -> None:
        self.then("rebuild", how, stage)


def fitted(config: Config) -> Config:
    """Muon's parameters are matrices."""
    if config.rule != "muon":
        return config
    params, spares = (
        tuple((shape if len(shape) > 1 else (1, *(shape or (1,))), *rest) for shape, *rest in specs)
        for specs in (config.params, config.spares)
    )
    return replace(config, params=params, spares=spares)


def machine_on(pool: Ranks, only: Iterable[str] = (), **fixed: Any) -> type[Machine]:
    """A Machine on a pool; with ops of these names alone, and of configs with these fields."""
    names = set(only)

    class Here(Machine):
        def then(self, *op: Any) -> None:
            if not names or op[0] in names:
                super().then(*op)

        @initialize(config=CONFIGS.map(lambda config: fitted(replace(config, **fixed))))
        def begin(self, config: Config) -> None:
            self.start(config)

    Here.pool = pool
    return Here


def test_programs_that_were_found(ranks):
    for what, program, config in FOUND:
        assert check(ranks, program, config).status == "done", what


def test_any_program(ranks):
    TALLY.clear()
    run_state_machine_as_test(machine_on(ranks), settings=SETTINGS)
    refused = sum(count for name, count in TALLY.items() if name.startswith("refused:"))
    assert refused <= MOST_REFUSED * TALLY["programs"], f"too many programs are refused: {dict(TALLY)}"


# ---- a long hunt --------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parser(chunk=50)
    arguments.add_argument("--only", default="", help="names of ops, by comma")
    args = arguments.parse_args()
    only = [name for name in args.only.split(",") if name]
    with lone_pool() as pool:
        has_failed = hunt(args, lambda: machine_on(pool, only, **fixed_fields(args)), SETTINGS, ProgramFailed)
    print(dict(TALLY))
    raise SystemExit(has_failed)


if __name__ == "__main__":
    main()
