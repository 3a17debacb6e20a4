"""Grammars whose answers end by themselves, and independent checks of the answers."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from engine.sampling.grammar import Grammar

_FILE = Path(__file__).parent / "cases.json"


class GrammarCase(NamedTuple):
    """One grammar; ``follows`` checks a text without the library that makes masks."""

    name: str
    grammar: Grammar
    source: Any
    pattern: str | None

    def follows(self, text: str) -> bool:
        """Whether the whole text follows the grammar."""
        if self.grammar.kind == "json_schema":
            checker = jsonschema.Draft202012Validator(
                self.source, format_checker=jsonschema.FormatChecker()
            )
            try:
                return bool(checker.is_valid(json.loads(text)))
            except ValueError:
                return False
        if self.grammar.kind == "choice":
            return text in self.source
        return re.fullmatch(self.pattern or self.source, text) is not None


def grammar_cases() -> list[GrammarCase]:
    """The cases of ``cases.json``."""
    return [_case(**fields) for fields in json.loads(_FILE.read_text(encoding="utf-8"))]


def _case(name: str, kind: Any, source: Any, check: str | None = None) -> GrammarCase:
    text = json.dumps(source) if kind == "json_schema" else source
    return GrammarCase(
        name, Grammar(kind, tuple(text) if isinstance(text, list) else text), source, check
    )
