"""Random schedules of requests with row patches that come and go: prefixes never cross sets."""

import gc
from functools import cache

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.executors.executor import make_executor
from engine.model.row_patches import RowPatch
from tests.engine.delayed_executor import delayed
from tests.engine.patches import patch_of
from tests.engine.test_patched_requests import asks, changed_model, model_of
from tests.models import engine_of, plain_greedy, tiny_config

NUM_PATCHES, MOST_TOKENS = 3, 6
SCALES = (1.0, -0.5)
KV_BYTES = tiny_config(num_layers=3).kv_bytes_per_token(itemsize=4)


@cache
def patched_model():
    return model_of()


@cache
def patch(number: int) -> RowPatch:
    return patch_of(patched_model(), number)


def new_patch(number: int) -> RowPatch:
    """As ``patch`` returns, but nothing else keeps it in memory."""
    return RowPatch(patch(number).content_hash, patch(number).layers)


@cache
def wanted(uses: tuple[tuple[int, float], ...], length: int, start: int) -> tuple[int, ...]:
    """The answer of a model whose tables were changed."""
    changed = changed_model(patched_model(), *((patch(number), scale) for number, scale in uses))
    return tuple(plain_greedy(changed, prompt_of(length, start), MOST_TOKENS))


def prompt_of(length: int, start: int) -> list[int]:
    """Prompts of one start are prefixes of each other."""
    return [start, *range(10, 9 + length)]


class PatchMachine(RuleBasedStateMachine):
    """Loads and removes patches, and runs requests with any sets of those that are loaded."""

    make = staticmethod(make_executor)

    def __init__(self):
        super().__init__()
        # two of the longest sequences take 12 blocks, and there are 10
        config = EngineConfig(
            block_size=4, kv_cache_gib=40 * KV_BYTES / 2**30, max_batched_tokens=9, max_num_seqs=3
        )
        self.engine = engine_of(patched_model(), config, make=self.make)
        self.loaded: set[int] = set()
        self.waiting: dict[str, list[int]] = {}
        self.count = 0

    @rule(number=st.integers(1, NUM_PATCHES))
    def load(self, number):
        self.engine.patches.put(new_patch(number))
        self.loaded.add(number)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def remove(self, data):
        number = data.draw(st.sampled_from(sorted(self.loaded)))
        self.engine.patches.remove(patch(number).content_hash)
        self.loaded.remove(number)
        with pytest.raises(RequestError, match="is not loaded"):
            self.engine.add(asks("late", 1, (patch(number), 1.0)))

    @rule(
        data=st.data(),
        length=st.sampled_from((1, 6, 11, 17)),
        count=st.integers(1, MOST_TOKENS),
        start=st.integers(0, 1),
    )
    def add(self, data, length, count, start):
        numbers = [number for number in sorted(self.loaded) if data.draw(st.booleans())]
        uses = tuple((number, data.draw(st.sampled_from(SCALES))) for number in numbers)
        self.ask(uses, length, count, start)

    def ask(self, uses, length, count, start):
        name, self.count = str(self.count), self.count + 1
        self.waiting[name] = list(wanted(uses, length, start)[:count])
        used = [(patch(number), scale) for number, scale in uses]
        self.engine.add(asks(name, count, *used, prompt=prompt_of(length, start)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        self.engine.abort(name)
        del self.waiting[name]

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step().outputs:
                assert output.error is None
                missing = self.waiting[output.request_id]
                for token in output.token_ids:
                    assert token == missing.pop(0)
                if output.finish_reason is not None:
                    assert self.waiting.pop(output.request_id) == []
            self.engine.check_integrity()

    def teardown(self):
        while self.engine.has_work:
            self.step(1)
        assert not self.waiting
        if self.engine.patches.num_alive != len(self.loaded):
            gc.collect()
        assert self.engine.patches.num_alive == len(self.loaded)


class DelayedPatchMachine(PatchMachine):
    """One step in flight."""

    make = staticmethod(delayed)


def test_answers_of_different_sets_differ():
    sets = [(), ((1, 1.0),), ((2, -0.5),), ((1, 1.0), (2, 1.0)), ((1, -0.5), (2, 1.0), (3, 1.0))]
    assert len({wanted(uses, 17, 0) for uses in sets}) == len(sets)


@pytest.mark.parametrize("machine", [PatchMachine, DelayedPatchMachine])
def test_sequences_with_removed_patches_are_preempted_and_finish(machine):
    served = machine()
    for number in (1, 2, 3):
        served.load(number)
        served.ask(((number, 1.0),), 17, MOST_TOKENS, start=number % 2)
        served.engine.patches.remove(patch(number).content_hash)
        served.loaded.remove(number)
    assert served.engine.patches.num_alive == 3
    served.teardown()
    assert served.engine.statistics().preemptions


for machine in (PatchMachine, DelayedPatchMachine):
    machine.TestCase.settings = settings(stateful_step_count=30)
TestPatchSchedules = PatchMachine.TestCase
TestDelayedPatchSchedules = DelayedPatchMachine.TestCase
