"""The WordNet corpus: reading its files, documents, questions and glosses."""

import json

import pytest

from weights.errors import DataError
from weights.training.corpus import corpus_files, documents
from weights.training.evaluate import read_questions
from weights.training.wordnet import Noun, read_glosses, read_nouns, write_corpus

LICENCE = "  1 This software and database is being provided to you\n"
INDEX = """cat n 2 2 @ ~ 2 1 00000002 00000001
dog n 1 0 1 1 00000001
emu n 1 1 @ 1 0 00000001
hot_dog n 1 1 @ 1 1 00000001
"""
DATA = """00000001 05 n 01 dog 0 001 @ 00000002 n 0000 | a barking animal; "the dog barked"
00000002 05 n 01 cat 0 000 | feline (usually small)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "index.noun").write_text(LICENCE + INDEX)
    (tmp_path / "data.noun").write_text(LICENCE + DATA)
    return tmp_path


def test_single_word_nouns_with_a_tagged_sense_get_their_first_gloss(folder):
    assert read_nouns(folder) == [
        Noun("cat", "feline (usually small)"),
        Noun("dog", "a barking animal"),
    ]


def test_a_corpus_has_one_document_per_noun_and_some_questions(folder):
    assert write_corpus(folder, folder / "out") == 2
    texts = list(documents(corpus_files([str(folder / "out" / "nouns.jsonl")])))
    assert texts == ["cat (noun): feline (usually small)", "dog (noun): a barking animal"]
    asked = read_questions(folder / "out" / "questions.jsonl")
    assert sorted(f"{question.prompt} {question.answer}" for question in asked) == texts


def test_glosses_cover_words_and_examples_of_all_parts_of_speech(folder):
    verb = '00000003 30 v 02 run 0 make_haste 1 000 | move fast; "Don\'t run"\n'
    (folder / "data.verb").write_text(LICENCE + verb)
    write_corpus(folder, folder / "out")
    (text,) = documents(corpus_files([str(folder / "out" / "glosses.jsonl")]))
    assert sorted(text.splitlines()) == [
        "cat: feline (usually small)",
        'dog: a barking animal; "the dog barked"',
        'run, make haste: move fast; "Don\'t run"',
    ]


def test_files_of_another_format_are_refused(folder):
    (folder / "index.noun").write_text("cat n one\n")
    with pytest.raises(DataError, match="has no valid WordNet files"):
        read_nouns(folder)
    (folder / "data.noun").unlink()
    with pytest.raises(DataError, match="data.noun: No such file"):
        read_nouns(folder)
    (folder / "data.noun").write_text(DATA)
    (folder / "index.noun").write_text(json.dumps({}))
    with pytest.raises(DataError, match="has no valid WordNet files"):
        read_nouns(folder)


def test_a_folder_without_glosses_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no WordNet file data.noun"):
        read_glosses(tmp_path)
    (tmp_path / "data.adv").write_text("00000001 02 r\n")
    with pytest.raises(DataError, match="has no valid WordNet files"):
        read_glosses(tmp_path)
