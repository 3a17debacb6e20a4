"""``memplus bench train-run``: phases of a run, shares of a step, refusals, and the verb."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest

from benchmarks.train_runs import measured_steps, run
from benchmarks.train_runs.measured_steps import BUSY, QUIET, AllMeasured, MeasuredSteps
from benchmarks.train_runs.step_parts import PARTS, part_shares
from server.cli.main import main
from tests.small_runs import CONFIG, MEMORY


def event(name, seconds, parent=None):
    return SimpleNamespace(name=name, cpu_time_total=seconds * 1e6, cpu_parent=parent)


def test_an_operation_counts_once_in_the_outermost_part():
    step = event("memplus optimizer", 1.0)
    linear = event("aten::linear", 3.0)
    lookup = event("memplus::gather_rows", 0.5)
    events = [
        *(step, event("aten::mm", 0.25, step)),
        *(linear, event("aten::addmm", 2.5, linear)),
        *(lookup, event("aten::bmm", 0.25, event("aten::matmul", 0.3, lookup))),
        event("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 2.0),
        event("memplus data", 0.5),
        event("aten::mul", 1.5),
    ]
    shares = part_shares(events, seconds=10.0)
    assert list(shares) == list(PARTS)
    assert list(shares.values()) == pytest.approx([0.25, 0.2, 0.05, 0.1, 0.05, 0.35])


def test_phases_take_turns_and_medians_leave_out_their_first_steps(monkeypatch):
    opened = []

    @contextlib.contextmanager
    def busy(count):
        opened.append("busy")
        yield
        opened.append("alone")

    class Profile(contextlib.AbstractContextManager):
        def __init__(self, activities):
            opened.append("profile")

        def __exit__(self, *error):
            opened.append("end")

        def events(self):
            return [event("aten::mm", 0.5)]

    monkeypatch.setattr(measured_steps, "busy_loops", busy)
    monkeypatch.setattr(measured_steps, "profile", Profile)
    steps = MeasuredSteps(rounds=2, steps=1)
    # three steps of warm-up, then an untimed and a timed one of each phase
    speeds = [1, 1, 1, 1, 10, 1, 4, 1, 20, 1, 6, 1, 50]
    assert steps.count == len(speeds)
    with pytest.raises(AllMeasured):
        for speed in speeds:
            assert steps.on_step(SimpleNamespace(tokens_per_s=speed), num_tokens=100)
    assert opened == ["busy", "alone", "busy", "alone", "profile", "end"]
    assert steps.tokens_per_s[QUIET] == 15 and steps.tokens_per_s[BUSY] == 5
    assert steps.shares()["products"] == 0.25  # 0.5 of 2 seconds


def test_what_cannot_be_measured_is_refused(tmp_path, capsys, monkeypatch):
    file = tmp_path / "train.toml"
    file.write_text(CONFIG + 'device = "cuda"\n')
    assert main(["bench", "train-run", str(file)]) == 2
    assert "run.device must be cpu, not cuda" in capsys.readouterr().err
    assert main(["bench", "train-run", "--rounds", "0"]) == 2
    assert "--rounds: must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr(run, "EXAMPLES", tmp_path)
    assert main(["bench", "train-run"]) == 2
    assert "has no examples" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_measured_and_its_shares_add_up(tmp_path, capsys, monkeypatch):
    # it writes no checkpoint, so it needs no disk for one
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    texts, file, results = (tmp_path / name for name in ("a.txt", "train.toml", "r.json"))
    words = ["red", "green", "blue", "one", "two", "three"]
    texts.write_text("\n".join(f"{a} {b} makes {b} {a}" for a in words for b in words))
    text = CONFIG.replace("{texts}", str(texts))
    file.write_text(text.replace("[data]", f"{MEMORY}\n[data]"))
    rounds = ["--rounds", "1", "--steps", "1", "--json", str(results)]
    assert main(["bench", "train-run", str(file), *rounds]) == 0
    (found,) = json.loads(results.read_text())
    assert found["config"] == str(file) and found["tokens_per_step"] == 128
    assert sum(found[part] for part in PARTS) == pytest.approx(1)
    assert all(found[part] > 0 for part in PARTS)
    assert found["quiet_tokens_per_s"] > 0 and found["busy_tokens_per_s"] > 0
    heading, line = capsys.readouterr().out.splitlines()[:2]
    assert heading.split()[:3] == ["config", "quiet", "busy"] and line.startswith(str(file))
