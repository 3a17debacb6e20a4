"""The process that tries grammars: hostile ones are refused, and it is replaced if it dies."""

import asyncio
import json

import pytest

from engine.errors import RequestError
from engine.request import RequestLimits
from engine.sampling.grammar import Grammar
from server.http.errors import ApiError, OverloadedError
from server.http.grammar_checker import GrammarChecker
from tests.models import EOS_ID, VOCAB_SIZE, byte_tokenizer

COMPLEX = "too complex"
ITEM_CHAIN = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1300)}
HOSTILE = {
    "deep recursion": ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "nested|recursion"),
    "a chain of references": (
        "json_schema",
        json.dumps({"$defs": ITEM_CHAIN | {"d1300": {}}, "$ref": "#/$defs/d0"}),
        COMPLEX,
    ),
    "a chain of rules": (
        "grammar",
        "start: r0\n" + "".join(f"r{i}: r{i + 1} |\n" for i in range(4000)) + 'r4000: "a"',
        COMPLEX,
    ),
    "a huge enum": (
        "json_schema",
        json.dumps({"enum": [f"v{i * 7919 % 10007}" for i in range(9000)]}),
        "at most 65536",
    ),
    "a huge divisor": ("json_schema", '{"type": "integer", "multipleOf": 99999989}', COMPLEX),
    "a catastrophic expression": ("regex", "(a?b?)" * 9000, COMPLEX),
    "an intersection of patterns": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(300)]}),
        COMPLEX,
    ),
    "an ambiguous grammar": (
        "grammar",
        "start: " + '"a"? ' * 9000,
        f"{COMPLEX}|Too many items",
    ),
}


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    checker = GrammarChecker(folder, RequestLimits(VOCAB_SIZE, 100, frozenset({EOS_ID})))
    yield checker
    checker.stop()


def check(checker, kind, source):
    asyncio.run(checker.check(Grammar(kind, source, "response_format")))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused(checker, name):
    kind, source, message = HOSTILE[name]
    with pytest.raises(RequestError, match=message) as caught:
        check(checker, kind, source)
    assert caught.value.param == "response_format"


def test_a_wrong_grammar_is_refused_with_its_reason(checker):
    with pytest.raises(RequestError, match="response_format: wrong regex: .*unclosed group"):
        check(checker, "regex", "(a")


def test_a_process_that_died_is_replaced(checker):
    check(checker, "regex", "a")
    process, _ = checker._worker
    process.kill()
    process.join()
    check(checker, "regex", "a")  # it is known
    with pytest.raises(ApiError, match="the grammar checker failed") as caught:
        check(checker, "regex", "b")
    assert caught.value.status == 500
    check(checker, "regex", "b")


def test_a_check_that_waits_too_long_is_an_overload(checker, monkeypatch):
    check(checker, "regex", "c")
    monkeypatch.setattr("server.http.grammar_checker._LONGEST_WAIT_S", 0.0)
    with pytest.raises(OverloadedError):
        check(checker, "regex", "d")
    check(checker, "regex", "c")


def test_only_the_last_passed_grammars_are_known(checker, monkeypatch):
    monkeypatch.setattr("server.http.grammar_checker._MOST_PASSED", 2)
    for source in ("e", "f", "e", "g"):
        check(checker, "regex", source)
    assert [grammar.source for grammar in checker._passed][-2:] == ["e", "g"]
