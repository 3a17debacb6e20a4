"""Options of the command line from a TOML file."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from server.cli.options import option_fields
from weights.nearest_name import suggestion
from weights.toml_file import read_toml, typed_value


def apply_config(path: Path, options: argparse.Namespace, settings: Sequence[type]) -> None:
    """Add the options of a file to those that ``options`` has, which override them.

    ``options.sources`` gets the file and key of each field that the file sets.

    A key is an option's name, with dashes or underscores. Keys may stand in tables that are named
    like the groups of the help.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, given twice or of another type;
            the message names the file and the key.
    """
    known = option_fields(settings)
    groups = {
        _name(one.metadata["group"][0]) for one, _ in known.values() if "group" in one.metadata
    }
    given: set[str] = set()
    options.sources = getattr(options, "sources", {})
    for key, value in _flat(path, read_toml(path), groups):
        name = _name(key)
        if name not in known:
            raise ConfigError(f"{path}: {key}: unknown option{suggestion(name, known)}")
        if name in given:
            raise ConfigError(f"{path}: {key}: is given twice")
        given.add(name)
        field, kind = known[name]
        checked = typed_value(f"{path}: {key}", value, kind, field.metadata.get("choices"))
        if not hasattr(options, name):
            setattr(options, name, checked)
            options.sources[name] = f"{path}: {key}"


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
