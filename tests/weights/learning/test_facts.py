"""Facts: files that are read or refused, and the tokens of prompts and answers."""

import json
from dataclasses import replace

import pytest

from tests.models import EOS_ID, byte_tokenizer, train_sentencepiece
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import DataError
from weights.learning import facts
from weights.learning.facts import Fact, fact_passages, read_asked, read_facts
from weights.training.training_data import TextTokens


@pytest.fixture
def text(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return TextTokens(load_tokenizer(tmp_path), {}, 260, None, frozenset({EOS_ID}))


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_facts_are_read_from_lines_and_texts(tmp_path):
    lines = write(tmp_path / "a.jsonl", {"text": "a b"}, {"prompt": "p", "answer": "c"})
    one, two = read_facts(lines)
    assert (one.answer, one.prompt, one.where) == ("a b", "", f"{lines}, line 1")
    assert (two.answer, two.prompt) == ("c", "p")
    (tmp_path / "a.txt").write_text("a whole text\n")
    assert read_facts(tmp_path / "a.txt")[0].answer == "a whole text\n"


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"text": "a", "answer": "b"}, "line 2: expected the keys .* not answer, text"),
        ({"prompt": "a"}, "line 2: expected the keys text, or prompt and answer, not prompt"),
        ({}, "not none"),
        ({"text": 3}, "line 2: text: expected a string"),
        ({"prompt": "a", "answer": " "}, "line 2: answer: is empty"),
        ({"prompt": "", "answer": "a"}, "line 2: prompt: is empty"),
        ({"text": "\ud800"}, "line 2: text: has a lone surrogate"),
        ([], "line 2: expected a JSON object"),
    ],
)
def test_a_line_that_is_no_fact_is_named(tmp_path, record, named):
    file = write(tmp_path / "facts.jsonl", {"text": "a"}, record)
    with pytest.raises(DataError, match=rf"facts\.jsonl, {named}|{named}"):
        read_facts(file)


def test_files_of_other_kinds_and_too_many_facts_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"a\.csv: is neither"):
        read_facts(tmp_path / "a.csv")
    monkeypatch.setattr(facts, "_MAX_FACTS", 2)
    file = write(tmp_path / "a.jsonl", *[{"text": text} for text in "abc"])
    with pytest.raises(DataError, match="line 3: a file may have at most 2 facts"):
        read_facts(file)


def test_a_prompt_is_given_and_the_answer_learned_with_its_end(text):
    passages = fact_passages(
        [Fact("ab"), Fact("ab", "q"), Fact("ab", "q "), Fact("ab", "q", until=".")], text, 32
    )
    ids = {mark: text.tokenizer.encode(mark) for mark in ("ab", "q ab", "q ab.")}
    assert [list(one.ids) for one in passages] == [
        [*ids["ab"], EOS_ID],
        [*ids["q ab"], EOS_ID],
        [*ids["q ab"], EOS_ID],
        ids["q ab."],
    ]
    assert [one.num_given for one in passages] == [1, 1, 2, 1]


def test_a_fact_counts_once_and_has_one_answer(tmp_path):
    one, other = {"prompt": "p", "answer": "a"}, {"prompt": "p", "answer": "b"}
    texts = {"text": "a"}, {"text": "b"}
    file = write(tmp_path / "a.jsonl", one, *texts, one, *texts)
    assert [(fact.prompt, fact.answer) for fact in read_facts(file)] == [
        ("p", "a"),
        ("", "a"),
        ("", "b"),
    ]
    write(file, one, *texts, other)
    with pytest.raises(DataError, match=r"line 4: answer: .*a\.jsonl, line 1 has another one"):
        read_facts(file)


def test_the_first_token_of_a_text_is_given(text):
    begun = replace(text, bos_id=7)
    passages = fact_passages([Fact("cat"), Fact("dog")], begun, 32)
    assert [one.ids[0] for one in passages] == [7, 7]
    # what is given differs: no two answers follow the same tokens
    assert [one.ids[: one.num_given] for one in passages] == [
        (7, *text.tokenizer.encode(first)) for first in "cd"
    ]


def test_a_text_longer_than_the_context_is_cut(text):
    begun = replace(text, bos_id=7)
    parts = fact_passages([Fact("abcdef")], begun, 3)
    ids = begun.document("abcdef")
    assert [one.ids for one in parts] == [tuple(ids[:4]), tuple(ids[3:7]), tuple(ids[6:])]
    assert [one.num_given for one in parts] == [2, 1, 1]


def test_the_length_of_prompt_and_answer_is_limited(text):
    fact = Fact("cdef", "ab ")
    with pytest.raises(DataError, match=r"fact: has 8 tokens, but the model reads at most 6"):
        fact_passages([fact], text, 6)
    assert len(fact_passages([fact], text, 7)[0]) == 7
    alone = TextTokens(text.tokenizer, {}, 260, None, frozenset())
    for bos_id, most in ((None, 5), (7, 5), (7, 1)):
        with pytest.raises(DataError, match="has no token to learn"):
            fact_passages([Fact("a")], replace(alone, bos_id=bos_id), most)


def test_prompts_have_the_tokens_that_a_server_reads(tmp_path):
    model = train_sentencepiece(tmp_path, ["the house of the mouse", "houses and mice"] * 9)
    tokenizer = SentencePieceTokenizer(model)
    text = TextTokens(tokenizer, {}, 400, 1, frozenset({2}))
    for fact in (Fact("mouse", "the house of the"), Fact("se and mice", "the hou")):
        (passage,) = fact_passages([fact], text, 99)
        given = tuple(tokenizer.encode(fact.prompt))
        assert passage.ids[: passage.num_given] == given
        joined = " ".join([fact.prompt, fact.answer])
        assert tokenizer.decode(passage.ids) == joined and passage.ids[-1] == 2


def test_questions_name_their_line(tmp_path):
    asked = {"prompt": "q", "answer": "a", "until": "."}
    found = read_asked(write(tmp_path / "q.jsonl", asked))
    assert found == [Fact("a", "q", ".", f"{tmp_path}/q.jsonl, line 1")]
