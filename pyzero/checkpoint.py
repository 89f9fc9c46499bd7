"""Saving and loading: this rank's state on as many ranks. Resharding is not here yet."""

from typing import Any

from torch.optim import Optimizer


def load_rank_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Copy one rank's saved state into an optimizer's views and groups; nothing is changed where it does not fit.

    Raises:
        ValueError: Other groups or shapes than the optimizer's.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    wanted_sizes = [len(group["params"]) for group in groups]
    sizes = [len(group["params"]) for group in saved_groups]
    if sizes != wanted_sizes:
        raise ValueError(
            f"expected groups of {wanted_sizes} parameters, got {sizes}; build the optimizer as it was when saved"
        )
    ids = [i for group in saved_groups for i in group["params"]]
    params = [param for group in groups for param in group["params"]]
    pairs = []
    for number, (i, param) in enumerate(zip(ids, params, strict=True)):
        saved = state_dict["state"].get(i, {})
        for name, view in optimizer.state.get(param, {}).items():
            shape = tuple(saved[name].shape) if name in saved else None
            if shape != tuple(view.shape):
                raise ValueError(
                    f"expected {name} of parameter {number} with shape {tuple(view.shape)}, got {shape}; "
                    f"load the file of the same rank, saved by as many ranks"
                )
            pairs.append((view, saved[name]))

    for view, value in pairs:
        view.copy_(value)
    for group, saved_group in zip(groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
