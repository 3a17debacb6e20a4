"""Rooflines of the shapes that ``memplus bench gpu`` decodes, against figures computed by hand."""

import pytest

from benchmarks.engine_rounds import TimedStep
from benchmarks.gpu.card_limits import CardLimits
from benchmarks.gpu.roofline import Roofline, measured_rate
from benchmarks.memory_variant import with_memory
from benchmarks.model_shapes import LLAMA_8B_SHAPE, SMOLLM2_SHAPE
from engine.model.step_work import Chunk
from weights.checkpoints.stored_groups import requested_formats

LIMITS = CardLimits(device=3000, tflops=800, bus=54.5)


def decode(batch, context):
    return [TimedStep(0.01, (Chunk(context - 1, 1),) * batch, batch)]


@pytest.mark.parametrize(
    ("config", "context", "rates"),
    [
        (LLAMA_8B_SHAPE, 512, {1: 199, 8: 1544, 32: 5595, 64: 9946}),
        (SMOLLM2_SHAPE, 256, {1: 10_900, 8: 75_900, 32: 210_000, 64: 297_000}),
    ],
)
def test_decode_is_bound_by_the_bytes_of_weights_keys_and_values(config, context, rates):
    roofline = Roofline(config, LIMITS)
    for batch, rate in rates.items():
        assert roofline.tokens_per_s(decode(batch, context)) == pytest.approx(rate, rel=0.01)


def test_weights_in_groups_are_read_as_they_are_and_multiplied_as_values():
    formats = requested_formats(LLAMA_8B_SHAPE, "int4")
    roofline = Roofline(LLAMA_8B_SHAPE, LIMITS, formats=formats)
    # 4.5 bits per weight in the layers, 8.5 in the head, and the keys and values of 512 tokens
    num_bytes = 6.98e9 * 4.5 / 8 + 128256 * 4096 * 8.5 / 8 + 512 * 2**17
    assert roofline.tokens_per_s(decode(1, 512)) == pytest.approx(3e12 / num_bytes, rel=0.01)
    prompt = [TimedStep(0.1, (Chunk(0, 2048),), 1)]
    dense = Roofline(LLAMA_8B_SHAPE, LIMITS).tokens_per_s(prompt)
    assert roofline.tokens_per_s(prompt) == pytest.approx(dense)


def test_rows_that_cross_the_bus_add_their_time():
    roofline = Roofline(with_memory(LLAMA_8B_SHAPE, 2048), LIMITS, row_bytes=8192)
    for batch, rate, missed in ((1, 205, 205), (64, 10_185, 8972)):
        steps = decode(batch, 512)
        assert roofline.tokens_per_s(steps) == pytest.approx(rate, rel=0.02)
        rows = 0.23 * batch * 3 * 4 * 32
        assert roofline.tokens_per_s(steps, rows) == pytest.approx(missed, rel=0.02)
        added = roofline.seconds(steps, rows) - roofline.seconds(steps)
        assert added == pytest.approx(rows * 8192 / 54.5e9)


def test_prefill_is_bound_by_its_products():
    steps = [TimedStep(0.1, (Chunk(0, 2048),), 1)]
    rate = Roofline(LLAMA_8B_SHAPE, LIMITS).tokens_per_s(steps)
    # two operations per weight and token, the embedding and the head left out, and attention
    assert rate == pytest.approx(800e12 / (2 * 6.98e9 + 4 * 1024 * 32 * 4096), rel=0.01)
    assert measured_rate(steps) == pytest.approx(20_480)
