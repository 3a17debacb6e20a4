"""Step plans as batches: tokens of all chunks in a row, and results split by request again."""

from engine.executors.batch import ScoredToken, StepResult, pending_id
from engine.request import MemoryRead
from engine.sampling.params import SamplingParams, TokenLogprobs
from engine.scheduling.batching import Batcher, results_by_request
from engine.scheduling.step_plan import PENDING, ChunkResult, SequenceChunk, StepPlan

SCORED = SamplingParams(temperature=0, prompt_logprobs=2)
GREEDY = SamplingParams(temperature=0)
PLAN = StepPlan(
    (
        # the first part of a scored prompt, a decode with two drafts, and one in flight
        SequenceChunk(
            "a", (0, 0), 4, (1, 2, 3), 0, (7,), SCORED, 0, False, scores=(2, 3, 4), prompt_length=9
        ),
        SequenceChunk("b", (0, 1), 0, (5, 6, 8), 5, (3, 9), GREEDY, 0, True, 2, prompt_length=5),
        SequenceChunk("c", (0, 2), 2, (PENDING,), 8, (1, 2, 4), GREEDY, 0, True, prompt_length=3),
    )
)


def test_the_tokens_of_all_chunks_follow_one_another():
    batch = Batcher(block_size=4, eos_ids=frozenset()).batch(PLAN)
    assert batch.ids_T.tolist() == [1, 2, 3, 5, 6, 8, pending_id(2)]
    assert batch.positions_T.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert batch.query_starts == (0, 3, 6, 7)
    assert batch.kv_index_T.tolist() == [28, 29, 30, 37, 38, 39, 16]
    assert batch.context_lengths == (3, 8, 9)
    assert batch.block_ids == ((7,), (3, 9), (1, 2, 4))
    assert batch.seats == (4, 0, 2)
    # sampled positions, then scored ones
    assert batch.logits_at_L.tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert [(row.position, row.drafts) for row in batch.rows] == [
        *((6, ()), (7, (6,)), (8, (6, 8))),
        (9, ()),
    ]
    assert batch.scored == [ScoredToken(token_id, 2) for token_id in (2, 3, 4)]
    assert batch.bitmask is None


def test_results_are_split_by_request():
    found = [TokenLogprobs(token_id, -1.0, 1, ()) for token_id in range(4)]
    reads = (MemoryRead(1, (7,), (1.0,)),)
    logprobs = {4: found[0], 5: found[1], 6: found[2], 3: found[3]}
    result = StepResult([6, 8, 1, 2], logprobs, {0: reads, 1: (), 2: reads})
    assert results_by_request(PLAN, result) == {
        "a": ChunkResult((), (), tuple(found[:3])),
        "b": ChunkResult((6, 8, 1), memory_reads=(reads, (), reads)),
        "c": ChunkResult((2,), (found[3],)),
    }
