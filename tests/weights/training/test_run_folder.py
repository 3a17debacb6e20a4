"""Run folders: nothing is lost however a run is stopped, copied, or started a second time."""

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path

import pytest

from server.cli.main import main
from tests.small_runs import check_same, records, run
from weights.errors import CheckpointError, DataError, ModelNotFoundError, TrainingError
from weights.models.named_models import find_model, local_name
from weights.models.prepare import prepare
from weights.training.run_folder import newest_state, run_lock, saved_states
from weights.training.trainer import Trainer

# fsyncs of a run with two checkpoints, one of which is the last
NUM_SYNCS = 40
SOME = [1, 13, 30]


def check_resumes(config, folder, whole):
    """A stopped run, resumed or begun again, ends like the whole run, with no leftovers."""
    run(config(), folder, resume=(folder / "settings.json").exists())
    check_same(folder, whole)
    assert records(folder) == records(whole)
    assert not list(folder.rglob(".*"))


def copies_at_syncs(monkeypatch, folder, target):
    """Copy the folder before each fsync: what a kill at this moment, or a copy, leaves."""
    fsync, count = os.fsync, iter(range(1, 999))

    def copied(descriptor):
        shutil.copytree(folder, target / str(next(count)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", copied)


@pytest.mark.parametrize("syncs", [SOME, pytest.param([*range(1, 41)], marks=pytest.mark.slow)])
def test_a_run_that_is_killed_or_copied_at_any_moment_resumes(config, tmp_path, monkeypatch, syncs):
    copies_at_syncs(monkeypatch, tmp_path / "whole", tmp_path / "copies")
    run(config(), tmp_path / "whole")
    monkeypatch.undo()
    copies = [tmp_path / "copies" / str(number) for number in syncs]
    assert len(list((tmp_path / "copies").iterdir())) == NUM_SYNCS
    for folder in copies:
        check_resumes(config, folder, tmp_path / "whole")


@pytest.mark.parametrize("syncs", [SOME, pytest.param([*range(1, 41)], marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_moment_spoils_nothing(config, tmp_path, monkeypatch, syncs):
    run(config(), tmp_path / "whole")
    fsync = os.fsync
    for number in syncs:
        left = iter(range(1, number))

        def full(descriptor, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        folder = tmp_path / str(number)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises((CheckpointError, DataError, TrainingError), match="No space left"):
            run(config(), folder)
        monkeypatch.undo()
        check_resumes(config, folder, tmp_path / "whole")


def test_a_clock_that_is_set_back_changes_nothing(config, tmp_path):
    folder = tmp_path / "run"
    run(config(), folder, until=6)
    for age, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (age * 10**6, age * 10**6))
    assert newest_state(folder).name == "step-00000006"
    run(config(), tmp_path / "whole")
    check_resumes(config, folder, tmp_path / "whole")


def test_a_run_resumes_without_its_texts(config, texts, tmp_path, caplog):
    run(config(), tmp_path / "whole")
    run(config(), tmp_path / "cut", until=5)
    moved = texts.with_name("moved.jsonl")
    texts.rename(moved)
    caplog.set_level("INFO", "weights.training")
    made = Trainer(config(f"data.train={moved}"), tmp_path / "cut", resume=True)
    assert made.step == 5 and "texts.jsonl: changed or gone; the run keeps" in caplog.text
    check_resumes(config, tmp_path / "cut", tmp_path / "whole")
    moved.write_text(moved.read_text() + '{"text": "more"}')
    with pytest.raises(TrainingError, match="data.train: must be .* to resume"):
        Trainer(config(f"data.train={moved}"), tmp_path / "cut", resume=True)


def test_a_folder_without_a_run_is_not_resumed(config, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(TrainingError, match="has no run to resume; leave out --resume"):
            Trainer(config(), folder, resume=True)
    assert not (tmp_path / "none").exists()


def test_only_one_process_trains_in_a_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    with run_lock(folder):
        with pytest.raises(TrainingError, match="run: another process trains in this folder"):
            run_lock(folder).__enter__()
        (folder / "file").touch()
    with run_lock(folder):
        assert (folder / "file").exists()
    with run_lock(tmp_path / "other" / "run"):
        pass
    assert folder.exists() and not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file/run: Not a directory"):
        run_lock(tmp_path / "file" / "run").__enter__()


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, caplog):
    def unlocked(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    with run_lock(tmp_path / "run"):
        assert "run: cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_is_removed_before_its_lock_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for renewed in (False, True):

        def removed(descriptor, operation, renewed=renewed):
            # an open folder keeps its number, so the new one differs
            folder.rmdir()
            if renewed:
                folder.mkdir()

        monkeypatch.setattr(fcntl, "flock", removed)
        with pytest.raises(TrainingError, match="run: another process has removed it"):
            run_lock(folder).__enter__()
    assert folder.exists()  # it is that of the other process


def test_the_newest_checkpoint_of_a_run_is_served_and_kept(config, tmp_path, caplog):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    run(config("run.checkpoint_every=1"), folder, until=2)
    caplog.set_level(logging.INFO)
    served = prepare(find_model(str(folder), cache))
    assert served == folder / "checkpoints" / "step-00000002" == Path(local_name(str(folder)))
    line = f"{folder}: a training run; uses its newest checkpoint, step-00000002"
    (level,) = {one.levelname for one in caplog.records if one.getMessage() == line}
    assert level == "INFO"  # a run folder is a good input
    run(config("run.checkpoint_every=1"), folder, resume=True)
    names = [state.name for state in saved_states(folder / "checkpoints")]
    assert names == [f"step-0000000{step}" for step in (2, 7, 8)]
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ModelNotFoundError, match="is a training run that has no checkpoint yet"):
        find_model(str(folder), cache)


@pytest.mark.parametrize("verb", ["generate", "eval", "convert", "inspect"])
def test_a_verb_prints_which_checkpoint_of_a_run_it_uses(config, texts, tmp_path, capsys, verb):
    folder, model = tmp_path / "run", ["--model", str(tmp_path / "run"), "--device", "cpu"]
    run(config(), folder, until=2)
    arguments = {
        "generate": ["red", "--max-tokens", "2", *model],
        "eval": [str(texts), *model],
        "convert": [str(folder), str(tmp_path / "converted")],
        "inspect": [str(folder)],
    }
    capsys.readouterr()
    assert main([verb, *arguments[verb]]) == 0
    line = f"{folder}: a training run; uses its newest checkpoint, step-00000002"
    assert capsys.readouterr().err.splitlines().count(line) == 1


def test_states_are_found_by_their_names(tmp_path):
    for name in (
        "step-00000009",
        "step-00000010",
        "step-00000011-copy",
        ".step-00000012.partial-1",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [state.name for state in saved_states(tmp_path / "checkpoints")]
    assert names == ["step-00000009", "step-00000010"]
    assert newest_state(tmp_path).name == names[-1] and newest_state(tmp_path / "none") is None
