"""Puts the names that a user typed into error messages: options, variables, keys of a file."""

import argparse
import re
from collections.abc import Mapping

_FIELD = re.compile(r"[a-z][a-z0-9_]*(?=: )")
# fields in a sentence, but not in paths, quoted values or longer names
_MENTION = re.compile(r"(?<![\w./'\"`-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w/'\"`-]|\.\w)")


def typed_names(options: argparse.Namespace) -> dict[str, str]:
    """The typed name of each setting of a verb, by its field.

    That is the variable or the file and key of ``options.sources`` (see ``apply_environment`` and
    ``apply_config``), else the option or the positional argument. A namespace that ``Parser`` did
    not make has none.
    """
    parser: argparse.ArgumentParser | None = getattr(options, "parser", None)
    names: dict[str, str] = {}
    for action in parser._actions if parser is not None else ():
        name = next(iter(action.option_strings), action.metavar)
        if isinstance(name, str):
            names[action.dest] = name
    return names | getattr(options, "sources", {})


def in_typed_names(message: str, names: Mapping[str, str]) -> str:
    """A message about fields of settings, with the names that the user typed.

    The field before the first colon is renamed, and in the rest each name with an underscore,
    without its file.
    """
    found = _FIELD.match(message)
    field = found.group() if found is not None else ""
    start = names.get(field, field)
    rest = message[len(field) :]
    return start + _MENTION.sub(lambda one: _mentioned(one.group(), names), rest)


def _mentioned(field: str, names: Mapping[str, str]) -> str:
    return names.get(field, field).rpartition(": ")[2]
