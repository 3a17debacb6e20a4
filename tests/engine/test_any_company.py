"""Random schedules of every kind of request: outputs equal those of a plain loop."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from engine.config import EngineConfig
from engine.executors.executor import make_executor
from engine.request import Request, TokenOutput
from engine.sampling.params import SamplingParams
from engine.sampling.request_rules import RequestRules, SamplingRow
from engine.sampling.sampler import Sampler
from tests.engine.delayed_executor import delayed
from tests.engine.test_company import KV_BYTES, Multiples
from tests.models import EOS_ID, VOCAB_SIZE, engine_of, plain_logits, random_model, tiny_config

EOS_IDS = frozenset({EOS_ID})
NUM_DRAFTS = 3
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 5, "presence_penalty": 1.0, "repetition_penalty": 0.9},
    {"temperature": 0, "logit_bias": ((7, 4.0), (9, -4.0)), "prompt_logprobs": 0},
    {"temperature": 0, "allowed_token_ids": frozenset({1, 2, 3}), "bad_words": ((1, 2), (2, 2))},
    {"temperature": 0, "stop_token_ids": frozenset(range(0, VOCAB_SIZE, 5)), "min_tokens": 1},
]


@dataclass
class Expected:
    """The expected outputs of a request, and its outputs so far."""

    token_ids: list[int]
    logits_LV: torch.Tensor  # logits before each token of prompt and answer, except the first
    prompt: list[int]
    params: SamplingParams
    found: list[int] = field(default_factory=list)
    num_scored: int = 0

    def follow(self, output: TokenOutput) -> None:
        """Compare an output with the next expected tokens and log-probabilities."""
        self._check_logprobs(self.prompt[1:], self.num_scored, output.prompt_logprobs)
        self.num_scored += len(output.prompt_logprobs)
        start = len(self.prompt) - 1 + len(self.found)
        self._check_logprobs(list(output.token_ids), start, output.logprobs, at=start)
        assert len(output.logprobs) == (
            0 if self.params.logprobs is None else len(output.token_ids)
        )
        self.found += output.token_ids
        assert self.found == self.token_ids[: len(self.found)]

    def finish(self) -> None:
        """Assert that the outputs are complete."""
        assert self.found == self.token_ids
        scored = self.params.prompt_logprobs is not None
        assert self.num_scored == (len(self.prompt) - 1 if scored else 0)

    def _check_logprobs(self, ids, first, entries, at=0):
        for place, entry in enumerate(entries, first):
            exact = self.logits_LV[place].double().log_softmax(-1)
            assert entry.token_id == ids[place - at]
            assert entry.logprob == pytest.approx(float(exact[entry.token_id]), abs=1e-4)


def plain_loop(model, prompt: list[int], params: SamplingParams, masked: bool) -> Expected:
    """Recompute the whole sequence, and its logit rules, for every token."""
    ids, mask = list(prompt), Multiples()
    while True:
        logits_LV = plain_logits(model, ids)
        rules = RequestRules(params, len(prompt), EOS_IDS)
        rules.follow(tuple(ids))
        row = SamplingRow(params, params.seed or 0, len(ids), rules)
        bitmask = None
        if masked:
            bitmask = np.zeros((1, -(-VOCAB_SIZE // 32)), dtype=np.uint32)
            mask.fill(bitmask[0])
        (token,) = Sampler().sample(logits_LV[-1:], [row], bitmask)
        mask.accept([token] if masked else [])
        ids.append(token)
        ends = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | EOS_IDS
        if token in ends or len(ids) - len(prompt) == params.max_tokens:
            return Expected(ids[len(prompt) :], logits_LV, prompt, params)


class ScheduleMachine(RuleBasedStateMachine):
    """Adds, steps and aborts requests in any order, with a KV pool that is too small."""

    make = staticmethod(make_executor)
    has_drafts = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)  # a seed without ties between tokens
        self.model = random_model(tiny_config(num_layers=1))
        config = EngineConfig(
            kv_cache_gib=40 * (KV_BYTES // 2) / 2**30,
            block_size=4,
            max_batched_tokens=9,
            max_num_seqs=3,
            **({"speculate": "ngram", "speculate_tokens": NUM_DRAFTS} if self.has_drafts else {}),
        )
        make_drafter = (lambda: self) if self.has_drafts else None
        self.engine = engine_of(self.model, config, EOS_IDS, self.make, make_drafter=make_drafter)
        self.expected: dict[str, Expected] = {}
        self.count = self.drafted = 0
        self.failures: list[Exception] = []

    def draft(self, token_ids, count, worth):
        """Draft the right answer, with an error every other time and nothing every fourth time."""
        try:
            return self._draft(token_ids, count)
        except Exception as error:  # the engine would continue without drafts and hide the error
            self.failures.append(error)
            raise

    def _draft(self, token_ids, count):
        self.drafted += 1
        for expected in self.expected.values():
            whole = expected.prompt + expected.token_ids
            draft_ids = whole[len(token_ids) :][:count]
            if draft_ids and whole[: len(token_ids)] == token_ids and self.drafted % 4:
                wrong = self.drafted % len(draft_ids)
                if self.drafted % 2:
                    draft_ids[wrong] = (draft_ids[wrong] + 1) % VOCAB_SIZE
                return draft_ids
        return []

    @rule(
        length=st.integers(1, 20),
        count=st.integers(1, 15),
        start=st.integers(0, 2),
        priority=st.integers(-1, 1),
        kind=st.sampled_from(KINDS),
        masked=st.booleans(),
    )
    def add(self, length, count, start, priority, kind, masked):
        prompt = [start, *range(10, 9 + length)]
        name, self.count = str(self.count), self.count + 1
        # allowed ids and a mask together might leave no token
        masked = masked and "allowed_token_ids" not in kind
        params = SamplingParams(max_tokens=count, ignore_eos=bool(start), **kind)
        self.expected[name] = plain_loop(self.model, prompt, params, masked)
        request = Request(name, tuple(prompt), params, priority)
        self.engine.add(request, Multiples() if masked else None)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.engine.abort(name)
        del self.expected[name]

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            for output in self.engine.step().outputs:
                assert output.error is None
                self.expected[output.request_id].follow(output)
                if output.finish_reason is not None:
                    self.expected.pop(output.request_id).finish()
            self.engine.check_integrity()

    def teardown(self):
        steps = 0
        while self.engine.has_work:
            self.step(1)
            steps += 1
            assert steps < 5000, "somebody starves"
        assert not self.expected and not self.failures
        assert self.engine.statistics().kv_blocks_used == 0


class DelayedMachine(ScheduleMachine):
    """One step in flight."""

    make = staticmethod(delayed)
    has_drafts = False


class DelayedDraftsMachine(ScheduleMachine):
    """One step in flight, but a sequence with drafts waits for its results."""

    make = staticmethod(delayed)


for machine in (ScheduleMachine, DelayedMachine, DelayedDraftsMachine):
    machine.TestCase.settings = settings(stateful_step_count=30)
TestSchedules = ScheduleMachine.TestCase
TestDelayedSchedules = DelayedMachine.TestCase
TestDelayedSchedulesWithDrafts = DelayedDraftsMachine.TestCase
