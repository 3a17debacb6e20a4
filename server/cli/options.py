"""Command-line options made from the fields of a settings dataclass."""

import argparse
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_options(
    parser: argparse.ArgumentParser, settings: type, leave_out: Iterable[str] = ()
) -> None:
    """Add one option a field: its name, type, default and help are the field's own.

    A tuple's option takes one value or more. An option that is not given leaves no trace, so the
    default stands in the dataclass alone.
    """
    title = (settings.__doc__ or "").partition("\n")[0].rstrip(".")
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(settings)
    for field in fields(settings):
        if field.name in leave_out:
            continue
        hint, name = hints[field.name], f"--{field.name.replace('_', '-')}"
        is_several = typing.get_origin(hint) is tuple
        kind = _base_type(typing.get_args(hint)[0] if is_several else hint)
        shared: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        shared["help"] = _help(field)
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **shared)
        else:
            choices = field.metadata.get("choices")
            shared["metavar"] = None if choices else kind.__name__.upper()
            shared["nargs"] = "+" if is_several else None
            group.add_argument(name, type=kind, choices=choices, **shared)


def from_options(settings: type[Settings], namespace: argparse.Namespace) -> Settings:
    """The settings with what the command line gave.

    Raises:
        ConfigError, RequestError: the dataclass refuses a value; the message names the field.
    """
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(namespace).items() if name in names}
    # what argparse gathers in a list is a tuple's field
    return settings(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def _base_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    assert isinstance(hint, type)
    return hint


def _help(field: Field[Any]) -> str:
    text = str(field.metadata["help"])
    if field.default in (None, (), MISSING):
        return text
    default = field.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"
