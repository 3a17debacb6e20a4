"""``memplus bench retrofit``: contestants train what they should, and results resume."""

import json
import math

import pytest
import torch

from benchmarks.result_file import read_results
from benchmarks.retrofit import run
from benchmarks.retrofit.contestants import BASE, contestants
from benchmarks.retrofit.corpus import GlossCorpus
from benchmarks.retrofit.results import RetrofitResult
from benchmarks.retrofit.scores import score_answers
from engine.errors import ConfigError
from server.cli.main import main
from tests.models import random_model, save_model, tiny_config
from weights.learning.scores import exact_answers
from weights.training.loss import batch_loss
from weights.training.new_model import model_config
from weights.training.packing import Passage, packed

TINY = run.Scale(GlossCorpus(4, 3, 2, topic_letters=60), 12, tokens_per_step=64, num_subkeys=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(5)
    model = random_model(tiny_config(num_layers=4))
    return save_model(model, tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordnet")
    words = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen"]
    index = (f"{word} n 1 0 1 1 {n:08}\n" for n, word in enumerate(words))
    data = (f"{n:08} 05 n 01 {word} 0 000 | animal {n}\n" for n, word in enumerate(words))
    (folder / "index.noun").write_text("".join(index))
    (folder / "data.noun").write_text("".join(data))
    return folder


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def runs(folder, base, wordnet, **changes):
    values = {"scale": TINY, "seeds": 1, "only": [BASE]} | changes
    return run.RetrofitRuns(folder, base, wordnet, **values)


def test_a_corpus_asks_what_it_teaches_and_scores_other_definitions(wordnet, tmp_path):
    TINY.corpus.write(wordnet, tmp_path / "a")
    TINY.corpus.write(wordnet, tmp_path / "b")
    facts, questions, glosses, prose = (
        records(tmp_path / "a" / f"{name}.jsonl")
        for name in ("facts", "questions", "glosses", "prose")
    )
    assert [one["text"] for one in facts] == [f"{q['prompt']} {q['answer']}" for q in questions]
    assert len({one["text"] for one in (*facts, *glosses)}) == 4 + 3
    assert len(prose) == 2 and all(len(one["text"]) <= 60 for one in prose)
    for file in (tmp_path / "a").iterdir():
        assert file.read_text() == (tmp_path / "b" / file.name).read_text()
    with pytest.raises(ConfigError, match="dict: .* has 8 nouns, but 9 are needed"):
        GlossCorpus(5, 4, 1).write(wordnet, tmp_path / "c")


def test_every_contestant_tries_equally_many_rates_and_starts_from_the_same_model(base):
    tried = {len(one.lrs) for one in contestants() if one.name != BASE}
    assert len(tried) == 1 and tried != {0}
    before = tiny_config(num_layers=4)
    for one in contestants():
        made = model_config(one.model(before, 32), before.vocab_size, str(base))
        assert (made.memory_layers == (1, 2, 3)) == (one.memory is not None)
        is_beside = one.memory is not None and "placement" in one.memory
        assert is_beside == ("beside" in one.name)


def test_answers_are_scored_without_their_prompts():
    model = random_model(tiny_config())
    passages = [Passage((3, 10 + n, 40 + n, 9), num_given=2) for n in range(5)]
    recall, loss = score_answers(model, passages)
    assert recall == sum(exact_answers(model, passages)) / 5
    whole = batch_loss(model, packed(passages), torch.float32).nats
    assert loss == pytest.approx(float(whole) / 10, rel=1e-4)


@pytest.mark.slow
def test_contestants_train_and_finished_runs_are_not_repeated(
    base, wordnet, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "REDUCED", TINY)
    names = [one.name for one in contestants()]
    arguments = ["bench", "retrofit", "--reduced", "--model", str(base), "--dict", str(wordnet)]
    arguments += ["--out", str(tmp_path)]
    assert main([*arguments, "--only", BASE, "--only", names[-1]]) == 0
    found = read_results(tmp_path / "results.csv", RetrofitResult)
    assert [one.name for one in found] == [BASE, names[-1], names[-1]]
    assert main(arguments) == 0
    results = {
        (one.name, one.lr): one for one in read_results(tmp_path / "results.csv", RetrofitResult)
    }
    assert {key[0] for key in results} == set(names)
    assert len(results) == 1 + 2 * (len(names) - 1)
    untrained = results[BASE, 0.0]
    assert untrained.tokens == untrained.weights == 0
    for (name, _), one in results.items():
        assert 0 <= one.recall <= 1 and math.isfinite(one.answer_loss + one.gloss_perplexity)
        if name != BASE:
            # what replaces a feed-forward must first learn what that did
            assert one.answer_loss < untrained.answer_loss or name.startswith("replaced")
            assert (one.table_values > 0) == ("no memory" not in name)
    assert not list(tmp_path.glob("runs/*/checkpoints")) + list(tmp_path.glob("runs/*/adapter"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "recall" not in capsys.readouterr().out


def test_invalid_options_and_results_of_another_scale_are_rejected(
    base, memory_plus_folder, wordnet, tmp_path
):
    with pytest.raises(ConfigError, match="only: 'sparse' is unknown; must be one of 'base', "):
        run.measure(runs(tmp_path, base, wordnet, only=["sparse"]))
    with pytest.raises(ConfigError, match="seeds: must be at least 1, not 0"):
        run.measure(runs(tmp_path, base, wordnet, seeds=0))
    with pytest.raises(ConfigError, match="needs more than 3 layers and no memory layers"):
        run.measure(runs(tmp_path, memory_plus_folder, wordnet))
    run.measure(runs(tmp_path, base, wordnet))
    with pytest.raises(ConfigError, match="has results of other settings: scale"):
        run.measure(runs(tmp_path, base, wordnet, scale=run.REDUCED))
    other = tmp_path / "wordnet"
    other.mkdir()
    (other / "data.noun").write_text("another")
    with pytest.raises(ConfigError, match="has results of other settings: dict"):
        run.measure(runs(tmp_path, base, other))
