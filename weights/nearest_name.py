"""Suggests the known name nearest to a mistyped one, for error messages."""

import difflib
from collections.abc import Iterable

# a longer name is not a typing error, and would take long to compare
_LONGEST = 64


def suggestion(name: str, known: Iterable[str]) -> str:
    """Text to append to an error: "; did you mean X?", or nothing if no name is near.

    Names may have a section: ``run.lr`` is near ``optimizer.lr``.
    """
    if len(name) > _LONGEST:
        return ""
    names = sorted(known)
    last = name.rpartition(".")[2]
    elsewhere = [one for one in names if one.rpartition(".")[2] == last]
    found = elsewhere or difflib.get_close_matches(name, names, 1, 0.7)
    return f"; did you mean {found[0]}?" if found else ""
