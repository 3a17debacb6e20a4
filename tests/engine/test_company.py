"""Tokens equal a plain loop under preemption, prefixes, drafts, masks and failures."""

import random

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.model.config import MemoryConfig
from engine.request import Request
from engine.sampling.masks import allowed_drafts
from engine.sampling.params import SamplingParams
from tests.engine.delayed_executor import delayed
from tests.models import (
    VOCAB_SIZE,
    eager,
    engine_of,
    greedy,
    plain_greedy,
    plain_logits,
    random_model,
    run,
    tiny_config,
)

KV_BYTES = tiny_config().kv_bytes_per_token(itemsize=4)
COUNT = 12
# wide enough that threads divide the columns of one token
MEMORY = MemoryConfig(num_heads=2, num_subkeys=8, top_k=4, query_dim=8, value_dim=300)


def engine(model, kv_tokens: int = 4096, drafter=None, num_drafts: int = 0, **config) -> Engine:
    if drafter is not None:
        config |= {"speculate": "ngram", "speculate_tokens": num_drafts}
    settings = EngineConfig(kv_cache_gib=kv_tokens * KV_BYTES / 2**30, **config)
    make_drafter = None if drafter is None else lambda: drafter
    return engine_of(model, settings, make=model.make, make_drafter=make_drafter)


MAKE = {"eager": eager, "cpu": make_executor, "cpu with memory": make_executor}


@pytest.fixture(scope="module", params=[*MAKE, "delayed"])
def model(request):
    torch.manual_seed(1)
    with_memory = {"feed_forward": ("memory_plus", "dense"), "memory": MEMORY}
    made = random_model(tiny_config(**(with_memory if "memory" in request.param else {})))
    made.make = MAKE.get(request.param, delayed)
    return made


def prompts(count: int) -> list[list[int]]:
    drawn = random.Random(3)
    return [[drawn.randrange(256) for _ in range(drawn.randrange(1, 40))] for _ in range(count)]


def step_all(stepped: Engine, outputs: dict[str, list] | None = None) -> dict[str, list]:
    """Step until no work is left; return outputs by request."""
    outputs = {} if outputs is None else outputs
    while stepped.has_work:
        for output in stepped.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        stepped.check_integrity()
    return outputs


def tokens(outputs: list) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_after_preemption(model):
    # sixteen sequences of up to 51 tokens share 96 token slots: most are preempted several times
    crowded = engine(model, kv_tokens=96, block_size=4, max_model_len=64)
    given = prompts(16)
    found = run(crowded, {0: [greedy(str(i), ids, COUNT) for i, ids in enumerate(given)]})
    assert crowded.statistics().preemptions > 3
    assert found == {str(i): plain_greedy(model, ids, COUNT) for i, ids in enumerate(given)}


@pytest.mark.parametrize("block_size", [4, 16])
def test_on_a_whole_a_partial_and_an_evicted_prefix(model, block_size):
    sharing = engine(model, kv_tokens=160, block_size=block_size, max_model_len=96)
    base = prompts(40)[7] * 3
    base = base[:50]
    variants = {
        "first": base,
        "whole": base,
        "longer": [*base, 1, 2, 3],
        "partial": [*base[:30], *[9] * 20],
        "other": [7] * 84,
        "another": [8] * 84,
        "evicted in between": base,
    }
    hits = {}
    for name, ids in variants.items():
        before = sharing.statistics().prefix_hits
        sharing.add(greedy(name, ids, COUNT))
        outputs = step_all(sharing)[name]
        assert tokens(outputs) == plain_greedy(model, ids, COUNT), name
        hits[name] = sharing.statistics().prefix_hits - before
        assert outputs[0].cached_tokens == hits[name]
    full = 50 // block_size * block_size
    assert hits["first"] == 0 and hits["whole"] == hits["longer"] == min(full, 49)
    assert hits["partial"] == 30 // block_size * block_size
    assert hits["evicted in between"] < hits["whole"]


