"""Translates grammars of every kind to the Lark notation of llguidance."""

import json

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from engine.errors import RequestError
from engine.sampling.grammar import Grammar

# one space, or a new line with its indentation: unbounded whitespace would be an endless answer
_WHITESPACE = r" |\n[ \t]{0,40}"
# a forced text may be written with any tokens that spell it: the library would have to tokenise it
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


def lark_source(grammar: Grammar) -> str:
    """The grammar in Lark notation; its rules and regular expressions are not checked.

    Raises:
        RequestError: a schema is not JSON, or a grammar is neither Lark nor GBNF.
    """
    source = grammar.source
    if grammar.kind == "choice":
        assert not isinstance(source, str)
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in source)
        return f"start: CHOICE\nCHOICE: {options}{_OPTIONS}"
    assert isinstance(source, str)
    if grammar.kind == "regex":
        # \d and \w are ASCII, as in the patterns of JSON schemas
        lark: str = f"start: /{regex_to_lark(source, 'dw')}/"
    elif grammar.kind == "grammar":
        try:
            lark = any_to_lark(source)
        except Exception as error:  # the library raises nothing narrower
            message = f"the grammar is neither Lark nor GBNF: {error}"
            raise RequestError(grammar.param, message) from None
    else:
        text = source if grammar.kind == "json_schema" else '{"type": "object"}'
        lark = f"start: %json {_schema(text, grammar.param)}"
    return lark + _OPTIONS


def _schema(source: str, param: str) -> str:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        message = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise RequestError(param, f"the schema is not valid JSON: {message}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RequestError(param, "the schema must be an object or true")
    return json.dumps(schema | {"x-guidance": {"whitespace_pattern": _WHITESPACE}})
