"""Command-line options derived from the fields of a settings dataclass."""

import argparse
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")
# the unit of an option's value, by the end of its field's name
_UNITS = (
    ("_s", "SECONDS"),
    ("_mib", "MIB"),
    ("_gib", "GIB"),
    ("_share", "FRACTION"),
    ("_tokens", "TOKENS"),
    ("_len", "TOKENS"),
    ("_name", "NAME"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help has a wide column for option names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _formatter} | settings)
        # the namespace gets the parser of its verb, whose option names errors use
        self.set_defaults(parser=self)


def add_options(
    parser: argparse.ArgumentParser, settings: type, only: Sequence[str] | None = None
) -> None:
    """Add one option per field that has a help text, with the field's name, type and default.

    ``only`` restricts this to the named fields.

    Keys of a field's metadata:

    * ``help``: the help text, without the default.
    * ``group``: (title, example) of a group of options, which starts at this field. Without it the
      title is the first line of the dataclass's docstring.
    * ``metavar``: the name of the value in the help. Without it the field's name or type gives it.
    * ``choices``: the allowed values.

    A tuple's option takes one or more values, and may be repeated. Options that are not given are
    absent from the namespace, so that the default stands only in the dataclass.
    """
    group: argparse._ArgumentGroup | None = None
    hints = typing.get_type_hints(settings)
    for field in fields(settings):
        if only is not None and field.name not in only:
            continue
        if "group" in field.metadata or group is None:
            group = _add_group(parser, settings, field)
        if "help" not in field.metadata:
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
            shared["metavar"] = None if choices else _metavar(field, kind)
            if is_several:
                shared |= {"nargs": "+", "action": "extend"}
            group.add_argument(name, type=kind, choices=choices, **shared)


def from_options(settings: type[Settings], namespace: argparse.Namespace) -> Settings:
    """The settings, with the values given on the command line.

    Raises:
        ConfigError, RequestError: the dataclass refuses a value; the message names the field.
    """
    names = {field.name for field in fields(settings)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(namespace).items() if name in names}
    # argparse collects the values of a tuple's option in a list
    return settings(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def option_fields(settings: Sequence[type]) -> dict[str, tuple[Field[Any], Any]]:
    """The fields with a help text of several settings classes, with their types, by name."""
    hints = {name: hint for kind in settings for name, hint in typing.get_type_hints(kind).items()}
    found = (one for kind in settings for one in fields(kind) if "help" in one.metadata)
    return {one.name: (one, hints[one.name]) for one in found}


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32)


def _add_group(
    parser: argparse.ArgumentParser, settings: type, field: Field[Any]
) -> argparse._ArgumentGroup:
    if "group" not in field.metadata:
        title = (settings.__doc__ or "").partition("\n")[0].rstrip(".")
        return parser.add_argument_group(title)
    title, example = field.metadata["group"]
    return parser.add_argument_group(title, f"example: {example}")


def _base_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    assert isinstance(hint, type)
    return hint


def _metavar(field: Field[Any], kind: type) -> str:
    by_name = [unit for end, unit in _UNITS if field.name.endswith(end)]
    by_type = {int: "N", float: "NUMBER"}.get(kind, "TEXT")
    return str(field.metadata.get("metavar", by_name[0] if by_name else by_type))


def _help(field: Field[Any]) -> str:
    text, default = str(field.metadata["help"]), field.default
    if default in (None, (), MISSING):
        return text
    if isinstance(default, bool):
        default = "on" if default else "off"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"
