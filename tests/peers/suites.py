"""The peers' suites that are run, and where this package is known to differ: a test's id, and why."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

ROWS = pytest.StashKey[list[str]]()  # of the table, as they come


class Difference(NamedTuple):
    """Tests that fail here, and are to."""

    pattern: str  # searched in the test's id
    why: str


class Suite(NamedTuple):
    """One file of a peer's tests."""

    name: str
    peer: str  # "torch" or "deepspeed"
    path: str  # below the folder of the peer's tests
    differences: tuple[Difference, ...] = ()
    only: str = ""  # pytest's -k
    not_yet: str = ""  # searched in the ids: left out, for the work on it is not done

    @property
    def plugin(self) -> str:
        return f"{self.peer}_side"


_REFUSES = "refused by name, for it would change the result"
_INSIDES = "asks for a class or method inside DeepSpeed"
_WORDS = "the same is refused with another class of error, or in other words"

SUITES = (
    Suite(
        "optimizers",
        "torch",
        "test_optim.py",
        (
            Difference("test_errors_Adam", "a tensor as lr is refused by torch with foreach=True, and works here"),
            Difference("_cpu_float64", "parameters in fp64 are refused by name"),
            Difference(
                "test_fused_error_on_params_on_meta", "meta parameters are refused at construction, not in step()"
            ),
            Difference(
                "test_state_dict_deterministic",
                "all passes but its last line, which holds a group twice: the first one carries more in a state dict",
            ),
        ),
        only="TestOptimRenewed",
    ),
    Suite(
        "schedulers",
        "torch",
        "optim/test_lrscheduler.py",
        (
            Difference(
                r"test_cycle_lr_(exp|tri)\w+mode(?!_one_lr_no)|test_cycle_lr_with_adam|test_onecycle_lr_(cos|leg|lin)",
                "sets betas of 5 to 50, which a step refuses",
            ),
            Difference("one_lr_no_momentum", "reads a momentum, which Adam has none of"),
            Difference("verbose_deprecation_warning", "the argument is gone from newer torch"),
        ),
    ),
    Suite("averaged models", "torch", "optim/test_swa_utils.py"),
    Suite(
        "GradScaler",
        "torch",
        "test_torch.py",
        (
            Difference(
                "test_grad_scaling_(clipping_cpu|penalty)",
                "scaler.step() takes the scale out in the update, not out of .grad, which stays scaled",
            ),
            Difference("test_grad_scaling_unscale_sparse", "sparse parameters are refused by name"),
            Difference(
                "test_params_invalidated",
                "wants NaN in the weights after gradients became NaN after unscale_(): it is skipped",
            ),
        ),
        only="grad_scal or params_invalidated",
    ),
    Suite(
        "user backward",
        "deepspeed",
        "unit/v1/zero/test_zero_user_backward.py",
        (
            Difference(
                r"test_grad_accumulation|test_scale_with_gradient_accumulation",
                "bf16 micro-batches are summed in fp32, exactly so; the reference sums in bf16, and is 2.3 % off",
            ),
            Difference(
                "test_error_when_backward_without_scale|test_set_gradient_accumulation_boundary_rejected", _WORDS
            ),
            Difference("test_scale_validates_scalar_loss", "scale() takes any tensor that backward can start at"),
        ),
    ),
    Suite(
        "overflow",
        "deepspeed",
        "unit/runtime/half_precision/test_zero_optim_overflow.py",
        (
            Difference(
                "test_ignore_grad_overflow",
                "bf16.check_grad_overflow=false puts NaN into the weights; here it is skipped",
            ),
        ),
    ),
    Suite(
        "fp16",
        "deepspeed",
        "unit/runtime/half_precision/test_fp16.py",
        (Difference("TestZeroAllowUntestedOptimizer", _WORDS),),
        not_yet="TestFP16OptimizerForMoE",
    ),
    Suite(
        "dynamic loss scale",
        "deepspeed",
        "unit/runtime/half_precision/test_dynamic_loss_scale.py",
        (Difference(r"test_(consecutive_)?hysteresis(_survives_a_checkpoint)?\[", _INSIDES),),
    ),
    Suite(
        "clipping",
        "deepspeed",
        "unit/v1/half_precision/test_gradient_clipping_default.py",
        (
            Difference("TestGradientClippingConfig", _INSIDES),
            Difference("defaults_to_one", "nothing is clipped unless it is asked for; one log line says so"),
        ),
    ),
    Suite(
        "config",
        "deepspeed",
        "unit/runtime/test_ds_config_dict.py",
        (
            Difference(r"TestBatchConfig|test_gather_16bit|test_get_bfloat16", _INSIDES),
            Difference(
                "test_compression_training|test_quantized_eigenvalue", "quantising while training is refused by name"
            ),
            Difference("test_check_version", "there is no git hash of a DeepSpeed"),
            Difference(
                "TestDeprecatedDeepScaleConfig", "args.deepscale_config, its name before DeepSpeed, is not read"
            ),
            Difference("TestNoModel", _WORDS),
        ),
    ),
    Suite(
        "initialize",
        "deepspeed",
        "unit/runtime/test_ds_initialize.py",
        (
            Difference(
                r"TestClientOptimizer|TestConfigOptimizer|TestBf16ZeRO0",
                "asks for the class of the optimizer, which is ours",
            ),
            Difference(
                r"TestOptimizerImplementation::test\[(fp16-(bf16|fp32)|bf16-fp(16|32)|fp32-(bf|fp)16)-None\]",
                "DeepSpeed's stage 0 cannot accumulate in that dtype; here it can",
            ),
        ),
    ),
    Suite(
        "schedules",
        "deepspeed",
        "unit/runtime/test_lr_schedulers.py",
        (
            Difference(
                r"test_lr_range_test_staircase_\w+|_config_from_args|in_its_config_params|keep_their_config_params|"
                r"second_stair_count_falls_back|test_cycle_momentum_",
                "a config made of the command-line arguments of add_tuning_arguments is not there",
            ),
            Difference("unknown_warmup_type_falls_back", "an unknown warmup_type is an error"),
            Difference("test_one_cycle_allows_zero_second_step_size", _INSIDES),
        ),
    ),
    Suite(
        "no_sync",
        "deepspeed",
        "unit/runtime/test_no_sync_ctxt.py",
        (Difference(r"test_zero_stage\[[23]|test_engine_step|test_reentry", "refused there, works here"),),
    ),
)


def judge(outcomes: dict[str, tuple[str, str]], differences: tuple[Difference, ...]) -> tuple[list[str], list[str]]:
    """(tests that fail and are not listed, tests and patterns that are listed and do not fail)."""
    listed = {name for name in outcomes if any(re.search(item.pattern, name) for item in differences)}
    failed = {name for name, (outcome, _) in outcomes.items() if outcome == "failed"}
    unlisted = [f"{name}: {outcomes[name][1]}" for name in sorted(failed - listed)]
    stale = [name for name in sorted(listed - failed) if outcomes[name][0] == "passed"]
    unused = [item.pattern for item in differences if not any(re.search(item.pattern, name) for name in failed)]
    return unlisted, stale + unused
