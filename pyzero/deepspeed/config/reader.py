"""Read a DeepSpeed config from a dict, a file, JSON text, or JSON text in base64.

Errors say what is wrong, and where.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pyzero.deepspeed.config.keys import Section, section_of
from pyzero.deepspeed.config.schema import Config
from pyzero.deepspeed.config.unknown_keys import misspelt, nearest, place_of

_LONGEST_VALUE = 60  # characters
_LONGEST_LIST = 12  # keys
_STRING = r'("(?:\\.|[^"\\\n])*")'
_COMMENT = re.compile(rf"{_STRING}|(?://|#)[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")
_NO_NUMBER = ("int_type", "float_type", "bool_type", "literal_error")  # pydantic's error types


def load(config: Any) -> Config:
    """Read and check a config from a dict, a path or JSON text.

    Raises:
        ValueError: There are misspelt keys, wrong values, or unknown keys in a section where DeepSpeed refuses these
            too. The message has the path and a remedy for each.
    """
    if isinstance(config, Config):
        return config
    values = _read(config)
    lines = {path: [f"unknown key; did you mean {near!r}?"] for path, near in misspelt(Config, values)}
    try:
        settings = Config.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            path, line = _explain(item)
            wanted = lines.setdefault(path, [])
            line = line.partition("; ")[2] if wanted else line  # pydantic reports each member of a union
            if not any(line in other for other in wanted):
                wanted.append(line)
    if lines:
        raise ValueError(
            "the config has errors:\n"
            + "\n".join(f"  {path}: {', or '.join(of_path)}" for path, of_path in lines.items())
        )
    return settings


def _read(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"expected config as a dict, a path or JSON text, got {type(config).__name__}; pass one of these"
        )
    text = str(config)
    source = "config"
    if not _plain(text).lstrip().startswith("{"):
        decoded = _from_base64(text)
        if not os.path.isfile(text) and decoded is None:
            raise ValueError(
                f"expected config as a dict, a path or JSON text, got {text!r}, which is no file; correct it"
            )
        source = text
        # Editors on Windows write a byte order mark.
        text = decoded if decoded is not None else Path(text).read_text(encoding="utf-8-sig")
    try:
        values = json.loads(_plain(text), object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        values = _read_hjson(text, source, error)
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}; wrap it in braces")
    return values


def _from_base64(text: str) -> str | None:
    """Decode JSON text that a launcher encoded as one argument; None if it is not such text."""
    try:
        decoded = base64.urlsafe_b64decode(text).decode()
    except ValueError:
        return None
    return decoded if _plain(decoded).lstrip().startswith("{") else None


def _plain(text: str) -> str:
    """Return the text without comments and trailing commas."""
    for pattern in (_COMMENT, _LAST_COMMA):
        text = pattern.sub(lambda found: found[1] or " ", text)
    return text


def _read_hjson(text: str, source: str, error: json.JSONDecodeError) -> Any:
    """Read Hjson (keys without quotes, items without commas), as DeepSpeed does, if the package is installed."""
    try:
        hjson = importlib.import_module("hjson")
    except ImportError:
        raise ValueError(f"{source}: not JSON: {error}; correct it, or install hjson, as DeepSpeed does") from None
    try:
        return hjson.loads(text, object_pairs_hook=_no_twins)
    except hjson.HjsonDecodeError:
        raise ValueError(f"{source}: neither JSON nor Hjson: {error}; correct it") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twin = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"got the key {twin!r} twice in one object; remove one")
    return values


def _explain(item: Any) -> tuple[str, str]:
    """Return (path, message) of one of pydantic's errors."""
    section, names = _place(item["loc"])
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        path = ".".join([*names, name])
        return path, f"unknown key{_did_you_mean(section, path)}"
    message = item["msg"].removeprefix("Value error, ")
    message = f"i{message[1:]}" if message.startswith("Input") else message
    if item["type"] == "model_type":
        message = "wanted a section of keys, in braces"
    if isinstance(item["input"], list) and item["type"] in _NO_NUMBER and not _takes_lists(section, names):
        message = "wanted one value: a list is for autotuning to choose from, which is not done; set the one to use"
    got = repr(item["input"])
    got = got if len(got) <= _LONGEST_VALUE else f"{got[:_LONGEST_VALUE]}..."
    return ".".join(names) or "config", f"got {got}; {message}"


def _place(loc: tuple[Any, ...]) -> tuple[type[Section], list[str]]:
    """Return the innermost section that an error is in, and the keys on its path, without pydantic's additions."""
    section: type[Section] = Config
    names: list[str] = []
    for part in loc:
        if part not in section.model_fields:
            break
        names.append(part)
        below = section_of(section.model_fields[part].annotation)
        if below is None:
            break
        section = below
    return section, names


def _takes_lists(section: type[Section], names: list[str]) -> bool:
    field = section.model_fields.get(names[-1]) if names else None
    return field is not None and any(kind in str(field.annotation) for kind in ("list[", "tuple["))


def _did_you_mean(section: type[Section], path: str) -> str:
    """Suggest the nearest known key, the same key in another section, or the list of known keys."""
    names = list(section.model_fields)
    near = nearest(section, path.rpartition(".")[2]) or place_of(Config, path)
    if near is not None:
        return f"; did you mean {near!r}?"
    if len(names) <= _LONGEST_LIST:
        return f"; known here: {', '.join(names)}"
    return (
        ", nor one of DeepSpeed's; remove it, or begin it with _ for a comment; `python -m pyzero config-keys` has all"
    )
