"""Options of ``memplus serve`` from environment variables."""

import argparse
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from server.cli.options import option_fields
from server.config import PREFIX
from weights.nearest_name import suggestion
from weights.toml_file import typed_value

_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
# server/config.py reads these, for every verb or when the server starts
_READ_ELSEWHERE = ("cache", "api_keys", "node_key")
# Kubernetes sets these in all pods of a namespace that has a Service named memplus
_SERVICE_LINK = re.compile(r"(.+_)?service_(host|port(_.+)?)|port_[0-9]+_(tcp|udp|sctp)(_.+)?")


def apply_environment(
    variables: Mapping[str, str], options: argparse.Namespace, settings: Sequence[type]
) -> None:
    """Add the options of MEMPLUS_ variables to those of the command line, which override them.

    MEMPLUS_PORT is ``--port``, and so on for all options, ``--config`` included. A variable with
    several values has commas between them. ``--api-key`` has none, because MEMPLUS_API_KEYS gives
    keys. ``options.sources`` gets the variable of each field that a variable sets.

    Args:
        variables: see ``environment_settings``.

    Raises:
        ConfigError: a variable is unknown, or its value has another type; the message names it.
    """
    known = option_fields(settings)
    del known["api_key"]
    names = [PREFIX + one.upper() for one in (*known, *_READ_ELSEWHERE, "config")]
    options.sources = getattr(options, "sources", {})
    for variable, text in variables.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable not in names:
            hint = _link_hint(name, text) or suggestion(variable, names)
            raise ConfigError(f"{variable}: unknown environment variable{hint}")
        if name == "config" and options.config is None:
            options.config = Path(text)
        if name not in known:
            continue
        field, kind = known[name]
        try:
            value = typed_value(variable, _value(text, kind), kind, field.metadata.get("choices"))
        except ConfigError as error:
            raise ConfigError(f"{error}{_link_hint(name, text)}") from None
        if not hasattr(options, name):
            setattr(options, name, value)
            options.sources[name] = variable


def _value(text: str, kind: Any) -> Any:
    """The text as a value of this type; the text itself if it is none."""
    if isinstance(kind, types.GenericAlias):
        return [part.strip() for part in text.split(",") if part.strip()]
    bases = typing.get_args(kind) or (kind,)
    if bool in bases:
        return _BOOLEANS.get(text.lower(), text)
    for base in (int, float):
        if base in bases:
            try:
                return base(text)
            except ValueError:
                continue
    return text


def _link_hint(name: str, text: str) -> str:
    if not text.startswith(("tcp://", "udp://")) and not _SERVICE_LINK.fullmatch(name):
        return ""
    return "; Kubernetes sets it for a Service of this name; set enableServiceLinks to false"
