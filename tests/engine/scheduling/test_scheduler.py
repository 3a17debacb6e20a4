"""The scheduler: order of plans, preemption, prefixes, drafts and ends of sequences."""

import pytest

from engine.config import EngineConfig
from engine.request import Request, RequestError
from engine.sampling.params import SamplingParams
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.scheduler import PRIORITY_STEPS, Scheduler
from engine.scheduling.speculation import Speculation
from engine.scheduling.step_plan import ChunkResult, StepPlan

EOS = 9


class Scripted:
    """A drafter that drafts what a function of the tokens returns."""

    def __init__(self, propose):
        self._propose = propose

    def draft(self, token_ids, count, worth):
        return self._propose(token_ids)[:count]


def scheduler(num_blocks=64, propose=None, **config) -> Scheduler:
    settings = EngineConfig(**({"max_num_seqs": 4, "max_batched_tokens": 10} | config))
    pool, speculation = BlockPool(num_blocks, block_size=4), None
    if propose is not None:
        speculation = Speculation(lambda: Scripted(propose), 8, balance_rows=8, vocab_size=10)
    return Scheduler(settings, pool, frozenset({EOS}), speculation)


def request(name: str, length: int, max_tokens: int = 5, priority=0, salt="", **sampling):
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    # prompts share a prefix only if the names begin with the same letter
    first = ord(name[0]) * 1000
    return Request(name, tuple(range(first, first + length)), params, priority, salt)


def results(plan: StepPlan, token: int = 1) -> dict[str, ChunkResult]:
    """Results of a plan with ``token`` at every sampled position."""
    return {c.request_id: ChunkResult((token,) * c.num_sampled) for c in plan.chunks}


def step(queue: Scheduler, token: int = 1) -> list[tuple[str, int, int, bool]]:
    """Run one step; return (request, start, number of tokens, whether it samples) by chunk."""
    plan = queue.plan()
    queue.begin(plan)
    queue.commit(plan, results(plan, token))
    queue.check_integrity()
    return [(c.request_id, c.start, len(c.token_ids), c.samples) for c in plan.chunks]


def names(queue: Scheduler) -> list[str]:
    return [chunk[0] for chunk in step(queue)]


def test_a_long_prompt_runs_in_chunks_within_the_budget():
    queue = scheduler()
    queue.add(request("a", 23), seed=0)
    assert step(queue) == [("a", 0, 10, False)]
    assert step(queue) == [("a", 10, 10, False)]
    assert step(queue) == [("a", 20, 3, True)]
    assert step(queue) == [("a", 23, 1, True)]


def test_decodes_come_first_and_prompts_share_what_is_left():
    queue = scheduler()
    queue.add(request("a", 2), seed=0)
    step(queue)
    queue.add(request("b", 25), seed=0)
    queue.add(request("c", 3), seed=0)
    assert step(queue) == [("a", 2, 1, True), ("b", 0, 9, False)]
    assert step(queue) == [("a", 3, 1, True), ("b", 9, 9, False)]
    assert step(queue) == [("a", 4, 1, True), ("b", 18, 7, True), ("c", 0, 2, False)]


def test_no_more_sequences_run_than_configured():
    queue = scheduler(max_num_seqs=2)
    for name in "abc":
        queue.add(request(name, 1, max_tokens=1), seed=0)
    assert names(queue) == ["a", "b"]
    assert (queue.num_running, queue.num_waiting) == (0, 1)
    assert names(queue) == ["c"]
    assert not queue.has_work


def test_without_free_blocks_the_newest_sequence_is_preempted_and_recomputed():
    queue = scheduler(num_blocks=4)
    queue.add(request("a", 7, max_tokens=6), seed=0)
    queue.add(request("b", 3, max_tokens=9), seed=0)
    assert names(queue) == ["a", "b"]
    assert names(queue) == ["a", "b"]
    # a needs a third block and b a second; only one is free, and b is newer
    assert names(queue) == ["a"] and queue.preemptions == 1
    while queue.num_running == 1:
        assert names(queue) == ["a"]
        if not queue.num_running:
            break
    again = step(queue)
    assert again == [("b", 0, 5, True)] or again == [("b", 4, 1, True)]


