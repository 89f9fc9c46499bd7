"""Add DeepSpeed's arguments to the parser of a script's command line."""

from __future__ import annotations

import argparse
from typing import Any

_TUNING: dict[str, dict[str, Any]] = {
    "lr_schedule": {"type": str, "help": "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR or WarmupCosineLR"},
    "lr_range_test_min_lr": {"type": float, "default": 0.001, "help": "LRRangeTest: the first rate"},
    "lr_range_test_step_rate": {"type": float, "default": 1.0, "help": "LRRangeTest: its growth per interval"},
    "lr_range_test_step_size": {"type": int, "default": 1000, "help": "LRRangeTest: steps of an interval"},
    "lr_range_test_staircase": {"action": "store_true", "help": "LRRangeTest: grow at the end of intervals"},
    "cycle_first_step_size": {"type": int, "default": 1000, "help": "OneCycle: steps up"},
    "cycle_first_stair_count": {"type": int, "default": -1, "help": "OneCycle: stairs up"},
    "cycle_second_step_size": {"type": int, "default": -1, "help": "OneCycle: steps down; -1: as many as up"},
    "cycle_second_stair_count": {"type": int, "default": -1, "help": "OneCycle: stairs down; -1: as many as up"},
    "decay_step_size": {"type": int, "default": 1000, "help": "OneCycle: steps of an interval of the decay"},
    "cycle_min_lr": {"type": float, "default": 0.01, "help": "OneCycle: the lowest rate"},
    "cycle_max_lr": {"type": float, "default": 0.1, "help": "OneCycle: the highest rate"},
    "decay_lr_rate": {"type": float, "default": 0.0, "help": "OneCycle: the decay per interval"},
    "cycle_momentum": {"action": "store_true", "help": "OneCycle: cycle the momentum too"},
    "cycle_min_mom": {"type": float, "default": 0.8, "help": "OneCycle: the lowest momentum"},
    "cycle_max_mom": {"type": float, "default": 0.9, "help": "OneCycle: the highest momentum"},
    "decay_mom_rate": {"type": float, "default": 0.0, "help": "OneCycle: the decay of the momentum"},
    "warmup_min_lr": {"type": float, "default": 0.0, "help": "WarmupLR: the first rate"},
    "warmup_max_lr": {"type": float, "default": 0.001, "help": "WarmupLR: the last rate"},
    "warmup_num_steps": {"type": int, "default": 1000, "help": "WarmupLR: steps"},
    "warmup_type": {"type": str, "default": "log", "help": "WarmupLR: log or linear"},
}


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config`, and their older names, to a parser, and return it."""
    group = parser.add_argument_group("DeepSpeed")
    for name in ("deepspeed", "deepscale"):
        group.add_argument(f"--{name}", action="store_true", help="for the script to read")
        group.add_argument(f"--{name}_config", metavar="PATH", help="a JSON config")
    return parser


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the parameters of the schedules to a parser, for the script to read, and return it."""
    group = parser.add_argument_group("schedules")
    for name, options in _TUNING.items():
        group.add_argument(f"--{name}", **options)
    return parser
