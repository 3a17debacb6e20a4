"""Evaluation: scores of texts against plain logits, of questions against a plain loop."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from server.cli import model_scores
from server.cli.main import main
from server.model_loading import load_served
from tests.models import (
    EOS_ID,
    engine_of,
    plain_greedy,
    plain_logits,
    random_model,
    save_model,
    tiny_config,
)
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import DataError
from weights.training import evaluate
from weights.training.evaluate import Question, read_questions, score_recall, score_texts
from weights.training.training_data import checkpoint_text

TEXTS = ["a red fox", "b", "two things, and more of them: " * 3, "häuser"]


@pytest.fixture
def model():
    return random_model(tiny_config(max_positions=32))


@pytest.fixture
def folder(model, tmp_path):
    return save_model(model, tmp_path / "model")


def test_texts_are_scored_token_by_token(model, folder):
    text = checkpoint_text(folder)
    nats, tokens = 0.0, 0
    for one in TEXTS:
        ids = text.document(one)
        for first in range(0, len(ids) - 1, 32):
            piece = ids[first : first + 33]
            logs = plain_logits(model, piece[:-1]).double().log_softmax(-1)
            nats -= float(logs.gather(1, torch.tensor(piece[1:])[:, None]).sum())
            tokens += len(piece) - 1
    found = score_texts(model, text, iter(TEXTS))
    assert (found.documents, found.tokens) == (4, tokens)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    num_bytes = sum(len(one.encode()) for one in TEXTS)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_a_name_of_a_token_beyond_the_vocabulary_is_refused(model, folder):
    text = checkpoint_text(folder)
    largest = max(text.encode(TEXTS[0]))
    name = re.escape(text.tokenizer.token_name(largest))
    fewer = replace(text, vocab_size=largest)
    with pytest.raises(DataError, match=f"^texts: contain {name}, .* only {largest} tokens"):
        score_texts(model, fewer, iter(TEXTS[:1]))


def greedy_text(model, tokenizer, prompt, count):
    return tokenizer.decode(plain_greedy(model, tokenizer.encode(prompt), count))


def test_an_answer_must_match_in_every_character(model, folder):
    tokenizer = load_tokenizer(folder)
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01), frozenset({EOS_ID}))
    text = greedy_text(model, tokenizer, "fox", 20)
    end = text[3]
    right, _, rest = text.partition(end)
    questions = [
        Question("fox", right.strip(), until=end),
        Question("fox", right.strip() + "x", until=end),
        Question("fox", "x" + right.strip(), until=end),
        # wrong: without an end mark the text continues after the answer
        Question("fox", right.strip()),
        # wrong: the text never reaches this end mark
        Question("fox", text[:2], until="\0"),
    ]
    found = score_recall(engine, tokenizer, questions)
    assert (found.questions, found.right, found.recall) == (5, 1, 0.2) and rest


def test_an_end_token_ends_an_answer(model, folder):
    tokenizer = load_tokenizer(folder)
    ids = plain_greedy(model, tokenizer.encode("fox"), 6)
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01), frozenset({ids[5]}))
    answer = tokenizer.decode(ids[:5]).strip()
    assert ids[5] not in ids[:5]
    assert score_recall(engine, tokenizer, [Question("fox", answer)]).right == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}', "line 1: expected the keys prompt, answer .* not prompt"),
        ('{"prompt": "a", "answer": "b", "where": "c"}', "line 1: expected .* not answer, prompt"),
        ('{"prompt": "a", "answer": 3}', "line 1: answer: expected a string"),
        ('{"prompt": "", "answer": "b"}', "line 1: prompt: is empty"),
        ('{"prompt": "a", "answer": "  "}', "line 1: answer: is empty"),
        (r'{"prompt": "\ud800", "answer": "b"}', "line 1: prompt: has a lone surrogate"),
        (r'{"prompt": "a", "answer": "\ud800"}', "line 1: answer: has a lone surrogate"),
        (
            r'{"prompt": "a", "answer": "b", "until": "\ud800"}',
            "line 1: until: has a lone surrogate",
        ),
        (
            '{"prompt": "a", "answer": "b. c", "until": "."}',
            "line 1: the answer must not contain until",
        ),
    ],
)
def test_invalid_questions_are_refused(tmp_path, line, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message):
        read_questions(file)


def test_questions_are_read_line_by_line_and_stripped(tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = ['{"prompt": "a\u2028b", "answer": " two "}', "", '{"prompt": "c", "answer": "d"}']
    file.write_text("\n".join(lines), encoding="utf-8")
    found = read_questions(file)
    assert found == [Question("a\u2028b", "two"), Question("c", "d")]
    assert [one.where for one in found] == [f"{file}, line {number}" for number in (1, 3)]


def test_the_number_of_questions_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_MAX_QUESTIONS", 2)
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    with pytest.raises(DataError, match="line 3: a file may have at most 2 questions"):
        read_questions(file)


def test_a_long_text_is_scored_in_pieces(model, folder, monkeypatch):
    sizes = []
    loss = evaluate.batch_loss

    def watched(model, batch, dtype):
        sizes.append(len(batch.ids_T))
        return loss(model, batch, dtype)

    monkeypatch.setattr(evaluate, "batch_loss", watched)
    found = score_texts(model, checkpoint_text(folder), iter(["long text " * 500]))
    assert (found.documents, found.tokens) == (1, sum(sizes)) and found.tokens >= 4999
    assert max(sizes) <= 1024 + 32


def test_an_engine_error_is_raised_not_counted_as_wrong(model, folder, monkeypatch):
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01))

    def broken(*arguments, **options):
        raise ArithmeticError("no such number")

    monkeypatch.setattr(engine._executor, "launch", broken)
    with pytest.raises(RuntimeError, match="ArithmeticError in the engine"):
        score_recall(engine, load_tokenizer(folder), [Question("fox", "jumps")])


def test_a_question_that_is_too_long_is_named(model, folder):
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01))
    questions = [Question("fox", "jumps"), Question("fox " * 99, "jumps", where="q, line 2")]
    with pytest.raises(DataError, match="q, line 2: .*prompt"):
        score_recall(engine, load_tokenizer(folder), questions)


def test_the_command_prints_and_writes_scores(folder, tmp_path, capsys, monkeypatch):
    loads = []

    def counted(options, folder, engine, device):
        loads.append(engine)
        return load_served(options, folder, engine, device)

    monkeypatch.setattr(model_scores, "load_served", counted)
    questions, texts, out = (tmp_path / name for name in ("q.jsonl", "a.txt", "scores.json"))
    questions.write_text(json.dumps({"prompt": "fox", "answer": "jumps"}))
    texts.write_text(TEXTS[0])
    arguments = ["eval", "--model", str(folder), "--questions", str(questions)]
    assert main([*arguments, "--json", str(out), str(texts)]) == 0
    # one load for texts and questions
    assert loads == [EngineConfig(max_patches=0)]
    scores = json.loads(out.read_text())
    assert scores["texts"]["documents"] == 1 and scores["questions"]["questions"] == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"model      {folder}\n") and scores["model"] == str(folder)
    assert "recall 0.000" in printed and f"loss {scores['texts']['loss']:.4f}" in printed
    assert main([*arguments, "--json", str(tmp_path / "no" / "scores.json")]) == 2
    assert "--json: folder" in capsys.readouterr().err
    assert main([*arguments, "--weight-dtype", "int8", str(texts)]) == 2
    assert "--weight-dtype: texts are scored with the weights" in capsys.readouterr().err
    assert main([*arguments, "--weight-dtype", "int8"]) == 0
    assert main(["eval", "--model", str(folder)]) == 2
    assert "TEXTS: none given; give text files, --questions, or both" in capsys.readouterr().err
