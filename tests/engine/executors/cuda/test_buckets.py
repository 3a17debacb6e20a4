"""Buckets: each step takes the smallest graph that holds it."""

import pytest

from engine.executors.cuda.buckets import Buckets, StepShape


def shapes(max_num_seqs=64, max_batched_tokens=512) -> Buckets:
    return Buckets(max_num_seqs, max_batched_tokens)


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (3, 4), (17, 24), (33, 48), (64, 64)])
def test_a_decode_takes_the_smallest_bucket(count, bucket):
    found = next(shapes().holding(StepShape(count, count, count, True)))
    assert found == StepShape(bucket, bucket, bucket, True)


def test_a_mixed_step_takes_the_smallest_bucket_of_tokens():
    found = next(shapes().holding(StepShape(65, 2, 1, False)))
    assert found == StepShape(128, 64, 64, False)


@pytest.mark.parametrize("shape", [StepShape(513, 1, 1, False), StepShape(80, 1, 80, False)])
def test_other_steps_have_no_bucket(shape):
    assert list(shapes().holding(shape)) == []


def test_a_decode_of_many_sequences_takes_a_mixed_bucket():
    found = next(shapes(max_num_seqs=100).holding(StepShape(90, 90, 90, True)))
    assert found == StepShape(128, 100, 100, False)


def test_the_largest_comes_first_and_none_twice():
    for seqs, tokens in ((1, 1), (3, 16), (5, 64), (64, 512), (100, 2048)):
        found = list(shapes(seqs, tokens))
        assert [shape.tokens for shape in found] == sorted((s.tokens for s in found), reverse=True)
        assert len(set(found)) == len(found)
        assert all(shape.tokens <= tokens and shape.sequences <= seqs for shape in found)
        assert max(shape.sequences for shape in found) == min(seqs, max(64, seqs))
