"""One step in flight: the next one is planned and launched before the tokens of this are known."""

import pytest
import torch

from engine.config import EngineConfig
from engine.executors.batch import DeviceLostError
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.scheduling import batching
from tests.engine.delayed_executor import delayed
from tests.engine.test_company import Multiples, step_all, tokens
from tests.models import (
    engine_of,
    greedy,
    plain_greedy,
    random_model,
    tiny_config,
)

KV_BYTES = tiny_config().kv_bytes_per_token(itemsize=4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return random_model(tiny_config())


def engine(model, eos_ids=frozenset(), kv_tokens: int = 4096, **config):
    settings = EngineConfig(kv_cache_gib=kv_tokens * KV_BYTES / 2**30, **config)
    return engine_of(model, settings, eos_ids, delayed)


def test_a_step_is_launched_before_the_one_before_it_is_waited_for(model):
    ahead = engine(model)
    ahead.add(greedy("a", [1, 2, 3], 5))
    found = [len(ahead.step().outputs) for _ in range(6)]
    # the first step only launches; the sixth has nothing to launch and waits for the fifth
    assert found == [0, 1, 1, 1, 1, 1] and not ahead.has_work
    assert ahead._executor.largest_ahead == 1


def test_speculation_runs_ahead_unless_the_text_repeats_itself(model):
    ahead = engine(model, speculate="ngram")
    ahead.add(greedy("a", [1, 2, 3], 5))
    found = [len(ahead.step().outputs) for _ in range(6)]
    assert found == [0, 1, 1, 1, 1, 1] and ahead.statistics().drafts == 0
    waiting = engine(model, speculate="ngram")
    waiting.add(greedy("b", [7] * 9, 12, allowed_token_ids=frozenset({7})))
    assert tokens(step_all(waiting)["b"]) == [7] * 12
    assert waiting._executor.largest_ahead == 0 and waiting.statistics().accepted_tokens > 0


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.3}, {"bad_words": ((7, 8),)}])
def test_rules_about_earlier_tokens_wait_for_them(model, sampling):
    waiting = engine(model)
    waiting.add(greedy("a", [1, 2, 3], 4, **sampling))
    step_all(waiting)
    assert waiting._executor.largest_ahead == 0


def test_a_mask_waits_and_does_not_hold_up_its_neighbours(model):
    mixed = engine(model)
    mixed.add(greedy("masked", [5, 6], 4), Multiples())
    mixed.add(greedy("free", [1, 2, 3], 8))
    order = []
    while mixed.has_work:
        order += [output.request_id for output in mixed.step().outputs]
    # while the mask waits for its token, the other sequence runs
    assert order[:6] == ["masked", "free", "free", "masked", "free", "free"]


def test_a_step_behind_an_end_token_is_wasted_and_harmless(model):
    answer = plain_greedy(model, [1, 2, 3], 12)
    eos = next(token for token in answer[1:] if token != answer[0])
    cut = answer[: answer.index(eos) + 1]
    ending = engine(model, frozenset({eos}), kv_tokens=128, block_size=4, max_model_len=64)
    ending.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=12, temperature=0)))
    ending.add(greedy("b", [9] * 30, 20))
    found = step_all(ending)
    assert tokens(found["a"]) == cut and found["a"][-1].finish_reason == "stop"
    assert tokens(found["b"]) == plain_greedy(model, [9] * 30, 20)
    # blocks of the ended sequence can be shared: they hold no wasted token
    conversation = [1, 2, 3, *cut, 4, 5]
    ending.add(greedy("c", conversation, 6))
    assert tokens(step_all(ending)["c"]) == plain_greedy(model, conversation, 6)


def test_drafts_keep_their_blocks_while_an_earlier_chunk_is_settled(model):
    prompt, neighbour = [1, 2, 3, 4, 5, 6, 7], [9, 8, 7]
    answers = {"a": plain_greedy(model, prompt, 9), "b": plain_greedy(model, neighbour, 9)}
    whole = prompt + answers["a"]

    class Right:
        def draft(self, token_ids, count, worth):
            length = len(token_ids)
            return whole[length:][:count] if token_ids == whole[:length] else []

    drafting = engine_of(
        model,
        EngineConfig(
            kv_cache_gib=64 * KV_BYTES / 2**30,
            block_size=4,
            max_batched_tokens=6,
            max_num_seqs=2,
            max_model_len=32,
            speculate="ngram",
            speculate_tokens=4,
        ),
        make=delayed,
        make_drafter=Right,
    )
    drafting.add(greedy("a", prompt, 9))
    found = [*drafting.step().outputs]
    # the prompt's last token, with drafts in a further block, is launched behind the others
    found += drafting.step().outputs
    drafting.add(greedy("b", neighbour, 9))
    while drafting.has_work:
        found += drafting.step().outputs
        drafting.check_integrity()
    assert drafting.statistics().accepted_tokens == 7
    assert {
        name: [token for one in found if one.request_id == name for token in one.token_ids]
        for name in answers
    } == answers


