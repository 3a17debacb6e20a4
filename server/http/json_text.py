"""JSON text of answers and server-sent events; large values are written in pieces."""

import json
from typing import Any

from server.http.errors import EngineError

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# list elements that are encoded at once, while no other thread runs
_PIECE = 64
# deepest dicts whose values are written one by one: those of choices and log-probabilities
_DEEPEST = 4
# line breaks of Unicode, at which some clients split events
_LINE_BREAKS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


def json_text(value: Any) -> str:
    """``value`` as JSON.

    Raises:
        EngineError: a number is NaN or infinite.
    """
    try:
        return _ENCODER.encode(value)
    except ValueError:
        raise _not_a_number() from None


def large_json_text(value: Any) -> str:
    """The same as ``json_text``, for a thread: it lets other threads run every few milliseconds."""
    try:
        return _in_pieces(value, 0)
    except ValueError:
        raise _not_a_number() from None


def event(data: str) -> bytes:
    """A server-sent event with this JSON text."""
    if not data.isascii():
        for mark, escaped in _LINE_BREAKS.items():
            data = data.replace(mark, escaped)
    return f"data: {data}\n\n".encode()


def _in_pieces(value: Any, depth: int) -> str:
    if isinstance(value, dict) and depth < _DEEPEST:
        pairs = (f"{_ENCODER.encode(k)}:{_in_pieces(v, depth + 1)}" for k, v in value.items())
        return f"{{{','.join(pairs)}}}"
    if not isinstance(value, list | tuple):
        return _ENCODER.encode(value)
    if depth == 1 and value and isinstance(value[0], dict):
        return f"[{','.join(_in_pieces(choice, depth + 1) for choice in value)}]"
    pieces = (value[start : start + _PIECE] for start in range(0, len(value), _PIECE))
    return f"[{','.join(_ENCODER.encode(piece)[1:-1] for piece in pieces)}]"


def _not_a_number() -> EngineError:
    return EngineError("a number of the answer is not finite")
