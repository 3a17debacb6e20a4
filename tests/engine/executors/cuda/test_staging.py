"""Staging of step inputs on a fake device that copies as late as it may."""

from dataclasses import replace

import pytest
import torch

from engine.executors.batch import prompt_batch
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.patch_inputs import write_patches
from engine.executors.cuda.staging import Staging
from engine.executors.cuda.step_inputs import InputLayout
from engine.model.row_patches import RowPatch, ScaledPatch
from engine.request import MAX_PATCH_USES
from memory_ops.patches.patched_rows import PatchedRows
from tests.engine.executors.cuda.fake_device import FakeDevice

SHAPE = StepShape(4, 4, 4, True)


@pytest.mark.parametrize("ignored", [None, 0])
def test_a_buffer_is_not_written_before_its_copy_is_done(ignored):
    device = FakeDevice()
    staging = Staging(device, InputLayout(SHAPE))
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
    staging = Staging(device, InputLayout(large))
    small, whole = staging.inputs(SHAPE), staging.inputs(large)
    assert small.num_words < whole.num_words == InputLayout(large).num_words
    staging.send(small, lambda out: [view.fill(5) for view in out.values()])
    device.record().wait()
    assert all((view == 5).all() for view in small.on_device.values())
    assert torch.equal(
        staging._words[small.num_words :], torch.zeros(whole.num_words - small.num_words).long()
    )


@pytest.mark.parametrize("layers", [0, 2])
def test_uses_of_patches_are_sent_only_if_there_are_any(layers):
    device = FakeDevice()
    staging = Staging(device, InputLayout(SHAPE, layers))
    inputs = staging.inputs(SHAPE)
    uses = {"patch_scales", "patch_addresses"} & set(inputs.on_device)
    assert len(uses) == layers
    for number, has_patches in enumerate((False, True, False), start=1):
        staging.send(
            inputs,
            lambda out, number=number: [view.fill(number) for view in out.values()],
            has_patches,
        )
        device.record().wait()
        for name, view in inputs.on_device.items():
            assert (view == (number // 2 * 2 if name in uses else number)).all(), name


@pytest.mark.parametrize("is_decode", [True, False])
def test_every_sequence_has_space_for_all_its_patches(is_decode):
    num_sequences, length = 3, 1 if is_decode else 2
    num_tokens = num_sequences * length
    rows = PatchedRows(torch.arange(2), torch.zeros(2, 4))
    patches = [RowPatch("", {5: rows}), RowPatch("", {})] * (MAX_PATCH_USES // 2)
    uses = [ScaledPatch(patch, float(number)) for number, patch in enumerate(patches)]
    batch = replace(
        prompt_batch(range(num_tokens), block_size=4),
        query_starts=tuple(range(0, num_tokens + 1, length)),
        patches=[uses, [], uses],
    )
    shape = StepShape(num_tokens + 2, num_sequences, num_sequences, is_decode)
    layout = InputLayout(shape, num_patched_layers=2)
    words = torch.full((layout.num_words,), 77)
    views = layout.views(words)
    write_patches({name: view.numpy() for name, view in views.items()}, shape, batch, (2, 5))
    most = MAX_PATCH_USES
    spans = [[0, most], [most, most], [most, 2 * most]]
    # padding of decodes repeats the first sequence; that of mixed steps uses no patch
    padding = [spans[0] if is_decode else [0, 0]] * 2
    expected = [span for span in spans for _ in range(length)] + padding
    assert views["patch_spans"].tolist() == expected
    assert views["patch_scales"][: 2 * most].tolist() == [*range(most)] * 2
    address = rows.words.data_ptr()
    assert views["patch_addresses"][:, : 2 * most].tolist() == [[0] * 2 * most, [address, 0] * most]
    write_patches(
        {"patch_spans": views["patch_spans"].numpy()}, shape, replace(batch, patches=()), (2,)
    )
    assert not views["patch_spans"].any()


def test_no_two_inputs_overlap():
    layout = InputLayout(StepShape(37, 5, 9, False), 2)
    words = torch.zeros(layout.num_words, dtype=torch.int64)
    for view in layout.views(words).values():
        assert view.data_ptr() % 128 == words.data_ptr() % 128
        view += 1
    # what is left lies between the inputs
    used = sum(view.numel() for view in layout.views(words).values())
    assert int((words != 0).sum()) == used
