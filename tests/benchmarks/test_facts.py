"""``memplus bench facts``: questions match the facts, and finished runs are not repeated."""

import json
from dataclasses import replace

import pytest

from benchmarks.facts import run
from benchmarks.facts.contestants import contestants
from benchmarks.facts.people import ATTRIBUTES, PeopleCorpus
from benchmarks.facts.results import Result
from benchmarks.result_file import append_result, read_results
from engine.errors import ConfigError
from engine.model.flops import forward_flops, total_flops
from server.cli.main import main
from weights.training.new_model import model_config

TINY = PeopleCorpus(num_people=12, num_names=6, num_values=4, num_questions=9)


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_questions_ask_for_facts_with_synonyms_that_texts_never_use(tmp_path):
    TINY.write(tmp_path)
    texts = [record["text"] for record in records(tmp_path / "train.jsonl")]
    assert len(texts) == 8 * 12 and len(set(texts)) > 12
    facts = {}
    for text in texts:
        first, last, *pairs = text.split()
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            attribute = next(one for one in ATTRIBUTES if name in one)
            facts.setdefault((first, last, attribute), set()).add(value)
    assert len(facts) == 12 * 8 and all(len(values) == 1 for values in facts.values())
    questions = records(tmp_path / "questions.jsonl")
    assert len(questions) == 9
    for question in questions:
        first, last, name = question["prompt"].split()
        attribute = next(one for one in ATTRIBUTES if name in one)
        assert facts[first, last, attribute] == {question["answer"]}
        own = [text for text in texts if text.startswith(f"{first} {last} ")]
        assert not any(f" {name} " in text for text in own)
    assert TINY.bits == 12 * 8 * 2


def test_the_seed_determines_the_corpus(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        PeopleCorpus(12, 6, 4, 9, seed).write(tmp_path / name)
    a, b, c = ((tmp_path / name / "train.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_no_contestant_needs_more_compute_than_the_dense_models():
    flops = {}
    for one in contestants(is_reduced=False):
        parts = forward_flops(model_config(one.model, 803), attended=10)
        flops[one.name] = total_flops(parts)
    dense = flops["dense"]
    others = [cost for name, cost in flops.items() if not name.startswith("dense")]
    assert len(others) == 7 and max(others) <= 1.05 * dense
    assert flops["dense 2x"] == pytest.approx(2 * dense, rel=0.1)
    assert flops["dense 4x"] == pytest.approx(4 * dense, rel=0.1)


def test_results_survive_writing_and_reading(tmp_path):
    results = [
        Result("dense", "dense", 0, seed, 10, 20, 0, 30, 7.0, 0.5, 1.25, 3.5) for seed in (0, 1)
    ]
    for result in results:
        append_result(tmp_path / "results.csv", result)
    assert read_results(tmp_path / "results.csv", Result) == results
    assert read_results(tmp_path / "none.csv", Result) == []
    columns = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    (tmp_path / "other_order.csv").write_text(",".join(reversed(columns)) + "\n")
    append_result(tmp_path / "other_order.csv", results[1])
    assert read_results(tmp_path / "other_order.csv", Result) == results[1:]


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "REDUCED", run.Scale(TINY, exposures=40, seeds=1))
    names = [one.name for one in contestants(is_reduced=True)]
    arguments = ["bench", "facts", "--reduced", "--out", str(tmp_path)]
    assert main([*arguments, "--only", names[0], "--only", names[2]]) == 0
    assert [result.name for result in read_results(tmp_path / "results.csv", Result)] == names[::2]
    assert main(arguments) == 0
    results = read_results(tmp_path / "results.csv", Result)
    assert sorted(result.name for result in results) == sorted(names)
    assert all(0 <= result.recall <= 1 and result.perplexity >= 1 for result in results)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "recall" not in capsys.readouterr().out


def test_results_of_another_scale_are_rejected(tmp_path, monkeypatch):
    tiny = run.Scale(TINY, exposures=10, seeds=0)
    monkeypatch.setattr(run, "REDUCED", tiny)
    monkeypatch.setattr(run, "FULL", replace(tiny, exposures=11))
    monkeypatch.setattr("benchmarks.curves.run.plot", lambda *arguments: None)
    run.measure(tmp_path, True, None, [])
    with pytest.raises(ConfigError, match="has results of other settings: exposures"):
        run.measure(tmp_path, False, None, [])


def test_an_unknown_contestant_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="only: 'sparse' is unknown; must be one of dense, "):
        run.measure(tmp_path, True, None, ["sparse"])
