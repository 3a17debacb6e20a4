"""Staging of step inputs on a fake device that copies as late as it may."""

import pytest
import torch

from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.staging import Staging
from engine.executors.cuda.step_inputs import InputLayout
from tests.engine.executors.cuda.fake_device import FakeDevice

SHAPE = StepShape(4, 4, 4, True)


@pytest.mark.parametrize("ignored", [None, 0])
def test_a_buffer_is_not_written_before_its_copy_is_done(ignored):
    device = FakeDevice()
    staging = Staging(device, InputLayout(SHAPE).num_words)
    inputs, seen = staging.inputs(SHAPE), []
    device.ignored_wait = -1 if ignored is None else ignored
    for number in range(3):
        staging.send(inputs, lambda out, number=number: out["ids"].fill(number))
        device.queue(lambda: seen.append(inputs.on_device["ids"].tolist()))
    device.ignored_wait = -1
    device.record().wait()
    assert (seen == [[n] * 4 for n in range(3)]) == (ignored is None)


def test_only_the_words_of_a_shape_are_sent():
    device = FakeDevice()
    large = SHAPE._replace(tokens=400)
    staging = Staging(device, InputLayout(large).num_words)
    small, whole = staging.inputs(SHAPE), staging.inputs(large)
    assert small.num_words < whole.num_words == InputLayout(large).num_words
    staging.send(small, lambda out: [view.fill(5) for view in out.values()])
    device.record().wait()
    assert all((view == 5).all() for view in small.on_device.values())
    assert torch.equal(
        staging._words[small.num_words :], torch.zeros(whole.num_words - small.num_words).long()
    )


def test_no_two_inputs_overlap():
    layout = InputLayout(StepShape(37, 5, 9, False))
    words = torch.zeros(layout.num_words, dtype=torch.int64)
    for view in layout.views(words).values():
        assert view.data_ptr() % 128 == words.data_ptr() % 128
        view += 1
    # what is left lies between the inputs
    used = sum(view.numel() for view in layout.views(words).values())
    assert int((words != 0).sum()) == used
