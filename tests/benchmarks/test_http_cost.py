"""The benchmark of the HTTP process's CPU time runs to its end."""

import asyncio

import pytest

from benchmarks.http_cost import KINDS, streamed
from tests.models import byte_tokenizer
from weights.checkpoints.tokenizer import JsonTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_answered_and_measured(kind):
    work = streamed(JsonTokenizer(byte_tokenizer()), 3, 4, KINDS[kind])
    cost = asyncio.run(asyncio.wait_for(work, 60))
    assert cost.us_per_token > 0 and cost.worst_step_ms > 0