def test_a_small_request_does_not_overtake_one_that_waits_for_blocks():
    queue = scheduler(num_blocks=4)
    queue.add(request("a", 8, max_tokens=4), seed=0)
    queue.add(request("b", 12, max_tokens=2), seed=0)
    queue.add(request("c", 1, max_tokens=1), seed=0)
    assert names(queue) == ["a"]
    while queue.num_running:
        assert queue.num_waiting == 2
        names(queue)
    assert names(queue) == ["b"]


def test_a_smaller_priority_value_runs_sooner_and_is_preempted_later():
    queue = scheduler(num_blocks=4, max_num_seqs=2)
    queue.add(request("low", 4, max_tokens=9, priority=5), seed=0)
    queue.add(request("mid", 4, max_tokens=9, priority=1), seed=0)
    queue.add(request("high", 4, max_tokens=9, priority=-5), seed=0)
    assert names(queue) == ["high", "mid"]
    while queue.preemptions == 0:
        step(queue)
    assert names(queue) == ["high"]


def test_waiting_is_bounded():
    queue = scheduler(max_num_seqs=1)
    queue.add(request("patient", 1, max_tokens=1, priority=1), seed=0)
    waited = 0
    while True:
        queue.add(request(f"x{waited}", 1, max_tokens=1, priority=0), seed=0)
        if names(queue) == ["patient"]:
            break
        waited += 1
        assert waited <= PRIORITY_STEPS
    assert waited == PRIORITY_STEPS


def test_a_priority_has_bounds():
    with pytest.raises(RequestError, match="^priority: "):
        request("a", 1, priority=101)


def test_a_computed_prefix_is_reused():
    queue = scheduler()
    queue.add(request("a", 9, max_tokens=1), seed=0)
    assert step(queue) == [("a", 0, 9, True)]
    queue.add(request("a again", 9, max_tokens=1), seed=0)
    assert step(queue) == [("a again", 8, 1, True)]
    queue.add(request("a longer", 11, max_tokens=1), seed=0)
    assert step(queue) == [("a longer", 8, 3, True)]
    # the last token of a prompt always runs, even if its block is cached
    queue.add(request("a shorter", 8, max_tokens=1), seed=0)
    assert step(queue) == [("a shorter", 4, 4, True)]
    assert (queue.prefix_queries, queue.prefix_hits) == (9 + 9 + 11 + 8, 8 + 8 + 4)


def test_an_answer_can_be_reused_as_a_prefix():
    queue = scheduler()
    queue.add(request("a", 7, max_tokens=2), seed=0)
    step(queue, token=1)
    step(queue, token=2)
    conversation = Request("b", (*request("a", 7).prompt_ids, 1, 2, 3), SamplingParams())
    queue.add(conversation, seed=0)
    assert step(queue) == [("b", 8, 2, True)]


def test_different_salts_share_no_prefix():
    queue = scheduler()
    for name, salt in (("a", "mine"), ("a 2", "yours"), ("a 3", "mine")):
        queue.add(request(name, 9, max_tokens=1, salt=salt), seed=0)
        starts = [start for _, start, _, _ in step(queue)]
        assert starts == [8 if name == "a 3" else 0]


def test_equal_prompts_that_arrive_together_are_computed_once():
    queue = scheduler(max_batched_tokens=20)
    for i in range(3):
        queue.add(request(f"a{i}", 9, max_tokens=3), seed=0)
    queue.add(request("b", 2, max_tokens=3), seed=0)
    # requests with the same prompt wait for the first one; others do not wait
    assert step(queue) == [("a0", 0, 9, True), ("b", 0, 2, True)]
    assert step(queue)[2:] == [("a1", 8, 1, True), ("a2", 8, 1, True)]


def test_a_request_that_waits_for_a_prefix_continues_if_its_owner_is_gone():
    queue = scheduler(max_batched_tokens=4)
    queue.add(request("a0", 9), seed=0)
    queue.add(request("a1", 9), seed=0)
    assert step(queue) == [("a0", 0, 4, False)]
    queue.abort("a0")
    assert step(queue) == [("a1", 4, 4, False)]


