"""Parts: figures and failures are saved at once, and a second run measures what is missing."""

import json
import os

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.card import Card
from benchmarks.gpu.card_limits import LIMIT_NAMES, CardLimits
from benchmarks.gpu.figures import Figure, FigureFile
from benchmarks.gpu.options import PARTS, GpuCheck
from benchmarks.gpu.part import Skipped, Task, run_tasks
from benchmarks.kernel_shapes import Shapes
from benchmarks.memory.load import default_trace
from engine.errors import ConfigError

CARD = Card("a card", {"torch": "2.11.0", "triton": "3.6.0", "commit": None})


def lines(folder, part="fake"):
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


class FakePart:
    """Three tasks, of which the second fails after its first figure, and the third may be wrong."""

    def __init__(self, is_wrong=False, fails=True):
        self.asked = []
        self.is_wrong, self.fails = is_wrong, fails

    def tasks(self):
        yield Task(("a", "b"), self._first)
        yield Task(("c", "d"), self._second)
        yield Task(("e",), self._third)

    def _first(self, wanted):
        self.asked.append(wanted)
        yield from (Figure(name, 2.0, "us", bound=1.0) for name in wanted)

    def _second(self, wanted):
        self.asked.append(wanted)
        for name in wanted:
            if name == "d" and self.fails:
                raise RuntimeError("out of luck\nand more")
            yield Figure(name, 3.0, "tokens/s", bound=4.0)

    def _third(self, wanted):
        self.asked.append(wanted)
        yield Figure("e", 0.5, "of tokens", bound=1.0, is_wrong=self.is_wrong)


def test_figures_are_saved_with_card_and_share_and_a_failure_is_a_line(tmp_path, capsys):
    part = FakePart()
    assert not run_tasks(part.tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    assert part.asked == [["a", "b"], ["c", "d"], ["e"]]
    saved = lines(tmp_path)
    assert [line["name"] for line in saved] == ["a", "b", "c", "c", "e"]
    assert saved[0]["share"] == 0.5 and saved[2]["share"] == 0.75 and saved[4]["share"] is None
    assert saved[3]["error"] == "RuntimeError: out of luck" and "value" not in saved[3]
    assert all(line["card"] == "a card" and line["triton"] == "3.6.0" for line in saved)
    assert all(line["part"] == "fake" for line in saved)
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: out of luck\n" in printed and "bound 4" in printed


@pytest.mark.slow
def test_a_second_run_measures_what_is_missing_or_wrong_and_again_everything(tmp_path):
    run_tasks(FakePart(is_wrong=True).tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    second = FakePart(fails=False)
    assert run_tasks(second.tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    assert second.asked == [["d"], ["e"]]
    third = FakePart(fails=False)
    assert run_tasks(third.tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    assert not third.asked
    assert run_tasks(third.tasks(), FigureFile(tmp_path, "fake", CARD), again=True)
    assert third.asked == [["a", "b"], ["c", "d"], ["e"]]


def test_a_wrong_figure_fails_the_run(tmp_path, capsys):
    part = FakePart(is_wrong=True, fails=False)
    assert not run_tasks(part.tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cut_line_and_another_cards_lines_do_not_count(tmp_path):
    run_tasks(FakePart(fails=False).tasks(), FigureFile(tmp_path, "fake", CARD), again=False)
    other = FakePart(fails=False)
    another = Card("another card", CARD.versions)
    run_tasks(other.tasks(), FigureFile(tmp_path, "fake", another), again=False)
    assert len(other.asked) == 3
    file = tmp_path / "fake.jsonl"
    file.write_text(file.read_text()[:-20])
    cut = FakePart(fails=False)
    run_tasks(cut.tasks(), FigureFile(tmp_path, "fake", another), again=False)
    assert cut.asked == [["e"]]
    assert FigureFile(tmp_path, "fake", another).value("e") == 0.5


def test_what_a_machine_cannot_measure_is_a_line_and_no_failure(tmp_path, capsys):
    def skip(wanted):
        raise Skipped("no such package")
        yield

    task = Task(("a",), skip)
    assert run_tasks([task], FigureFile(tmp_path, "fake", CARD), again=False)
    assert lines(tmp_path)[0]["skipped"] == "no such package"
    assert FigureFile(tmp_path, "fake", CARD).missing(["a"]) == ["a"]


@pytest.fixture
def on_a_card(monkeypatch):
    """Runs parts without a process or a GPU; returns the jobs, and results to set by name."""
    jobs, codes = [], {}
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(run.Card, "found", lambda: CARD)

    def in_process(target, job):
        assert target is run.run_part
        jobs.append((job.name, job.is_core))
        return codes.get(job.name, 0)

    monkeypatch.setattr(run, "in_process", in_process)
    return jobs, codes


def measure(folder, *parts):
    check = GpuCheck(part=parts) if parts else GpuCheck()
    return run.measure(check, Shapes(), default_trace(), folder / "out")


def test_parts_run_in_order_after_the_limits_of_the_card(on_a_card, tmp_path):
    jobs, codes = on_a_card
    assert measure(tmp_path) == 0
    assert jobs == [("card", False), *((name, False) for name in PARTS)]
    jobs.clear()
    codes["decode"] = 1
    assert measure(tmp_path, "core", "http", "tables") == 1
    wanted = [("correctness", True), ("decode", True), ("tables", False), ("http", False)]
    assert jobs == [("card", False), *wanted]


def test_a_process_that_dies_is_a_failure_of_its_part_and_the_next_runs(on_a_card, tmp_path):
    jobs, codes = on_a_card
    codes["decode"] = -11
    assert measure(tmp_path, "decode", "http") == 1
    assert len(jobs) == 3
    assert lines(tmp_path / "out", "decode")[0]["error"] == "ended with code -11"


def test_without_the_limits_nothing_else_runs(on_a_card, tmp_path):
    jobs, codes = on_a_card
    codes["card"] = 1
    assert measure(tmp_path, "decode") == 1
    assert jobs == [("card", False)]


def die(job):
    os._exit(7)


def test_a_part_runs_in_a_process(tmp_path):
    job = run.PartJob("fake", False, GpuCheck(), Shapes(), default_trace(), tmp_path)
    assert run.in_process(die, job) == 7


def test_a_part_that_cannot_begin_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(run.Card, "found", lambda: CARD)
    job = run.PartJob("decode", False, GpuCheck(), Shapes(), default_trace(), tmp_path)
    with pytest.raises(SystemExit) as end:
        run.run_part(job)  # the card has no limits yet
    assert end.value.code == 1
    assert "limits" in lines(tmp_path, "decode")[0]["error"]


def test_limits_come_from_their_figures():
    values = dict(zip(LIMIT_NAMES, (3000.0, 800.0, 54.0), strict=True))
    limits = CardLimits.of(values.get)
    assert limits == CardLimits(device=3000.0, tflops=800.0, bus=54.0)
    assert limits.machine.gb_per_s == 3000 and limits.machine.gflops == 800_000


def test_a_cache_share_out_of_range_is_rejected():
    with pytest.raises(ConfigError, match="cache_share: 0 is not in"):
        GpuCheck(cache_share=0)
