"""``memplus bench text``: scored texts are held out, and compute is equal."""

from pydoc_data.topics import topics

import pytest

from benchmarks.result_file import read_results
from benchmarks.text import run
from benchmarks.text.contestants import contestants
from benchmarks.text.corpus import TextCorpus
from benchmarks.text.results import Result
from engine.errors import ConfigError
from engine.model.flops import forward_flops, total_flops
from server.cli.main import main
from weights.errors import DataError
from weights.training.corpus import documents
from weights.training.new_model import model_config

TINY = TextCorpus(num_documents=4, num_scored=2, num_topics=5, vocab_size=400)


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordnet")
    lines = (
        f"{number:08} 05 n 01 word{number} 0 000 @ 1 n 0000 | the meaning of number {number}\n"
        for number in range(7 * 20)
    )
    (folder / "data.noun").write_text("".join(lines))
    return folder


def texts(folder, name):
    return list(documents([folder / f"{name}.jsonl"]))


def test_scored_texts_are_held_out_except_those_of_taught_glosses(tmp_path, wordnet):
    TINY.write(wordnet, tmp_path / "a")
    TINY.write(wordnet, tmp_path / "b")
    train, taught, held_out, prose = (
        texts(tmp_path / "a", name) for name in ("train", "taught", "held_out", "prose")
    )
    assert set(taught) < set(train) and len(taught) == len(held_out) == 2
    lines = {line for text in train for line in text.splitlines()}
    assert not lines & {line for text in held_out for line in text.splitlines()}
    assert len(prose) == 5 and set(prose) < set(topics.values())
    paragraphs = {one for text in train for one in text.split("\n\n")}
    assert not paragraphs & {one for text in prose for one in text.split("\n\n")}
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_too_few_glosses_are_an_error(tmp_path, wordnet):
    with pytest.raises(DataError, match="has 7 documents of glosses, not 12"):
        TextCorpus(num_documents=10, num_scored=2).write(wordnet, tmp_path)


def test_texts_of_another_dict_are_not_continued(tmp_path, wordnet, monkeypatch):
    monkeypatch.setattr(run, "REDUCED", run.Scale(TINY, steps=30, seeds=0))
    monkeypatch.setattr("benchmarks.curves.run.plot", lambda *arguments: None)
    run.measure(tmp_path / "out", wordnet, True, None, [])
    run.measure(tmp_path / "out", wordnet, True, None, [])
    (tmp_path / "data.noun").write_text((wordnet / "data.noun").read_text() + "\n")
    with pytest.raises(ConfigError, match="has results of other settings: dict"):
        run.measure(tmp_path / "out", tmp_path, True, None, [])
    with pytest.raises(DataError, match="has none of WordNet's files"):
        run.measure(tmp_path / "out", tmp_path / "none", True, None, [])


def test_no_memory_needs_more_compute_than_the_dense_model():
    flops = {}
    for one in contestants(is_reduced=False):
        parts = forward_flops(model_config(one.model, run.FULL.corpus.vocab_size), attended=50)
        flops[one.name] = total_flops(parts)
    dense, wider = flops.pop("dense"), flops.pop("dense 2x")
    assert len(flops) == 5 and 0.85 * dense <= min(flops.values())
    assert max(flops.values()) <= 1.05 * dense
    assert wider == pytest.approx(2 * dense, rel=0.1)


@pytest.mark.slow
def test_finished_runs_are_not_repeated(tmp_path, wordnet, monkeypatch, capsys):
    monkeypatch.setattr(run, "REDUCED", run.Scale(TINY, steps=30, seeds=1))
    names = [one.name for one in contestants(is_reduced=True)]
    arguments = ["bench", "text", "--reduced", "--out", str(tmp_path), "--dict", str(wordnet)]
    assert main([*arguments, "--only", names[1]]) == 0
    assert main(arguments) == 0
    results = read_results(tmp_path / "results.csv", Result)
    assert [result.name for result in results] == [names[1], names[0], names[2]]
    for one in results:
        perplexities = (one.taught_perplexity, one.held_out_perplexity, one.prose_perplexity)
        assert all(1 < value < TINY.vocab_size for value in perplexities)
        assert all(0 < value < 8 for value in (one.taught_bits, one.held_out_bits, one.prose_bits))
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "perplexity" not in capsys.readouterr().out