def test_scored_prompts_run_completely_and_in_order():
    queue = scheduler()
    queue.add(request("a", 12, max_tokens=1), seed=0)
    step(queue), step(queue)
    queue.add(request("a scored", 12, max_tokens=0, prompt_logprobs=1), seed=0)
    first, second = queue.plan(), None
    ids = request("a", 12).prompt_ids
    assert [chunk.scores for chunk in first.chunks] == [ids[1:11]]
    queue.begin(first)
    queue.commit(first, results(first))
    second = queue.plan()
    assert [chunk.scores for chunk in second.chunks] == [ids[11:]]
    queue.begin(second)
    (output,) = queue.commit(second, results(second))
    assert (output.token_ids, output.finish_reason) == ((), "length")
    queue.check_integrity()


def finish(propose=None, tokens=(1, 2, EOS, 4, 5), **sampling):
    """(tokens, finish reason, stop id) of each output if the model gives these tokens."""
    queue = scheduler(propose=propose)
    queue.add(request("a", 1, **sampling), seed=0)
    found, at = [], 0
    while at < len(tokens):
        plan = queue.plan()
        if not plan.chunks:
            break
        queue.begin(plan)
        count = plan.chunks[0].num_sampled
        outputs = queue.commit(plan, {"a": ChunkResult(tuple(tokens[at : at + count]))})
        at += len(outputs[0].token_ids)
        found += outputs
        queue.check_integrity()
    return [(output.token_ids, output.finish_reason, output.stop_token_id) for output in found]


def test_a_sequence_ends_on_an_end_token():
    assert finish() == [((1,), None, None), ((2,), None, None), ((EOS,), "stop", EOS)]


def test_the_end_token_can_be_ignored():
    assert [reason for _, reason, _ in finish(ignore_eos=True)] == [None] * 4 + ["length"]


def test_stop_ids_end_a_sequence_even_if_end_tokens_are_ignored():
    stops = frozenset({2})
    assert finish(stop_token_ids=stops, ignore_eos=True)[-1] == ((2,), "stop", 2)


def test_max_tokens_ends_a_sequence():
    assert finish(max_tokens=2) == [((1,), None, None), ((2,), "length", None)]


def test_accepted_drafts_are_kept_and_those_after_a_wrong_one_rolled_back():
    drafts = {2: [2, 3, 7], 5: [5]}
    propose = lambda token_ids: drafts.get(len(token_ids), [])  # noqa: E731
    found = finish(propose, tokens=(1, 2, 3, 4, 5, 6, 7, 8), max_tokens=8)
    # after 1: drafts 2 and 3 are accepted; 7 is rejected and replaced by 4
    assert [ids for ids, _, _ in found[:3]] == [(1,), (2, 3, 4), (5, 6)]


def test_an_end_token_among_drafts_ends_the_answer():
    found = finish(lambda token_ids: [2, EOS, 4][: 3 * (len(token_ids) == 2)])
    assert found[-1] == ((2, EOS), "stop", EOS)


def test_drafts_never_exceed_max_tokens_nor_preempt():
    found = finish(lambda token_ids: [1, 1, 1, 1], tokens=(1,) * 9, max_tokens=3)
    assert [ids for ids, _, _ in found] == [(1, 1, 1)]
    queue = scheduler(num_blocks=2, propose=lambda token_ids: [1] * 4)
    queue.add(request("a", 4, max_tokens=4), seed=0)
    queue.add(request("b", 3, max_tokens=1), seed=0)
    names(queue)
    assert names(queue) == ["a"] and queue.preemptions == 0


def test_abort_frees_running_and_waiting_requests():
    queue = scheduler(max_num_seqs=1)
    for name in "abc":
        queue.add(request(name, 2), seed=0)
    step(queue)
    for name in "aca":
        queue.abort(name)
    queue.check_integrity()
    assert names(queue) == ["b"]


def test_a_failed_request_ends_without_affecting_others():
    queue = scheduler(max_batched_tokens=4)
    queue.add(request("a", 4), seed=0)
    queue.add(request("b", 2), seed=0)
    output = queue.end(queue.plan().chunks[0], "broken")
    assert (output.request_id, output.finish_reason, output.error) == ("a", "error", "broken")
    queue.check_integrity()
    assert step(queue) == [("b", 0, 2, True)]
