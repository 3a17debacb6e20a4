"""What is planned, in which order, and how sequences end: no model, no tensors."""

from engine.config import EngineConfig
from engine.kv_blocks import BlockPool
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler

EOS = 9


def scheduler(num_blocks=64, **config) -> Scheduler:
    settings = EngineConfig(**({"max_num_seqs": 4, "max_batched_tokens": 10} | config))
    return Scheduler(settings, BlockPool(num_blocks, block_size=4), frozenset({EOS}))


def request(name: str, length: int, max_tokens: int = 5, **sampling) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(name, tuple(range(length)), params)


def step(at: Scheduler, token: int = 1) -> list[tuple[str, int, int, bool]]:
    """Run one step that gives everyone ``token``: (request, start, tokens, sampled)."""
    plan = at.plan()
    at.commit(plan, {c.request_id: token for c in plan.chunks if c.sampling is not None})
    at.check_integrity()
    return [(c.request_id, c.start, len(c.token_ids), c.sampling is not None) for c in plan.chunks]


def test_a_long_prompt_is_run_in_chunks_under_the_budget():
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
    assert [chunk[0] for chunk in step(queue)] == ["a", "b"]
    assert (queue.num_running, queue.num_waiting) == (0, 1)
    assert [chunk[0] for chunk in step(queue)] == ["c"]
    assert not queue.has_work


def test_a_full_pool_lets_the_next_wait_until_blocks_return():
    queue = scheduler(num_blocks=4)
    queue.add(request("a", 4, max_tokens=4), seed=0)
    queue.add(request("b", 4, max_tokens=8), seed=0)
    queue.add(request("c", 1, max_tokens=1), seed=0)
    assert [chunk[0] for chunk in step(queue)] == ["a"]
    while queue.num_running:
        assert queue.num_waiting == 2  # first come, first served: c does not overtake b
        step(queue)
    assert [chunk[0] for chunk in step(queue)] == ["b", "c"]


def finish(**sampling):
    """(finish reason, stop id) of the outputs when the tokens 1, 2, EOS, ... come."""
    queue = scheduler()
    queue.add(request("a", 1, **sampling), seed=0)
    found = []
    for token in (1, 2, EOS, 4, 5):
        plan = queue.plan()
        if not plan.chunks:
            break
        found += queue.commit(plan, {"a": token})
    return [(output.token_ids, output.finish_reason, output.stop_token_id) for output in found]


def test_a_sequence_ends_on_its_own_end_token():
    assert finish() == [((1,), None, None), ((2,), None, None), ((EOS,), "stop", EOS)]


def test_the_end_token_can_be_ignored():
    assert [reason for _, reason, _ in finish(ignore_eos=True)] == [None] * 4 + ["length"]


def test_stop_ids_end_a_sequence_even_where_end_tokens_are_ignored():
    stops = frozenset({2})
    assert finish(stop_token_ids=stops, ignore_eos=True)[-1] == ((2,), "stop", 2)


def test_the_longest_answer_ends_a_sequence():
    assert finish(max_tokens=2) == [((1,), None, None), ((2,), "length", None)]


def test_abort_frees_running_and_waiting_requests():
    queue = scheduler(max_num_seqs=1)
    for name in "abc":
        queue.add(request(name, 2), seed=0)
    step(queue)
    for name in "aca":
        queue.abort(name)
    queue.check_integrity()
    assert [chunk[0] for chunk in step(queue)] == ["b"]


def test_a_failed_step_ends_its_sequences_alone():
    queue = scheduler(max_batched_tokens=4)
    queue.add(request("a", 4), seed=0)
    queue.add(request("b", 2), seed=0)
    outputs = queue.fail(queue.plan(), "broken")
    assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [("a", "error", "broken")]
    queue.check_integrity()
    assert step(queue) == [("b", 0, 2, True)]
