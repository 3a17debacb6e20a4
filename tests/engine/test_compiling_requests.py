"""Requests whose grammars are compiled in the background: order, aborts, errors."""

import threading
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch

from engine.compiling_requests import CompilingRequests
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.request import Request
from engine.sampling.grammar import Grammar
from engine.sampling.masks import Grammars
from engine.sampling.params import SamplingParams
from tests.engine.test_company import Multiples, masked_greedy, step_all, tokens
from tests.models import engine_of, greedy, plain_greedy, random_model, tiny_config

COUNT = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return random_model(tiny_config(num_layers=1))


class Blocked(Grammars):
    """Compiles every grammar to a mask, but only when ``released``; knows one wrong grammar."""

    def __init__(self):
        self.released, self.is_begun = threading.Event(), threading.Event()

    def compile(self, grammar):
        self.is_begun.set()
        assert self.released.wait(60)
        if grammar.source == "wrong":
            raise RequestError(grammar.param, "is wrong")
        assert grammar.source != "broken"
        return Multiples()


@pytest.fixture
def grammars():
    blocked = Blocked()
    yield blocked
    blocked.released.set()


@pytest.fixture
def engine(model, grammars):
    config = EngineConfig(kv_cache_gib=0.001, block_size=4)
    return engine_of(model, config, grammars=grammars)


def masked(name, source="any"):
    params = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True)
    return Request(name, (5, 6), params, grammar=Grammar("regex", source))


def test_neighbours_run_while_a_grammar_is_compiled(model, engine, grammars):
    engine.add(masked("masked"))
    engine.add(greedy("free", [1, 2], COUNT))
    assert grammars.is_begun.wait(60) and engine.statistics().num_waiting == 2
    found = []
    while len(found) < COUNT:
        found += [token for output in engine.step().outputs for token in output.token_ids]
    assert found == plain_greedy(model, [1, 2], COUNT)
    assert engine.has_work and engine.statistics().num_waiting == 1
    assert engine.step().outputs == ()
    grammars.released.set()
    assert tokens(step_all(engine)["masked"]) == masked_greedy(model, [5, 6], COUNT)


def test_an_abort_forgets_a_grammar_that_is_compiled(model, engine, grammars):
    engine.add(masked("running"))
    engine.add(masked("queued"))
    assert grammars.is_begun.wait(60)
    engine.abort("running")
    engine.abort("queued")
    assert not engine.has_work
    engine.check_idle()
    # the name is free again, and the late mask is not taken for the new request's
    engine.add(greedy("running", [1, 2], COUNT))
    grammars.released.set()
    assert tokens(step_all(engine)["running"]) == plain_greedy(model, [1, 2], COUNT)


def test_a_wrong_grammar_and_a_failure_end_only_their_requests(model, engine, grammars):
    grammars.released.set()
    for source in ("wrong", "broken", "any"):
        engine.add(masked(source, source))
    found = step_all(engine)
    (wrong,), (broken,) = found["wrong"], found["broken"]
    assert wrong.error == "structured_outputs: is wrong"
    assert wrong.error_param == broken.error_param == "structured_outputs"
    assert "AssertionError" in broken.error
    assert tokens(found["any"]) == masked_greedy(model, [5, 6], COUNT)


def test_an_engine_without_grammars_refuses_them(model):
    plain = engine_of(model, EngineConfig(kv_cache_gib=0.001))
    plain.add(masked("a"))
    (output,) = step_all(plain)["a"]
    assert "has no grammars" in output.error and output.error_param == "structured_outputs"


class Few(Grammars):
    """Grammars with a fixed limit on those that have masks, each of which makes few masks.

    They are compiled while ``may_compile`` is set.
    """

    def __init__(self, count, copies=1):
        self.count, self.copies = count, copies
        self.templates = []  # (grammar, its masks, masks left), the newest last
        self.may_compile = threading.Event()
        self.may_compile.set()

    @property
    def num_free(self):
        return self.count - len(self.used)

    @property
    def used(self):
        return [one for one in self.templates if one[1]]

    def copies_left(self, grammar):
        return next((left for name, _, left in self.used[::-1] if name == grammar), 0)

    def compile(self, grammar):
        assert self.may_compile.wait(60)
        found = next((one for one in self.used[::-1] if one[0] == grammar and one[2]), None)
        if found is None:
            # one grammar may exceed the limit
            assert self.num_free > 0 or not self.used
            found = grammar, WeakSet(), self.copies
        _, masks, left = found
        mask = Multiples()
        masks.add(mask)
        self.templates = [
            *(one for one in self.used if one is not found),
            (grammar, masks, left - 1),
        ]
        return mask


@pytest.mark.parametrize("count", [2, 1, 0])
def test_grammars_that_do_not_fit_in_memory_wait(model, count):
    config = EngineConfig(kv_cache_gib=0.001, block_size=4)
    engine = engine_of(model, config, grammars=Few(count))
    for name in "abcdef":
        engine.add(masked(name))
    assert engine.statistics().num_waiting == 6
    engine.abort("f")
    found = step_all(engine)
    assert sorted(found) == list("abcde")
    expected = masked_greedy(model, [5, 6], COUNT)
    assert all(tokens(outputs) == expected for outputs in found.values())
    engine.check_idle()


def compiled(compiling):
    """The requests that were compiled next."""
    return [one.request.request_id for one in compiling.take(timeout_s=60)]


def test_a_grammar_that_is_in_memory_waits_for_no_other(model):
    grammars = Few(1, copies=2)
    compiling = CompilingRequests(grammars)
    first, second = masked("a"), replace(masked("b"), grammar=Grammar("choice", ("b",)))
    compiling.add(first)
    held = compiling.take(timeout_s=60)
    assert [one.request for one in held] == [first]
    compiling.add(second)
    assert not compiling.take()
    compiling.add(replace(first, request_id="c"))
    assert compiled(compiling) == ["c"]
    assert len(compiling) == 1


def test_requests_that_arrive_together_do_not_take_the_same_copy_of_a_grammar():
    grammars = Few(1, copies=3)
    compiling = CompilingRequests(grammars)
    compiling.add(masked("a"))
    held = compiling.take(timeout_s=60)
    grammars.may_compile.clear()
    for name in "bcde":
        compiling.add(masked(name))
    grammars.may_compile.set()
    names = []
    while len(names) < 2:
        names += compiled(compiling)
    # the masks of b and c are dropped, but a has the grammar
    assert names == ["b", "c"] and not compiling.take() and len(compiling) == 2
    del held
    while len(names) < 4:
        names += compiled(compiling)
    assert names == list("bcde")
