"""Typed options: one frozen dataclass per backend, read by the API, by `-o key=value` and by docs.

@dataclass(frozen=True)
class ThreadOptions(Options):
    threads: int | None = option(None, "Threads for one call.", minimum=1)
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin

from unirt.errors import OptionError


def option(default: Any, help: str, *, minimum: float | None = None) -> Any:
    """A field of an `Options` class: its default, what it means, and its smallest value."""
    metadata = {"help": help, "minimum": minimum}
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionInfo:
    """One option as a reader needs it: name, type as text, default and meaning."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True)
class Options:
    """The base of every backend's options. Fields may be bool, int, float, str, Path, Literal,
    tuple[str, ...], Mapping[str, str], and any of them or None.
    """

    @classmethod
    def parse(cls, values: Mapping[str, object] | Options | None, *, owner: str = "") -> Self:
        """Options from a mapping whose values are typed, or text as a command line gives them.

        Raises OptionError for an unknown name (with the nearest valid one) or a value that does
        not fit.
        """
        owner = owner or cls.__name__
        if isinstance(values, cls):
            # Whoever builds one directly has passed no check yet.
            values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
        if isinstance(values, Options) or not isinstance(values, Mapping | None):
            raise OptionError(
                f"The options of {owner} are of type {type(values).__name__}.",
                f"{owner} takes a mapping or {cls.__name__}.",
                "Pass options={'name': value}.",
            )
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        converted: dict[str, object] = {}
        for name, value in (values or {}).items():
            if name not in fields:
                raise _unknown(name, sorted(fields), owner)
            converted[name] = _convert(value, hints[name], name, owner)
            minimum = fields[name].metadata.get("minimum")
            if minimum is not None and isinstance(converted[name], int | float):
                number = typing.cast(float, converted[name])
                if not number >= minimum:
                    raise _refused(name, value, f"a number of at least {minimum}", owner)
        return cls(**converted)

    @classmethod
    def describe(cls) -> tuple[OptionInfo, ...]:
        """Every option with its type, default and meaning, in order of definition."""
        hints = typing.get_type_hints(cls)
        return tuple(
            OptionInfo(
                field.name, _type_text(hints[field.name]), _default(field), field.metadata["help"]
            )
            for field in dataclasses.fields(cls)
        )

    def changed(self) -> dict[str, object]:
        """Only the options that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        }


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _unknown(name: str, valid: list[str], owner: str) -> OptionError:
    near = difflib.get_close_matches(str(name), valid, n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return OptionError(
        f"{owner} has no option {name!r}.",
        f"Its options are: {', '.join(valid) or 'none'}.",
        f"{guess}`unirt doctor --options` explains each.",
        option=name,
        valid=valid,
        owner=owner,
    )


def _refused(name: str, value: object, expected: str, owner: str) -> OptionError:
    return OptionError(
        f"{owner} cannot take {name}={value!r}.",
        f"The option is {expected}.",
        "Change the value or leave the option out.",
        option=name,
        value=value,
        owner=owner,
    )


_TRUTH = {"1": True, "true": True, "yes": True, "on": True}
_TRUTH |= {"0": False, "false": False, "no": False, "off": False}


def _convert(value: object, hint: Any, name: str, owner: str) -> object:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in args:
                return None
            raise _refused(name, value, _type_text(hint), owner)
        (hint,) = (arg for arg in args if arg is not type(None))
        return _convert(value, hint, name, owner)
    refused = _refused(name, value, _type_text(hint), owner)
    if origin is Literal:
        match = next((arg for arg in args if str(arg) == str(value)), None)
        if match is None:
            raise refused
        return match
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
        raise refused
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise refused
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            raise refused from None
        if not isinstance(value, str) and number != value:
            raise refused
        return number
    if hint is Path and isinstance(value, str | Path) and value != "":
        try:
            return Path(value).expanduser()
        except RuntimeError:  # ~somebody, who has no home here
            raise refused from None
    if hint is str and isinstance(value, str):
        return value
    if origin is tuple and isinstance(value, str | list | tuple):
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_convert(item, args[0], name, owner) for item in items if item != "")
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, str):
            value = dict(item.partition("=")[::2] for item in value.split(",") if item)
        if isinstance(value, Mapping):
            return {str(key): str(item) for key, item in value.items()}
    raise refused


def _type_text(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is tuple:
        return "comma-separated list"
    if origin is not None and issubclass(origin, Mapping):
        return "key=value list"
    return {type(None): "none", int: "int", float: "float", str: "text", Path: "path"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )
