"""What a state dict notes beside torch's keys: in its first parameter group.

torch.distributed.checkpoint's helpers drop keys beside groups and state.
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from pyzero.arguments.groups import RESERVED

# STEPS is in a full state dict: the step count of each master. torch leaves masters and STEPS unchanged.
ZERO, SCALER, RULE, STEPS = RESERVED


def note_master_steps(group: dict[str, Any], steps: list[float]) -> None:
    """Note in the first group of a full state dict the step count of each master, by param_id; -1: no state."""
    group[STEPS] = json.dumps(steps)


def notes_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the notes in the first group. Empty for a torch optimizer's, where a caller may use these names."""
    is_ours = isinstance(group.get(SCALER), Tensor) or isinstance(group.get(ZERO), str)
    return {key: group[key] for key in RESERVED if is_ours and key in group}


def master_steps(group: dict[str, Any]) -> list[float]:
    """Return what `note_master_steps` has noted; empty if there is none."""
    try:
        steps = json.loads(group.get(STEPS, "[]"))
        return [float(step) for step in steps]
    except (TypeError, ValueError):
        return []
