"""An engine as a state machine: any order of backward, step, reads, edits, saves and loads, against a model in torch.

hypothesis builds a program, a list of tuples; teardown runs it on some ranks, where each rank has beside the engine the
model of tests/support/engine_model.py. It runs a second time without its reads: the bits must be the same.

A failure prints `replay(program, config)`. A long hunt:

    PYTHONPATH=tests/support python tests/engine/test_engine_state_machine.py --examples 2000 --seed 7
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine_model import SCHEDULE_PARAMS, Config, Program
from engine_run import LOAD_OPTIONS, run_program
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from own_groups import OwnGroups
from program_hunt import fixed_fields, hunt, parser
from ranks import Ranks

SETTINGS = settings(
    max_examples=45,
    stateful_step_count=14,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
RunOn = Callable[..., list[Any]]


class ProgramFailed(AssertionError):
    """With a text that can be pasted."""


def check(run: RunOn, program: Program, config: Config) -> None:
    """Run it twice; raises ProgramFailed."""
    found = []
    for quiet in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run(config.size, run_program, config, program, folder, quiet)
        texts = [f"rank {rank}: {outcome.text}" for rank, outcome in enumerate(outcomes) if outcome.text]
        first = outcomes[0].records
        differ = [
            f"rank {rank} differs from rank 0: {theirs} and {mine}"
            for rank, outcome in enumerate(outcomes)
            for mine, theirs in zip(first, outcome.records, strict=False)
            if mine != theirs
        ][:1]
        found.append({record for record in first if "at the end" in record[0]})
        if texts or differ:
            fail(program, config, ("without reads, " if quiet else "") + "\n".join([*texts, *(differ * (not texts))]))
    if found[0] != found[1]:
        fail(program, config, f"the run without reads ends elsewhere: {sorted(found[0] ^ found[1])}")


def fail(program: Program, config: Config, text: str) -> None:
    ops = "".join(f"    {op!r},\n" for op in program)
    raise ProgramFailed(f"{text.strip()}\n\nreplay([\n{ops}], {config!r})")


def replay(program: Program, config: Config) -> None:
    """Run a program that a failure printed."""
    pool = Ranks()
    try:
        check(OwnGroups(pool), program, config)
    finally:
        pool.stop()


# ---- strategies ---------------------------------------------------------------------------------------------------

ALL = (63,) * 3  # a mask for each rank
SHAPES = st.sampled_from([(5,), (64,), (1,), (65,), (4, 3), (17, 19)])
CONFIGS = st.builds(
    Config,
    shapes=st.lists(SHAPES, min_size=2, max_size=4).map(tuple),
    frozen=st.sampled_from([-1, -1, 0, 1]),
    size=st.sampled_from([2, 2, 3, 1]),
    stage=st.sampled_from([0, 1, 2, 2, 3, 3]),
    dtype=st.sampled_from(["fp32", "bf16", "fp16", "fp16"]),
    accumulation=st.integers(1, 4),
    rule=st.sampled_from(["adamw", "adamw", "adam", "lion", "sgd", "lamb"]),
    schedule=st.sampled_from([None, *SCHEDULE_PARAMS]),
    clip=st.sampled_from([0.0, 0.0, 1.0]),
    scale=st.sampled_from([0.0, 0.0, 8.0]),
    hysteresis=st.sampled_from([1, 2]),
    consecutive=st.booleans(),
    managed=st.sampled_from([True, True, True, False]),
    passes_optimizer=st.booleans(),
    sends_fp32=st.booleans(),
    bucket=st.sampled_from([500_000_000, 8, 100]),
    overlap=st.booleans(),
    seed=st.integers(0, 9),
)


def fitted(config: Config) -> Config:
    """What pyzero has: no Lamb in stage 3, torch's optimizers alone to pass."""
    rule_ = "adamw" if config.rule == "lamb" and config.stage == 3 else config.rule
    passes = config.passes_optimizer and rule_ in ("adamw", "sgd")
    return replace(config, rule=rule_, passes_optimizer=passes)


NUMBERS = st.integers(0, 9)
INDICES = st.integers(0, 3)
MASKS = st.one_of(st.just(ALL), st.tuples(*[st.integers(1, 15)] * 3))
USUALLY = st.sampled_from([True, True, False])
TAGS = st.sampled_from(["a", "b/c"])