def test_a_name_can_be_used_again_while_its_aborted_step_is_in_flight(model):
    reused = engine(model)
    reused.add(greedy("same", [1, 2, 3], 9))
    reused.step(), reused.step()
    reused.abort("same")
    reused.check_integrity()
    assert reused.has_work
    reused.add(greedy("same", [4, 5], 6))
    assert tokens(step_all(reused)["same"]) == plain_greedy(model, [4, 5], 6)


def test_an_abort_of_all_requests_leaves_a_step_to_settle(model):
    aborted = engine(model)
    aborted.add(greedy("a", [1, 2, 3], 9))
    aborted.step()
    aborted.abort("a")
    assert aborted.has_work and aborted.step().outputs == () and not aborted.has_work
    aborted.check_idle()


def test_a_sequence_is_settled_before_it_is_preempted(model):
    crowded = engine(model, kv_tokens=48, block_size=4, max_model_len=40)
    given = {"a": [1] * 10, "b": [2] * 10, "c": [3] * 10}
    for name, ids in given.items():
        crowded.add(greedy(name, ids, 24))
    found = step_all(crowded)
    assert crowded.statistics().preemptions >= 2
    assert {name: tokens(out) for name, out in found.items()} == {
        name: plain_greedy(model, ids, 24) for name, ids in given.items()
    }


def test_a_launch_that_fails_ends_only_its_request_after_earlier_steps(model, monkeypatch):
    broken = engine(model)
    broken.add(greedy("good", [1, 2, 3], 12))
    broken.step(), broken.step()
    launch = broken._executor.launch

    def fail(batch):
        assert not any(row.params.max_tokens == 5 for row in batch.rows)
        return launch(batch)

    monkeypatch.setattr(broken._executor, "launch", fail)
    broken.add(greedy("bad", [4, 5], 5))
    found = step_all(broken, {"good": []})
    assert found["bad"][0].error == "AssertionError in the engine"
    # the first token came before
    assert tokens(found["good"]) == plain_greedy(model, [1, 2, 3], 12)[1:]


def test_a_chunk_that_never_ran_is_not_shared(model, monkeypatch):
    # a prompt's second chunk fails to launch while its first five tokens are in flight
    broken = engine(model, block_size=4, max_batched_tokens=8, max_num_seqs=8)
    launch, prompt = broken._executor.launch, [7] * 16

    def fail(batch):
        assert not ((batch.ids_T == 7) & (batch.positions_T >= 5)).any()
        return launch(batch)

    monkeypatch.setattr(broken._executor, "launch", fail)
    broken.add(greedy("good", [1, 2, 3], 4))
    broken.add(greedy("bad", prompt, 3))
    assert step_all(broken)["bad"][-1].error == "AssertionError in the engine"
    monkeypatch.undo()
    broken.add(greedy("again", prompt, 5))
    found = step_all(broken)["again"]
    assert tokens(found) == plain_greedy(model, prompt, 5)
    assert found[0].cached_tokens == 4


def test_rules_are_kept_while_a_sequence_waits_for_its_token(model, monkeypatch):
    made = []
    plain = batching.RequestRules
    monkeypatch.setattr(
        batching, "RequestRules", lambda *arguments: made.append(1) or plain(*arguments)
    )
    ruled = engine(model)
    ruled.add(greedy("ruled", [1, 2, 3], 8, repetition_penalty=1.3))
    ruled.add(greedy("free", [4, 5], 16))
    step_all(ruled)
    assert len(made) == 1


def test_a_lost_device_ends_the_engine(model, monkeypatch):
    lost = engine(model)
    lost.add(greedy("a", [1, 2, 3], 5))
    lost.step()

    def wait(step):
        raise DeviceLostError("an illegal memory access")

    monkeypatch.setattr(lost._executor, "run", wait)
    with pytest.raises(DeviceLostError, match="illegal"):
        lost.step()
