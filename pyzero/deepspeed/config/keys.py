"""The three states of a key of DeepSpeed's config: done, ignored or refused.

docs/deepspeed.md takes its table from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticUndefined


@dataclass(frozen=True)
class Done:
    """The key does the same as in DeepSpeed."""

    text: str


@dataclass(frozen=True)
class Ignored:
    """The key is accepted and changes nothing. If it differs from its default, one log line gives the text."""

    text: str
    warns: bool = False  # log a warning, because the user may rely on it, as for memory
    quiet: bool = False  # log nothing, because another key's line says the same


@dataclass(frozen=True)
class Refused:
    """The key would change results, so it raises an error with the remedy, unless it is disabled."""

    text: str
    parts: tuple[str, ...] = ()  # of a section in which nothing else changes results, whatever its own "enabled" says

    def is_asked_for(self, value: Any) -> bool:
        """Return whether a value enables what is refused."""
        if self.parts and isinstance(value, dict) and is_asked_for(value):
            return any(_enabled_flags({part: value.get(part) for part in self.parts}))
        return is_asked_for(value)


State = Done | Ignored | Refused

Auto = Literal["auto"]


def _flag(value: Any) -> Any:
    """Convert 0 and 1, which many configs use as flags."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def _whole(value: Any) -> Any:
    """Convert whole floats such as 5e8. Leave true and 0.5 to be refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = Annotated[bool, Field(strict=True), BeforeValidator(_flag)]
Count = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole)]
Size = Annotated[int, Field(strict=True, ge=0), BeforeValidator(_whole)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def is_asked_for(value: Any) -> bool:
    """Return whether a value or section enables anything. false, 0, 1, null, "none" and disabled sections do not."""
    if isinstance(value, dict):
        flags = list(_enabled_flags(value))
        return any(flags) if flags else any(map(is_asked_for, value.values()))
    if isinstance(value, bool):
        return value
    return value not in (None, "none", 0, 1)


def _enabled_flags(value: dict[str, Any]) -> Iterator[bool]:
    """Yield the outermost "enabled" on each path down."""
    if "enabled" in value:
        yield is_asked_for(value["enabled"]) or value["enabled"] == 1
        return
    for item in value.values():
        if isinstance(item, dict):
            yield from _enabled_flags(item)


def is_comment(name: Any) -> bool:
    """Return whether a key is a comment for the reader, because JSON has no comments."""
    return str(name).startswith(("_", "#", "//")) or name in ("comment", "comments")


class Section(BaseModel):
    """A section of keys. Unknown keys and quoted numbers are errors. Comments are dropped."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _no_comments(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not is_comment(name)}

    @field_validator("*", mode="before")
    @classmethod
    def _no_quoted_numbers(cls, value: Any) -> Any:
        """Refuse a quoted number such as "8", which pydantic would convert."""
        if isinstance(value, str) and value not in ("auto", ""):
            try:
                number = float(value)
            except ValueError:
                return value
            raise ValueError(f"wanted the number {number:g}; remove the quotes")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        state = state_of(cls, info.field_name)
        is_default = value == cls.model_fields[info.field_name].default
        if isinstance(state, Refused) and not is_default and state.is_asked_for(value):
            raise ValueError(state.text)
        return value


class OpenSection(Section):
    """A section in which DeepSpeed ignores unknown keys. They are kept, and one log line lists them."""

    model_config = ConfigDict(extra="allow")


def state_of(section: type[BaseModel], name: str) -> State | None:
    """Return the state of a key; None for a key that is a section."""
    states = (item for item in section.model_fields[name].metadata if isinstance(item, State))
    return next(states, None)


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section in an annotation such as `Section | None`; None if there is none."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def rows(section: type[Section], path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, state, default, text) of each key, in the order of the classes."""
    for name, field in section.model_fields.items():
        state = state_of(section, name)
        below = section_of(field.annotation)
        if below is not None:
            yield from rows(below, f"{path}{name}.")
        if state is not None:
            default = "" if field.default in (None, PydanticUndefined) else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            yield f"{path}{name}", type(state).__name__.lower(), default, state.text


def table(section: type[Section]) -> str:
    """Return all keys as a Markdown table, for docs/deepspeed.md."""
    lines = ["| key | state | default | what it means here |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {state} | {default} | {text} |" for key, state, default, text in rows(section)]
    return "\n".join(lines) + "\n"


def remarks(section: Section, path: str = "") -> Iterator[tuple[str, bool]]:
    """Yield (line, whether it is a warning) for ignored keys that are set to another value than their default.

    Keys of a section that have the same text share a line. One more line lists all keys that are "auto".
    """
    autos = [] if path else list(_autos(section))
    if autos:
        yield f'"auto" takes its default, for there is no Trainer to fill it in: {", ".join(autos)}', False
    told: dict[Ignored, list[str]] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        state = state_of(type(section), name)
        if isinstance(value, Section):
            yield from remarks(value, f"{path}{name}.")
        elif isinstance(state, Ignored) and name in section.model_fields_set:
            default = type(section).model_fields[name].default
            asks = is_asked_for(value) if isinstance(value, dict) else value not in (default, None, "auto")
            if asks and not state.quiet:
                shown = "..." if isinstance(value, (dict, list)) else str(value).lower()
                told.setdefault(state, []).append(f"{path}{name}={shown}")
    for state, names in told.items():
        yield f"{', '.join(names)}: {state.text}", state.warns


def _autos(section: Section, path: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _autos(value, f"{path}{name}.")
        elif value == "auto" and name in section.model_fields_set:
            yield f"{path}{name}"
