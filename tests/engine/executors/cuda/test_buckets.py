"""Buckets: each step takes the smallest graph that holds it."""

import pytest
import torch

from engine.executors.batch import Batch
from engine.executors.cuda.buckets import Buckets, Splits, StepShape
from engine.sampling.params import SamplingParams
from engine.sampling.request_rules import SamplingRow

# an H100 with 8 KV heads: up to 33 sequences leave processors idle
SPLITS = Splits(num_kv_heads=8, head_dim=128, num_processors=132)
LONG, SHORT = 513, 512


def buckets(max_num_seqs=64, max_batched_tokens=512) -> Buckets:
    return Buckets(max_num_seqs, max_batched_tokens, SPLITS)


def decode(count: int, context: int = SHORT, **changes) -> Batch:
    """A batch of one sampled token for each of some sequences, the first with this context."""
    at = torch.arange(count)
    values = {
        "query_starts": tuple(range(count + 1)),
        "context_lengths": (context, *[1] * (count - 1)),
        "block_ids": [(index,) for index in range(count)],
        "seats": range(count),
        "logits_at_L": at,
        "rows": [SamplingRow(SamplingParams(), 0, 1)] * count,
    }
    return Batch(ids_T=at, positions_T=at, kv_index_T=at, **(values | changes))


def bucket_of(batch: Batch, **limits) -> StepShape | None:
    made = buckets(**limits)
    return next(made.holding(made.exact(batch)), None)


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (3, 4), (17, 24), (33, 48), (64, 64)])
def test_a_decode_takes_the_smallest_bucket(count, bucket):
    assert bucket_of(decode(count)) == StepShape(bucket, bucket, bucket, True, 1)


@pytest.mark.parametrize(("count", "splits"), [(1, 32), (2, 16), (3, 8), (5, 4), (16, 2), (17, 1)])
def test_long_contexts_of_few_sequences_are_split(count, splits):
    found = bucket_of(decode(count, LONG))
    assert found.num_splits == splits and found.sequences >= count
    assert bucket_of(decode(count, SHORT)).num_splits == 1


def test_a_mixed_step_takes_the_smallest_bucket_of_tokens():
    mixed = decode(65, rows=[], logits_at_L=torch.arange(1))
    assert bucket_of(mixed) is None
    assert bucket_of(mixed, max_num_seqs=65) == StepShape(128, 65, 65, False)


@pytest.mark.parametrize("logits", [5, 65])
def test_a_step_with_more_logits_than_sequences_run_has_no_bucket(logits):
    scored = decode(3, logits_at_L=torch.arange(logits), rows=[])
    assert (bucket_of(scored) is None) == (logits > 64)


def test_a_decode_of_many_sequences_takes_a_mixed_bucket():
    assert bucket_of(decode(90), max_num_seqs=100) == StepShape(128, 100, 100, False)
    exact = buckets(100).exact(decode(90, LONG))
    assert exact == StepShape(90, 90, 90, True, num_splits=1)


def test_the_largest_comes_first_and_none_twice():
    for seqs, tokens in ((1, 1), (3, 16), (5, 64), (64, 512), (100, 2048)):
        found = list(buckets(seqs, tokens))
        assert [shape.tokens for shape in found] == sorted((s.tokens for s in found), reverse=True)
        assert len(set(found)) == len(found)
        assert all(shape.tokens <= tokens and shape.sequences <= seqs for shape in found)
        assert max(shape.sequences for shape in found) == seqs


def test_every_step_of_decodes_without_a_graph_has_splits_that_a_bucket_compiled():
    made = buckets()
    compiled = {shape.num_splits for shape in made}
    for count in range(1, 91):
        for context in (SHORT, LONG):
            assert made.exact(decode(count, context)).num_splits in compiled
