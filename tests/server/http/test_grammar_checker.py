"""The process that tries grammars: hostile ones are refused, and it is replaced if it dies."""

import asyncio
import json
import os
import resource
import signal
import socket
import threading
from multiprocessing import Pipe

import pytest

from engine.errors import RequestError
from engine.request import RequestLimits
from engine.sampling.grammar import Grammar
from server.grammar_worker import work
from server.http.errors import ApiError, OverloadedError
from server.http.grammar_checker import GrammarChecker
from server.http.grammar_checker import _answer as known_answer
from tests.models import EOS_ID, VOCAB_SIZE, byte_tokenizer
from tests.server.http.test_generation import until
from tests.server.test_serve import children, ends

LIMITS = RequestLimits(VOCAB_SIZE, 100, frozenset({EOS_ID}))
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
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def checker(folder):
    checker = GrammarChecker(folder, LIMITS)
    checker.start()
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
    check(checker, "regex", "b")
    assert checker._worker[0] is not process


def test_only_the_grammar_that_ends_the_process_is_refused(checker, monkeypatch):
    check(checker, "regex", "a")
    new_worker, replacing, released = checker._new_worker, threading.Event(), threading.Event()
    killed = []

    def deadly(connection, timeout_s):
        if checker._is_ready and len(killed) < 2:
            killed.append(checker._worker[0])
            killed[-1].kill()
            killed[-1].join()
        return known_answer(connection, timeout_s)

    def when_released():
        replacing.set()
        assert released.wait(60)
        return new_worker()

    async def scenario():
        first = asyncio.create_task(checker.check(Grammar("regex", "d", "response_format")))
        await asyncio.to_thread(replacing.wait)
        # others would not wait longer for a process that runs
        monkeypatch.setattr("server.http.grammar_checker._LONGEST_WAIT_S", 0.0)
        others = [asyncio.create_task(checker.check(Grammar("regex", x))) for x in ("x", "y")]
        for _ in range(10):
            await asyncio.sleep(0)
        released.set()
        with pytest.raises(RequestError, match="the process that checks it died twice"):
            await first
        return await asyncio.gather(*others)

    monkeypatch.setattr("server.http.grammar_checker._answer", deadly)
    monkeypatch.setattr(checker, "_new_worker", when_released)
    assert asyncio.run(scenario()) == [None, None]


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


def test_stop_ends_a_trial(folder):
    checker = GrammarChecker(folder, LIMITS)
    kind, source, _ = HOSTILE["a huge divisor"]

    def trials():
        worker = checker._worker
        found = children(worker[0].pid) if worker else []
        return [pid for pid in found if resource.prlimit(pid, resource.RLIMIT_CPU)[0] == 2]

    async def scenario():
        asked = asyncio.create_task(checker.check(Grammar(kind, source, "response_format")))
        await until(trials)
        (pid,) = trials()
        os.kill(pid, signal.SIGSTOP)  # so that it cannot end by itself
        checker.stop()
        with pytest.raises(ApiError, match="the grammar checker failed"):
            await asked
        assert ends(pid)

    asyncio.run(scenario())


def test_stop_ends_a_worker_that_starts(folder, monkeypatch):
    checker = GrammarChecker(folder, LIMITS)
    new_worker, stopping = checker._new_worker, threading.Thread(target=checker.stop)
    workers = []

    def stopped_meanwhile():
        stopping.start()
        workers.append(new_worker())
        return workers[0]

    monkeypatch.setattr(checker, "_new_worker", stopped_meanwhile)
    checker.start()
    checker._thread.shutdown()
    stopping.join()
    assert not workers[0][0].is_alive() and checker._worker is None
    with pytest.raises(EOFError, match="stopped"):
        checker._connected()


def test_a_grammar_that_is_sent_again_is_not_tried_again(folder, monkeypatch):
    tried = []
    monkeypatch.setattr("server.grammar_worker._ANSWER_S", 10**9)
    monkeypatch.setattr("server.grammar_worker.signal.signal", lambda *_: None)
    monkeypatch.setattr(
        "server.grammar_worker.problem", lambda _, grammar: tried.append(grammar) or "no"
    )
    ours, theirs = Pipe()
    grammars = [Grammar("regex", source, "response_format") for source in "abaab"]
    for grammar in grammars:
        ours.send(grammar)
    with socket.socket(fileno=os.dup(ours.fileno())) as sender:
        sender.shutdown(socket.SHUT_WR)
    work(theirs, folder, LIMITS)
    assert [ours.recv() for _ in range(6)] == [None, *["no"] * 5]
    assert tried == grammars[:2]
