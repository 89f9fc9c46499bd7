"""Unknown keys of DeepSpeed's config: which of them misspell a key, and in which section others have their place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pyzero.arguments.groups import OTHER_NAMES
from pyzero.deepspeed.config.keys import Done, OpenSection, Refused, Section, is_comment, section_of, state_of

_SIMILAR = 0.75  # difflib's ratio from which on an unknown key counts as a misspelt one
_SIMILAR_WORD = 0.5  # and that of the words that differ: memory_optimization is no zero_optimization
_OTHER_PLACES = {"max_grad_norm": "gradient_clipping"}  # names of other sections, each with a better one


def nearest(section: type[Section], name: str) -> str | None:
    """Return the key of the section that an unknown key misspells; None if it is something else.

    Where DeepSpeed ignores unknown keys, only keys that do something count.
    """
    known = [each for each in section.model_fields if not issubclass(section, OpenSection) or _works(section, each)]
    if OTHER_NAMES.get(name) in known:
        return OTHER_NAMES[name]
    near = next(iter(difflib.get_close_matches(name.lower(), known, 1, _SIMILAR)), None)
    return None if near is None or _has_another_word(name.lower(), near) else near


def _has_another_word(name: str, known: str) -> bool:
    """Return whether one name has a word where the other one has a different word."""
    words, others = re.split("[-_]", name), re.split("[-_]", known)
    own = "_".join(word for word in words if word not in others)
    other = "_".join(word for word in others if word not in words)
    return bool(own and other) and difflib.SequenceMatcher(None, own, other).ratio() < _SIMILAR_WORD


def misspelt(section: type[Section], values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, the key that is meant) of misspelt keys where unknown ones are allowed. Pydantic reports others."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if name in section.model_fields:
            below = section_of(section.model_fields[name].annotation)
            if below is not None:
                yield from misspelt(below, value, f"{path}{name}.")
        elif issubclass(section, OpenSection) and not is_comment(name):
            near = nearest(section, str(name))
            if near is not None:
                yield f"{path}{name}", near


def unknown_keys(config: Section) -> list[str]:
    """Return the paths of a config's unknown keys, each with the place that it has in DeepSpeed if there is one."""
    places = {path: place_of(type(config), path) for path in _unknown(config)}
    return [path if place is None else f"{path} (its place: {place})" for path, place in places.items()]


def _unknown(section: Section, path: str = "") -> Iterator[str]:
    if isinstance(section, OpenSection):
        yield from (f"{path}{name}" for name in section.model_extra or ())
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _unknown(value, f"{path}{name}.")


def place_of(config: type[Section], path: str) -> str | None:
    """Return where a config has the key or section of an unknown path's last name; None if nowhere, or not only there.

    Places that are refused, or that the path is in, do not count.
    """
    name = path.rpartition(".")[2]
    wanted = _OTHER_PLACES.get(name) or OTHER_NAMES.get(name, name)
    found = {place: works for place, works in _places(config) if place.rpartition(".")[2] == wanted}
    places = [place for place, works in found.items() if works] or list(found)
    return places[0] if len(places) == 1 and not path.startswith(f"{places[0]}.") else None


def _places(section: type[Section], path: str = "") -> Iterator[tuple[str, bool]]:
    """Yield (path, whether it does something) of each key and section that is not refused."""
    for name, field in section.model_fields.items():
        if isinstance(state_of(section, name), Refused):
            continue
        yield f"{path}{name}", _works(section, name)
        below = section_of(field.annotation)
        if below is not None:
            yield from _places(below, f"{path}{name}.")


def _works(section: type[Section], name: str) -> bool:
    """Return whether a key does something, or one of the keys in a section does."""
    below = section_of(section.model_fields[name].annotation)
    is_done = isinstance(state_of(section, name), Done)
    return is_done or (below is not None and any(_works(below, each) for each in below.model_fields))
