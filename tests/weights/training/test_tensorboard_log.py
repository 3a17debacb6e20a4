"""TensorBoard events of a run: their names and values, resumed runs, and a missing package."""

import json
import sys

import pytest

from engine.errors import ConfigError
from server.cli.train import run
from weights.training.tensorboard_log import TensorboardLog

RATES = {"dense": 2e-3, "tables": 1e-2}


def step_record(step: int, loss: float) -> dict[str, object]:
    return {"kind": "step", "step": step, "loss": loss, "lr_share": 0.5, "tokens_per_s": 900.0}


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_records_become_curves_and_a_resumed_run_hides_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "events"
    with TensorboardLog(folder, 0, RATES) as log:
        for step in (1, 2, 3):
            log.write(step_record(step, 8.0 / step))
    with TensorboardLog(folder, 2, RATES) as log:
        log.write(step_record(3, 2.5))
        log.write({"kind": "evaluation", "step": 3, "loss": 2.0, "table 0 share": 0.25})
    found = curves(folder)
    assert found["step/loss"] == [(1, 8.0), (2, 4.0), (3, 2.5)]
    assert found["step/tokens_per_s"][-1] == (3, 900.0)
    assert found["evaluation/loss"] == [(3, 2.0)]
    assert found["evaluation/table_0_share"] == [(3, 0.25)]
    assert found["learning_rate/dense"][-1] == (3, pytest.approx(1e-3))
    assert found["learning_rate/tables"][-1] == (3, pytest.approx(5e-3))
    assert len(found) == 7


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^tensorboard: .*file"):
        TensorboardLog(tmp_path / "file", 0, RATES)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'memplus\[tensorboard\]'"):
        TensorboardLog(tmp_path, 0, RATES)


def test_the_command_writes_the_curves_of_its_log(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    assert run(config(), tmp_path / "run", tensorboard=True) == 0
    found = curves(tmp_path / "run" / "tensorboard")
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    losses = [(one["step"], pytest.approx(one["loss"])) for one in logged if one["kind"] == "step"]
    assert losses and found["step/loss"] == losses
    assert found["evaluation/loss"][-1][0] == losses[-1][0]
