"""Rows of a replay, in order and by layer, through tables on the CPU."""

import pytest
import torch

from benchmarks.gpu.row_replay import RowReplay
from memory_ops.tables.device import DeviceTable

CPU = torch.device("cpu")
LAYERS, HEADS, TOP_K = (2, 5), 2, 4
STEPS, BATCH, TOKENS, NUM_ROWS = 3, 2, 7, 50


@pytest.fixture
def replay():
    return RowReplay(
        LAYERS, (HEADS, TOP_K), CPU, num_steps=STEPS, num_sequences=3, num_tokens=TOKENS
    )


@pytest.fixture
def recorded():
    decode = torch.randint(NUM_ROWS, (STEPS, len(LAYERS), BATCH, HEADS, TOP_K))
    return decode, torch.randint(NUM_ROWS, (4, len(LAYERS), HEADS, TOP_K))


def step(replay, num_tokens):
    """The rows that one step reads, by layer."""
    return [replay.rows(num_tokens, layer).clone() for layer in LAYERS]


def test_each_decode_step_reads_the_next_rows_and_the_first_follow_the_last(replay, recorded):
    decode, prompt = recorded
    replay.load(decode, prompt)
    for number in (0, 1, 2, 0, 1):
        for found, expected in zip(step(replay, BATCH), decode[number], strict=True):
            assert torch.equal(found, expected)


def test_micro_batches_read_the_rows_of_their_step_one_after_another(replay, recorded):
    decode, prompt = recorded
    replay.load(decode, prompt)
    own = torch.full((1, HEADS, TOP_K), NUM_ROWS)
    for number in range(2):
        for memory, layer in enumerate(LAYERS):
            for token in range(BATCH):
                predicted = replay.predicted(own, layer)
                assert torch.equal(predicted[0, :, :3], decode[number, memory, token, :, :3])
                assert torch.equal(replay.rows(1, layer), decode[number, memory, token, None])
    for memory, layer in enumerate(LAYERS):
        found = [replay.rows(4, layer)[:3], replay.rows(3, layer)]
        assert torch.equal(found[1], prompt[[0, 1, 2], memory])


def test_prompts_read_their_own_rows_and_advance_nothing(replay, recorded):
    decode, prompt = recorded
    replay.load(decode, prompt)
    for memory, found in enumerate(step(replay, 5)):
        assert torch.equal(found, prompt[[0, 1, 2, 3, 0], memory])
    assert torch.equal(step(replay, 1)[0], decode[0, 0, :1])
    # a prediction before a prompt selects rows, and leaves the next step right
    replay.predicted(torch.zeros(2, HEADS, TOP_K, dtype=torch.int64), LAYERS[0])
    step(replay, 5)
    assert torch.equal(step(replay, BATCH)[1], decode[1, 1])


def test_loading_begins_anew_and_repeats_short_recordings(replay, recorded):
    decode, prompt = recorded
    replay.load(decode, prompt)
    step(replay, BATCH)
    replay.load(decode[1:2], prompt)
    for _ in range(STEPS + 1):
        assert torch.equal(step(replay, BATCH)[0], decode[1, 0])


def test_most_predictions_are_rows_of_the_step_and_the_others_the_models_own(replay, recorded):
    decode, prompt = recorded
    replay.load(decode, prompt)
    own = torch.full((BATCH, HEADS, TOP_K), NUM_ROWS)
    for number in range(2):
        for memory, layer in enumerate(LAYERS):
            predicted = replay.predicted(own, layer)
            assert torch.equal(predicted[..., :3], decode[number, memory, ..., :3])
            assert (predicted[..., 3:] == NUM_ROWS).all()
            assert torch.equal(replay.rows(BATCH, layer), decode[number, memory])
    many = torch.zeros(4, HEADS, TOP_K, dtype=torch.int64)
    assert replay.predicted(many, LAYERS[0]) is many


def test_a_table_sums_the_replayed_rows(replay, recorded):
    pytest.importorskip("triton")
    from benchmarks.gpu.replayed_tables import ReplayedDeviceTable

    decode, prompt = recorded
    replay.load(decode, prompt)
    values = torch.randn(NUM_ROWS, 8)
    table, plain = ReplayedDeviceTable(values, replay), DeviceTable(values)
    assert table.row_source(LAYERS[0]) is None
    chosen, weights = torch.zeros_like(decode[0, 0]), torch.rand(BATCH, HEADS, TOP_K)
    for number in range(2):
        for memory, layer in enumerate(LAYERS):
            found = table.start(chosen, weights, layer).finish()
            expected = plain.start(decode[number, memory], weights).finish()
            torch.testing.assert_close(found, expected)
