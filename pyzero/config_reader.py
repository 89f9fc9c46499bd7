"""Reads a DeepSpeed config: from a dict, a file or JSON text; says what is wrong with it and where."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pyzero.config import Config

# Keys that DeepSpeed has and this version does not: what to do instead.
_NOT_YET = {
    "zero_optimization.offload_optimizer": "offload is not there yet; remove it, the state is sharded over ranks",
    "zero_optimization.offload_param": "offload is not there yet; remove it",
    "zero_optimization.cpu_offload": "offload is not there yet; remove it",
    "amp": "apex amp is not supported; use fp16 or bf16",
    "torch_autocast": "not there yet; enter torch.autocast in the training loop",
    "activation_checkpointing": "not there yet; use torch.utils.checkpoint in the model",
    "data_types": "not there yet; several ranks sum gradients in fp32, one rank in .grad's own dtype",
    "checkpoint": "not there yet; remove it",
    "communication_data_type": "not there yet; gradients travel in the dtype of the weights",
    "prescale_gradients": "not needed: gradients are summed in fp32, then divided; remove it",
    "gradient_predivide_factor": "not needed: gradients are summed in fp32, then divided; remove it",
    "sparse_gradients": "not there yet; use nn.Embedding(sparse=False)",
}


def load(config: Any) -> Config:
    """A config from a dict, a path, or JSON text.

    Raises:
        ValueError: Unknown keys, wrong values; each with its path and a remedy.
    """
    if isinstance(config, Config):
        return config
    values = _read(config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ValueError("the config has errors:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _read(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"expected config as a dict, a path or JSON text, got {type(config).__name__}; pass one of these"
        )
    text = str(config)
    source = "config"
    if not text.lstrip().startswith("{"):
        source, path = text, Path(text)
        if not path.is_file():
            raise ValueError(
                f"expected config as a dict, a path or JSON text, got {text!r}, which is no file; correct it"
            )
        text = path.read_text()
    try:
        values = json.loads(text, object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}; correct it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}; wrap it in braces")
    return values


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twin = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"got the key {twin!r} twice in one object; remove one")
    return values


def _explain(item: Any) -> str:
    """One line on one of pydantic's errors."""
    path = ".".join(str(part) for part in item["loc"] if part not in ("auto", "literal['auto']"))
    path = path or "config"
    if item["type"] == "extra_forbidden":
        if path in _NOT_YET:
            return f"{path}: {_NOT_YET[path]}"
        return f"{path}: unknown key{_did_you_mean(item['loc'])}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: got {item['input']!r}; {message[0].lower()}{message[1:]}"


def _did_you_mean(loc: tuple[Any, ...]) -> str:
    """The nearest known key, or the list of them."""
    section: Any = Config
    for part in loc[:-1]:
        section = _section_of(section.model_fields[part].annotation)
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(names)}"


def _section_of(annotation: Any) -> Any:
    """The section in `Section` or `Section | None`."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
