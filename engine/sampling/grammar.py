"""The grammar that a request's answer must follow, as validated plain data without torch."""

from dataclasses import dataclass, field
from typing import Literal

from engine.errors import RequestError

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
MAX_GRAMMAR_CHARS = 65_536


@dataclass(frozen=True)
class Grammar:
    """One grammar; RequestError if it is empty or too long.

    Attributes:
        source: the JSON schema as JSON text, the regular expression, the choices, or a grammar in
            Lark or GBNF notation; empty for ``json_object``.
        param: the field of the request that it comes from, which errors name.
    """

    kind: GrammarKind
    source: str | tuple[str, ...] = ""
    param: str = field(default="structured_outputs", compare=False)

    def __post_init__(self) -> None:
        parts = (self.source,) if isinstance(self.source, str) else self.source
        if self.kind != "json_object" and not (parts and all(parts)):
            raise RequestError(self.param, f"{self.kind} must not be empty")
        length = sum(map(len, parts))
        if length > MAX_GRAMMAR_CHARS:
            message = f"{self.kind} has {length} characters; at most {MAX_GRAMMAR_CHARS} are taken"
            raise RequestError(self.param, message)
        if any(not _is_encodable(part) for part in parts):
            message = f"{self.kind} has a lone surrogate, which UTF-8 cannot encode"
            raise RequestError(self.param, message)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