class Machine(RuleBasedStateMachine):
    """Writes a program down; teardown runs it."""

    run: RunOn
    fixed: dict[str, Any] = {}

    @initialize(config=CONFIGS)
    def begin(self, config: Config) -> None:
        self.config, self.program = fitted(replace(config, **self.fixed)), []

    def teardown(self) -> None:
        if getattr(self, "program", None):
            check(self.run, self.program, self.config)

    @rule(number=NUMBERS, how=st.sampled_from(["engine", "scale", "plain", "no gas"]), masks=MASKS)
    def accumulate(self, number: int, how: str, masks: tuple[int, ...]) -> None:
        self.program.append(("accumulate", number, how, masks))

    @rule(number=NUMBERS, how=st.sampled_from(["engine", "scale", "plain", "no gas"]), sync=USUALLY, masks=MASKS)
    def backward(self, number: int, how: str, sync: bool, masks: tuple[int, ...]) -> None:
        self.program.append(("backward", number, how, sync, masks))

    @rule(number=NUMBERS, who=INDICES, value=st.sampled_from(["inf", "-inf", "nan"]), masks=MASKS)
    def overflow(self, number: int, who: int, value: str, masks: tuple[int, ...]) -> None:
        self.program += [("backward", number, "engine", True, masks, (who, value)), ("step",)]

    @rule(times=st.sampled_from([1, 1, 4]))
    def step(self, times: int) -> None:
        self.program += [("step",)] * times

    @rule(number=NUMBERS, who=INDICES, index=INDICES, sync=USUALLY, where=st.sampled_from(["backward", "forward"]))
    def broken(self, number: int, who: int, index: int, sync: bool, where: str) -> None:
        self.program.append(("broken", number, who, index, sync, where))

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3).map(tuple), steps=st.booleans())
    def coalesce(self, numbers: tuple[int, ...], steps: bool) -> None:
        self.program.append(("coalesce", numbers, steps))

    @rule(set_to_none=USUALLY)
    def zero_grad(self, set_to_none: bool) -> None:
        self.program.append(("zero_grad", set_to_none))

    @rule(
        op=st.one_of(
            st.tuples(st.just("boundary"), st.booleans()),
            st.tuples(st.just("micro_steps"), st.integers(0, 5)),
            st.tuples(st.just("accumulation"), st.integers(1, 4), st.integers(1, 3)),
            st.tuples(st.just("rate"), st.sampled_from([0.0, 0.05]), INDICES),
            st.tuples(st.just("clip"), st.sampled_from([0.5, 40.0])),
        )
    )
    def settings(self, op: tuple[Any, ...]) -> None:
        self.program.append(op)

    @rule(number=NUMBERS, mask=st.integers(0, 15), kind=st.sampled_from(["eval", "no_grad", "grad"]))
    def look(self, number: int, mask: int, kind: str) -> None:
        self.program.append(("look", number, mask, kind))

    @rule(what=st.sampled_from(["grad", "grad", "state", "fp32", "gathered", "state_dict"]), index=INDICES)
    def read(self, what: str, index: int) -> None:
        self.program.append(("read", what, index))

    @rule(
        op=st.one_of(
            st.tuples(st.just("set_grad"), NUMBERS, INDICES),
            st.tuples(st.just("set_state"), NUMBERS, INDICES, st.sampled_from(["master", "others"])),
            st.tuples(st.just("edit"), NUMBERS, INDICES, st.sampled_from(["gathered", "all"])),
        )
    )
    def edit(self, op: tuple[Any, ...]) -> None:
        self.program.append(op)

    @rule(tag=TAGS, is_latest=USUALLY)
    def save(self, tag: str, is_latest: bool) -> None:
        self.program.append(("save", tag, is_latest))

    @rule(tag=st.one_of(st.none(), TAGS), how=st.sampled_from(["all", *LOAD_OPTIONS]))
    def load(self, tag: str | None, how: str) -> None:
        self.program.append(("load", tag, how))

    @rule(stage=st.integers(0, 3), accumulation=st.integers(1, 4))
    def rebuild(self, stage: int, accumulation: int) -> None:
        self.program.append(("rebuild", stage, accumulation))


def machine_on(run_: RunOn, **fixed_: Any) -> type[Machine]:
    """A Machine on a pool, of configs with these fields."""
    return type("Here", (Machine,), {"run": staticmethod(run_), "fixed": fixed_})


# Found by hunts: what each of them held against.
_STAGE_3 = Config(shapes=((5,), (4, 3), (65,)), size=2, stage=3, accumulation=1)
FOUND: list[tuple[str, Program, Config]] = [
    (
        "a block that no forward has gathered yet, under no_sync()",
        [("backward", 0, "engine", False, (1,) * 3), ("backward", 1, "engine", True, ALL), ("step",)],
        _STAGE_3,
    ),
    (
        "other weights of one group after no_sync()",
        [("backward", 6, "scale", False, (2,) * 3), ("backward", 2, "scale", True, ALL), ("step",)],
        Config(shapes=((65,), (64,)), size=2, stage=3),
    ),
    (
        "a backward that was broken off",
        [("broken", 1, 3, 2, True, "backward"), ("accumulate", 9, "engine", ALL)],
        _STAGE_3,
    ),
    (
        "a backward under no_sync() that was broken off",
        [("broken", 1, 3, 0, False, "backward"), ("accumulate", 9, "engine", ALL)],
        _STAGE_3,
    ),
    (
        "a save after a forward that raised",
        [("broken", 7, 3, 0, True, "forward"), ("save", "a", True), ("accumulate", 1, "engine", ALL)],
        _STAGE_3,
    ),
    (
        "a step that was refused is none that was applied, and a save has no gradients of no_sync()",
        [("accumulate", 6, "scale", ALL), ("backward", 3, "engine", False, ALL), ("step",), ("save", "a", True)],
        _STAGE_3,
    ),
]


def test_programs_that_were_found(run):
    for what, program, config in FOUND:
        try:
            check(run, program, config)
        except ProgramFailed as failure:
            raise AssertionError(what) from failure


def test_any_program(run):
    run_state_machine_as_test(machine_on(run), settings=SETTINGS)


# ---- a long hunt --------------------------------------------------------------------------------------------------


def main() -> None:
    args, pool = parser(chunk=40).parse_args(), Ranks()
    try:
        has_failed = hunt(args, lambda: machine_on(OwnGroups(pool), **fixed_fields(args)), SETTINGS, ProgramFailed)
    finally:
        pool.stop()
    raise SystemExit(has_failed)


if __name__ == "__main__":
    main()