def test_samples_of_one_prompt_equal_separate_requests(model):
    ids = prompts(40)[7] * 2

    def sampled(seed):
        params = SamplingParams(max_tokens=COUNT, temperature=1.0, seed=seed, ignore_eos=True)
        return Request(str(seed), tuple(ids), params)

    together = engine(model)
    for seed in range(5):
        together.add(sampled(seed))
    found = step_all(together)
    assert together.statistics().prefix_hits == 4 * ((len(ids) - 1) // 16 * 16)
    for seed in range(5):
        alone = engine(model)
        alone.add(sampled(seed))
        assert tokens(step_all(alone)[str(seed)]) == tokens(found[str(seed)])
    assert len({tuple(tokens(out)) for out in found.values()}) > 1


class Oracle:
    """A drafter that gives the right answer, with an error every third time."""

    def __init__(self, answers):
        self.answers, self.calls = answers, 0

    def draft(self, token_ids, count, worth):
        self.calls += 1
        for prompt, answer in self.answers:
            whole = prompt + answer
            if whole[: len(token_ids)] == token_ids:
                draft_ids = whole[len(token_ids) :][:count]
                if self.calls % 3 == 0 and draft_ids:
                    draft_ids[len(draft_ids) // 2] = (
                        draft_ids[len(draft_ids) // 2] + 1
                    ) % VOCAB_SIZE
                return draft_ids
        return []


@pytest.mark.parametrize("kv_tokens", [4096, 96])
def test_with_accepted_and_rejected_drafts(model, kv_tokens):
    given = prompts(8)
    answers = [(ids, plain_greedy(model, ids, COUNT)) for ids in given]
    drafter = Oracle(answers)
    config = {"kv_tokens": kv_tokens, "block_size": 4, "max_model_len": 64}
    fast = engine(model, drafter=drafter, num_drafts=4, **config)
    for i, ids in enumerate(given):
        fast.add(greedy(str(i), ids, COUNT))
    steps, found = 0, {}
    while fast.has_work:
        for output in fast.step().outputs:
            found.setdefault(output.request_id, []).append(output)
        fast.check_integrity()
        steps += 1
    assert {name: tokens(out) for name, out in found.items()} == {
        str(i): answer for i, (_, answer) in enumerate(answers)
    }
    assert max(len(output.token_ids) for out in found.values() for output in out) == 5
    if kv_tokens == 4096:
        assert steps < COUNT


def test_drafts_do_not_change_what_a_seed_draws(model):
    params = SamplingParams(max_tokens=COUNT, temperature=1.0, seed=4, ignore_eos=True, logprobs=0)
    request = Request("a", (1, 2, 3), params)
    plain = engine(model)
    plain.add(request)
    expected = step_all(plain)["a"]
    fast = engine(model, drafter=Oracle([([1, 2, 3], tokens(expected))]), num_drafts=3)
    fast.add(request)
    found = step_all(fast)["a"]
    assert tokens(found) == tokens(expected) and len(found) < len(expected)

    def logprobs(outputs):
        return [entry.logprob for output in outputs for entry in output.logprobs]

    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-4)


class Multiples:
    """A mask that alternately allows multiples of 3 and of 4, for ``end`` tokens."""

    is_complete = may_end = False
    failure = None

    def __init__(self, end: int = 1000):
        self.accepted, self.end = [], end

    def fill(self, bitmask):
        if len(self.accepted) < self.end:
            divisor = 3 + len(self.accepted) % 2
            for token in range(0, VOCAB_SIZE, divisor):
                bitmask[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token_ids):
        for token in token_ids:
            assert token % (3 + len(self.accepted) % 2) == 0, "accepted what was not allowed"
            self.accepted.append(token)

    def rollback(self, count):
        del self.accepted[len(self.accepted) - count :]


def masked_greedy(model, prompt, count):
    ids = list(prompt)
    for at in range(count):
        logits = plain_logits(model, ids)[-1].clone()
        logits[[t for t in range(VOCAB_SIZE) if t % (3 + at % 2)]] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("with_drafts", [False, True])
def test_a_mask_applies_only_to_its_request(model, with_drafts):
    expected = masked_greedy(model, [5, 6], COUNT)
    neighbours = {str(i): ids for i, ids in enumerate(prompts(4))}
    answers = [([5, 6], expected)] if with_drafts else []
    mixed = engine(model, drafter=Oracle(answers), num_drafts=3)
    mask = Multiples()
    mixed.add(greedy("masked", [5, 6], COUNT), mask)
    for name, ids in neighbours.items():
        mixed.add(greedy(name, ids, COUNT))
    found = {name: tokens(out) for name, out in step_all(mixed).items()}
    assert found.pop("masked") == expected == mask.accepted
    assert found == {name: plain_greedy(model, ids, COUNT) for name, ids in neighbours.items()}


def test_a_mask_that_allows_nothing_ends_only_its_request(model):
    mixed = engine(model)
    mixed.add(greedy("masked", [5, 6], COUNT), Multiples(end=3))
    mixed.add(greedy("free", [5, 6], COUNT))
    found = step_all(mixed)
    assert len(tokens(found["masked"])) == 3
    assert found["masked"][-1].error.startswith("penalties, bans and masks leave no token")
    assert tokens(found["free"]) == plain_greedy(model, [5, 6], COUNT)


class Failing(Multiples):
    """A mask that fails after three tokens."""

    def fill(self, bitmask):
        assert len(self.accepted) < 3
        super().fill(bitmask)


def test_a_failing_mask_or_drafter_does_not_affect_others(model):
    class Broken:
        def draft(self, token_ids, count, worth):
            raise ValueError("no idea")

    mixed = engine(model, drafter=Broken(), num_drafts=2)
    mixed.add(greedy("masked", [5, 6], COUNT), Failing())
    mixed.add(greedy("free", [5, 6], COUNT))
    found = step_all(mixed)
    assert len(tokens(found["masked"])) == 3
    assert found["masked"][-1].error.startswith("penalties, bans and masks leave no token")
    assert tokens(found["free"]) == plain_greedy(model, [5, 6], COUNT)


def test_rules_that_leave_no_token_end_only_their_request(model):
    params = SamplingParams(
        max_tokens=COUNT, allowed_token_ids=frozenset({7}), bad_words=((7, 7),), ignore_eos=True
    )
    mixed = engine(model)
    mixed.add(Request("stuck", (5, 6), params))
    mixed.add(greedy("free", [5, 6], COUNT))
    found = step_all(mixed)
    assert tokens(found["stuck"]) == [7] and found["stuck"][-1].finish_reason == "error"
    assert tokens(found["free"]) == plain_greedy(model, [5, 6], COUNT)


class Breaking(Multiples):
    """A mask that fails after two tokens."""

    def fill(self, bitmask):
        assert len(self.accepted) < 2
        super().fill(bitmask)


def test_a_mask_that_fails_on_drafts_is_rolled_back():
    mask = Breaking()
    with pytest.raises(AssertionError):
        allowed_drafts(mask, [3, 4, 9], VOCAB_SIZE)
    assert mask.accepted == []


def test_accepted_drafts_with_an_end_may_cross_a_block(model):
    answer = plain_greedy(model, [5, 6], COUNT)
    stop = next(token for at, token in enumerate(answer) if at > 0 and token not in answer[:at])
    fast = engine(model, drafter=Oracle([([5, 6], answer)]), num_drafts=10, block_size=4)
    params = SamplingParams(max_tokens=COUNT, temperature=0, stop_token_ids=frozenset({stop}))
    fast.add(Request("a", (5, 6), params))
    assert tokens(step_all(fast)["a"]) == answer[: answer.index(stop) + 1]


def test_drafts_are_cut_at_the_first_token_that_a_mask_forbids():
    mask = Multiples(end=3)
    assert allowed_drafts(mask, [3, 4, 9], VOCAB_SIZE) == [3, 4]
    assert allowed_drafts(mask, [3, 5], VOCAB_SIZE) == [3]
    assert mask.accepted == []


def test_prompt_scores_equal_the_full_softmax_for_any_chunks(model):
    ids = prompts(40)[7] * 2
    exact = plain_logits(model, ids).double().log_softmax(-1)
    for budget in (512, 7):
        scoring = engine(model, max_batched_tokens=budget, max_num_seqs=7)
        for name in ("first", "second"):
            params = SamplingParams(max_tokens=0, prompt_logprobs=3)
            scoring.add(Request(name, tuple(ids), params))
        for (output,) in step_all(scoring).values():
            assert (output.finish_reason, output.token_ids) == ("length", ())
            assert [entry.token_id for entry in output.prompt_logprobs] == ids[1:]
            for at, entry in enumerate(output.prompt_logprobs):
                assert entry.logprob == pytest.approx(float(exact[at, ids[at + 1]]), abs=1e-4)
                assert entry.rank == int((exact[at] > exact[at, ids[at + 1]]).sum()) + 1
                best = exact[at].topk(3).values.tolist()
                assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-4)


def test_preempted_prompts_are_scored_once(model):
    given = prompts(12)
    crowded = engine(model, kv_tokens=96, block_size=4, max_model_len=64)
    params = SamplingParams(max_tokens=COUNT, temperature=0, ignore_eos=True, prompt_logprobs=0)
    for i, ids in enumerate(given):
        crowded.add(Request(str(i), tuple(ids), params))
    found = step_all(crowded)
    assert crowded.statistics().preemptions > 3
    for i, ids in enumerate(given):
        scored = [entry for output in found[str(i)] for entry in output.prompt_logprobs]
        assert [entry.token_id for entry in scored] == ids[1:]
        exact = plain_logits(model, ids).double().log_softmax(-1)
        expected = [float(exact[at, token]) for at, token in enumerate(ids[1:])]
        assert [entry.logprob for entry in scored] == pytest.approx(expected, abs=1e-4)


def test_a_reused_request_name_gets_new_rules(model):
    reused = engine(model)
    for forced in (7, 8):
        params = SamplingParams(max_tokens=3, temperature=0, logit_bias=((forced, 100.0),))
        reused.add(Request("same", (5, 6), params))
        assert tokens(step_all(reused)["same"]) == [forced] * 3
