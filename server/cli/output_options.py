"""Options and arguments that name a result's file or folder, checked before a verb's work."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from weights.checkpoints.new_folder import partial_path

# the name in a parser's defaults of its options for results: destination to "file" or "folder"
_OUTPUTS = "outputs"
# enough to find a full disk, on which empty files can still be created
_PROBE = bytes(4096)


def add_output_file(parser: argparse.ArgumentParser, name: str, help: str, **more: Any) -> None:
    """Add an option or argument for a file to write; its folder must exist."""
    _add(parser, "file", name, {"metavar": "FILE", "help": help} | more)


def add_output_folder(parser: argparse.ArgumentParser, name: str, help: str, **more: Any) -> None:
    """Add an option or argument for a folder to create or continue; so may be its parents."""
    _add(parser, "folder", name, {"metavar": "DIR", "help": help} | more)


def add_results_folder(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Add ``--out`` for the results of a benchmark that can be interrupted."""
    kept = "folder for the results; the same command continues an interrupted run there"
    if "default" in more:
        kept += " (default: %(default)s)"
    add_output_folder(parser, "--out", kept, **more)


def check_outputs(options: argparse.Namespace) -> None:
    """Test that results can be written to the places that a command line names.

    Call this before the work, which may take hours. Nothing is left behind.

    Raises:
        ConfigError: a file's folder does not exist, a file is a folder or a folder a file, or the
            place is read-only or full; the message names the option.
    """
    outputs: Mapping[str, str] = getattr(options, _OUTPUTS, {})
    for name, kind in outputs.items():
        place: Path | None = getattr(options, name)
        if place is not None:
            check_output(name, place, kind)


def check_output(name: str, place: Path, kind: str) -> None:
    """As ``check_outputs`` for one place, a "file" or a "folder", of the option ``name``."""
    try:
        _CHECKS[kind](name, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{name}: {place} cannot be written ({reason})") from None


def _add(
    parser: argparse.ArgumentParser, kind: str, name: str, settings: Mapping[str, Any]
) -> None:
    action = parser.add_argument(name, type=Path, **settings)
    known = parser.get_default(_OUTPUTS) or {}
    parser.set_defaults(**{_OUTPUTS: known | {action.dest: kind}})


def _check_file(name: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise ConfigError(f"{name}: folder {file.parent} does not exist")
    if file.is_dir():
        raise ConfigError(f"{name}: {file} cannot be written (it is a folder)")
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{name}: {file} cannot be written")
    if not file.exists():
        _probe(file.parent)


def _check_folder(name: str, folder: Path) -> None:
    path = folder.absolute()
    existing = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not existing.is_dir():
        raise ConfigError(f"{name}: {existing} is not a folder")
    _probe(existing)


def _probe(folder: Path) -> None:
    """Write a file in a folder and remove it (OSError)."""
    probe = partial_path(folder / "probe")
    try:
        with open(probe, "xb") as file:
            file.write(_PROBE)
    finally:
        probe.unlink(missing_ok=True)


_CHECKS = {"file": _check_file, "folder": _check_folder}
