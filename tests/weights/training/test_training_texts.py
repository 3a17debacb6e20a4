"""Division of documents into those to train on and those held out."""

import json

import pytest

from weights.errors import DataError
from weights.training.train_config import DataConfig
from weights.training.training_texts import TrainingTexts


@pytest.fixture
def texts(tmp_path):
    def make(*contents, share=0.01, **settings):
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        lines = (json.dumps({"text": text}) for text in contents)
        (folder / "a.jsonl").write_text("\n".join(lines))
        config = DataConfig((str(folder),), validation_share=share, **settings)
        return TrainingTexts(config, seed=0)

    return make


def split(made):
    held_out = made.held_out()
    return list(made.train()), None if held_out is None else list(held_out)


LONG = " ".join(f"word{number}" for number in range(3000))


def test_a_corpus_of_one_document_is_divided_inside_it(texts):
    made = texts(LONG)
    (train,), (held_out,) = split(made)
    assert train + held_out == LONG and 1000 <= len(held_out) < 1020
    assert held_out.startswith("word") and "the end of the longest document" in made.describe()[1]
    (train,), (held_out,) = split(texts(LONG, share=0.9))
    assert train + held_out == LONG and len(train) >= len(LONG) // 2 - 10


def test_the_end_of_the_longest_of_few_documents_is_held_out(texts):
    train, held_out = split(texts("one", LONG, "two"))
    assert (train[0], train[2]) == ("one", "two") and train[1] + held_out[0] == LONG
    # no word ends there
    train, held_out = split(texts("x" * 60, share=0.1))
    assert (train, held_out) == (["x" * 54], ["x" * 6])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.999])
def test_a_share_of_many_documents_is_held_out(texts, share):
    contents = [f"text {number}" for number in range(200)]
    made = texts(*contents, share=share)
    train, held_out = split(made)
    assert sorted(train + held_out) == sorted(contents) and train
    assert len(held_out) == min(round(200 * share), 199)
    assert f"held out: {len(held_out)} of these documents" in made.describe()[1]
    assert split(texts(*contents, share=share)) == (train, held_out)


def test_some_text_to_train_on_is_always_left(texts):
    assert split(texts("short")) == (["short"], None)
    assert "held out: nothing" in texts("short").describe()[1]
    assert split(texts("one", "two", share=0)) == (["one", "two"], None)
    assert split(texts("one", "two", share=0.99)) in ((["one"], ["two"]), (["two"], ["one"]))


def test_held_out_files_are_not_trained_on(texts, tmp_path):
    validation = tmp_path / "texts" / "b.txt"
    texts("one")
    validation.write_text("two")
    (tmp_path / "texts" / "notes.md").touch()
    made = texts("one", validation=(str(validation),))
    assert split(made) == (["one"], ["two"])
    assert made.describe()[0] == "texts: files 1, documents 1, characters 3"
    assert made.describe()[-1] == "not read: 1 of other kinds (.md)"
    with pytest.raises(DataError, match="all files are in data.validation"):
        texts("one", validation=(str(tmp_path / "texts"),))


def test_every_document_is_checked(texts, tmp_path):
    validation = tmp_path / "held.txt"
    validation.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="held.txt: not UTF-8"):
        texts("one", validation=(str(validation),)).check()
    with pytest.raises(DataError, match="a.jsonl, line 2: is empty"):
        texts("one", "").check()
