"""Options of the command line from a TOML file."""

import argparse
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from weights.nearest_name import suggestion
from weights.toml_file import read_toml, typed_value


def apply_config(path: Path, options: argparse.Namespace, settings: Sequence[type]) -> None:
    """Add the options of a file to those of the command line, which override them.

    ``options.file_keys`` gets the file and key of each field that the file sets.

    A key is an option's name, with dashes or underscores. Keys may stand in tables that are named
    like the groups of the help.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, given twice or of another type;
            the message names the file and the key.
    """
    hints = {name: hint for kind in settings for name, hint in typing.get_type_hints(kind).items()}
    known = {one.name: one for kind in settings for one in fields(kind) if "help" in one.metadata}
    groups = {_name(one.metadata["group"][0]) for one in known.values() if "group" in one.metadata}
    given: set[str] = set()
    options.file_keys = {}
    for key, value in _flat(path, read_toml(path), groups):
        name = _name(key)
        if name not in known:
            raise ConfigError(f"{path}: {key}: unknown option{suggestion(name, known)}")
        if name in given:
            raise ConfigError(f"{path}: {key}: is given twice")
        given.add(name)
        choices = known[name].metadata.get("choices")
        checked = typed_value(f"{path}: {key}", value, hints[name], choices)
        if not hasattr(options, name):
            setattr(options, name, checked)
            options.file_keys[name] = f"{path}: {key}"


def _flat(path: Path, raw: Mapping[str, Any], groups: set[str]) -> list[tuple[str, Any]]:
    """The keys of the file and of its tables, with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in raw.items():
        if not isinstance(value, dict):
            found.append((key, value))
        elif _name(key) in groups:
            found += value.items()
        else:
            raise ConfigError(f"{path}: {key}: unknown table, not {', '.join(sorted(groups))}")
    return found


def _name(key: str) -> str:
    return key.lower().replace("-", "_").replace(" ", "_")
