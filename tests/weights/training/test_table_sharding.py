"""Runs whose tables are divided among processes: losses, checkpoints and resuming, in threads."""

import errno
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from tests.small_runs import losses, records, run, tensors
from tests.thread_replicas import in_group
from weights.checkpoints import tensor_part
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.errors import CheckpointError
from weights.training.replicas import Replicas
from weights.training.run_folder import saved_states
from weights.training.run_plan import plan_run
from weights.training.table_sharding import TableSharding
from weights.training.trainer import Trainer

ROWS, COLUMNS = "run.table_sharding=rows", "run.table_sharding=columns"
OWN = "model.memory.share_values=false"
PEER = 'model.memory.layers={"0"="peer", "1"="memory_plus"}'


def run_in_group(settings, folder, count, *, resume=False, until=None):
    """Train in threads; return all processes' reports."""

    def member(replicas):
        made = Trainer(settings, folder, resume=resume, replicas=replicas)
        reports = []

        def on_step(report):
            reports.append(report)
            return report.step != until

        made.run(on_step)
        return reports

    return in_group(count, member)


def check_close(folder, wanted, tolerance=1e-3):
    found, others = tensors(folder), tensors(wanted)
    assert found.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


NONE = "run.table_sharding=none"
RECOMPUTED = "run.checkpoint_activations=true"
CASES = [
    (NONE, 2, []),
    (ROWS, 3, [OWN, RECOMPUTED, "optimizer.clip_norm=0.1"]),
    (COLUMNS, 3, [OWN, RECOMPUTED, "run.passes_per_step=2"]),
    (ROWS, 2, [PEER, "optimizer.moment_dtype=bfloat16"]),
    (COLUMNS, 2, [PEER, "optimizer.row_wise=true"]),
    # fewer sequences than processes
    (ROWS, 3, ["run.tokens_per_step=12", "data.sequence_length=60", "run.freeze=['dense']"]),
    (COLUMNS, 3, ["run.tokens_per_step=12", "data.sequence_length=60"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "count", "changes"), CASES)
def test_a_divided_run_equals_that_of_one_process(config, tmp_path, sharding, count, changes):
    run(config(*changes), tmp_path / "one")
    run_in_group(config(*changes, sharding), tmp_path / "run", count)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    check_close(tmp_path / "run", tmp_path / "one")
    pairs = zip(records(tmp_path / "run"), records(tmp_path / "one"), strict=True)
    for found, wanted in pairs:  # losses, norms, evaluations and the usage of tables
        assert found.pop("kind") == wanted.pop("kind")
        assert found == pytest.approx(wanted, rel=2e-3)
    state = saved_states(tmp_path / "run" / "checkpoints")[-1]
    load_model(state, verify_tables=True)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ROWS, COLUMNS])
def test_any_number_of_processes_resumes_a_checkpoint(config, tmp_path, sharding):
    other = COLUMNS if sharding == ROWS else ROWS
    whole = config("run.checkpoint_every=2")
    run(whole, tmp_path / "whole")
    folder = tmp_path / "run"
    divided = [config("run.checkpoint_every=2", one) for one in (sharding, other)]
    run_in_group(divided[0], folder, 2, until=2)
    for settings, count, until in ((divided[0], 3, 4), (divided[1], 2, 6), (divided[1], 1, 8)):
        before = tensors(folder)
        assert_equal(resumed_state(settings, folder, tmp_path / "copy", count), before)
        run_in_group(settings, folder, count, resume=True, until=until)
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    check_close(folder, tmp_path / "whole")


def resumed_state(settings, folder, copy, count):
    """The tensors of a checkpoint that a group has loaded and saved again at once."""

    def member(replicas):
        made = Trainer(settings, folder, resume=True, replicas=replicas)
        state = replace(made._state, folder=copy / "checkpoints")
        shutil.rmtree(copy, ignore_errors=True) if replicas.is_first else None
        state.save(made.step, made._stream.position)

    in_group(count, member)
    return tensors(copy)


def assert_equal(found, wanted):
    assert found.keys() == {name for name in wanted if not name.startswith("row_reads")}
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.slow
def test_a_run_starts_from_a_model_with_whole_or_quantised_tables(config, tmp_path):
    run(config("run.steps=1"), tmp_path / "first")
    state = saved_states(tmp_path / "first" / "checkpoints")[-1]
    narrow = tmp_path / "narrow"
    convert(state, narrow, table_dtype="int8")
    for number, source in enumerate((state, narrow)):
        changes = [f"run.init_from={source}", "run.steps=2"]
        run(config(*changes), tmp_path / f"one{number}")
        for sharding in (ROWS, COLUMNS):
            folder = tmp_path / f"{sharding}{number}"
            run_in_group(config(*changes, sharding), folder, 2)
            assert losses(folder) == pytest.approx(losses(tmp_path / f"one{number}"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "failing"), [(ROWS, 1), (COLUMNS, 0)])
def test_a_part_that_cannot_be_written_fails_everywhere(
    config, tmp_path, monkeypatch, sharding, failing
):
    folder, settings = tmp_path / "run", config("run.steps=4", "run.checkpoint_every=2", sharding)
    run_in_group(settings, folder, 2, until=2)
    before = tensors(folder)
    write = tensor_part._write_at

    def full(descriptor, content, offset):
        if threading.current_thread().name.endswith(f"_{failing}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, content, offset)

    monkeypatch.setattr(tensor_part, "_write_at", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run_in_group(settings, folder, 2, resume=True)
    assert_equal(tensors(folder), before)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    monkeypatch.undo()
    run_in_group(settings, folder, 2, resume=True)
    assert len(losses(folder)) == 4


def test_tables_that_cannot_be_divided_are_refused(config, tmp_path):
    replicas = Replicas(0, 17)
    with pytest.raises(
        ConfigError, match="run.table_sharding: a table of 16 columns cannot be div"
    ):
        plan_run(config(COLUMNS), tmp_path / "run", resume=False, replicas=replicas)
    with pytest.raises(ConfigError, match="run.table_sharding: rows is not possible with run.tab"):
        config(ROWS, "run.device=cuda", "run.table_tier=host")
    with pytest.raises(ConfigError, match="run.table_sharding: rows is for tables, but the model"):
        plan_run(config(ROWS, memory=False), tmp_path / "run", resume=False)
    assert TableSharding("rows").shard((8, 4)) is None  # of one process


def test_a_plan_divides_rows_and_moments(config, tmp_path):
    def memory(count, *changes):
        plan = plan_run(
            config(*changes), tmp_path / "run", resume=False, replicas=Replicas(0, count)
        )
        wanted = "one process holds whole" if count == 1 else "among 4 processes"
        said = [line for line in plan.lines if "whole tables" in line or "divided by" in line]
        assert len(said) == bool(changes) and all(wanted in line for line in said)
        return plan.memory

    alone, whole = memory(1, ROWS), memory(4)
    # each process computes a quarter of every batch
    assert 4 * whole.activations == alone.activations
    assert whole == replace(alone, activations=whole.activations)
    for sharding in (ROWS, COLUMNS):
        part = memory(4, sharding)
        assert (4 * part.rows, 4 * part.row_moments) == (whole.rows, whole.row_moments)
        assert part.checkpoint == whole.checkpoint and part.exchanged > 0
        assert part.total - part.exchanged == whole.total - 3 * (part.rows + part.row_moments)
