"""The state of an interrupted run: what is read back and what is refused."""

import errno

import pytest
import torch

from weights.checkpoints import tensor_writer
from weights.errors import TrainingError
from weights.learning.saved_state import load_state, save_state, state_file

RUN, PROGRESS = {"lr": 0.1, "facts": "ab"}, {"step": 3, "facts": [0, 2]}
TENSORS = {"a": torch.randn(3, 4), "ids": torch.arange(5)}


def test_a_state_is_replaced_and_read_back(tmp_path):
    file = state_file(tmp_path / "patch")
    save_state(file, RUN, {}, {"a": torch.zeros(1)})
    save_state(file, RUN, PROGRESS, TENSORS)
    progress, tensors = load_state(file, RUN)
    assert progress == PROGRESS and set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], one) for name, one in TENSORS.items())
    assert [one.name for one in tmp_path.iterdir()] == ["patch.state.safetensors"]


def test_writers_share_no_partial_file_and_a_failed_one_leaves_none(tmp_path, monkeypatch):
    file = state_file(tmp_path / "patch")
    save_state(file, RUN, PROGRESS, TENSORS)
    names = []

    def fail(partial, sources, on_write):
        names.append(partial.name)
        partial.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_writer, "write_tensors", fail)
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"cannot be written \(No space left"):
            save_state(file, RUN, {}, TENSORS)
    assert names[0] != names[1]
    assert list(tmp_path.iterdir()) == [file] and load_state(file, RUN)[0] == PROGRESS


def test_another_run_is_refused(tmp_path):
    save_state(tmp_path / "state", RUN, PROGRESS, TENSORS)
    for run, named in [
        (RUN | {"lr": 0.2}, "lr: must be 0.1 to resume .*state, not 0.2"),
        (RUN | {"seed": 1}, "seed: must be None"),
    ]:
        with pytest.raises(TrainingError, match=named):
            load_state(tmp_path / "state", run)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    for content in (b"", b"no state at all", (2).to_bytes(8, "little") + b"{}"):
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(TrainingError, match="state"):
            load_state(tmp_path / "state", RUN)
    for run, progress in ((RUN, [3]), ([1], PROGRESS)):
        save_state(tmp_path / "state", run, progress, TENSORS)
        with pytest.raises(TrainingError, match="state: is not the state of a learning run"):
            load_state(tmp_path / "state", RUN)
    with pytest.raises(TrainingError, match="cannot be written"):
        save_state(tmp_path / "none" / "state", RUN, PROGRESS, TENSORS)
