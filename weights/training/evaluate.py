"""Evaluation of a model: perplexity of texts, and closed-book recall of facts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.engine import Engine
from engine.errors import RequestError
from engine.model.transformer import Transformer
from engine.request import Request
from engine.sampling.params import SamplingParams
from weights.checkpoints.tokenizer import Tokenizer
from weights.errors import DataError
from weights.training.corpus import checked_text, encodable_text, json_objects
from weights.training.loss import batch_loss
from weights.training.packing import Passage, cut, packed_batches
from weights.training.training_data import TextTokens

_BATCH_TOKENS = 1024
_MAX_QUESTIONS = 100_000
# extra tokens, so that an answer that continues past the right one counts as wrong
_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class TextScore:
    """Scores of texts.

    Attributes:
        documents: number of documents.
        tokens: number of predicted tokens.
        loss: mean nats per token.
        perplexity: ``exp(loss)``.
        bits_per_byte: bits of all predictions per UTF-8 byte.
    """

    documents: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Question:
    """A prompt and the expected greedy continuation, up to ``until`` or the end of the text.

    ``where`` is the file and line of the question, for messages.
    """

    prompt: str
    answer: str
    until: str = ""
    where: str = field(default="question", compare=False)


@dataclass(frozen=True)
class RecallScore:
    """Closed-book recall: the fraction of answers that match exactly."""

    questions: int
    right: int
    recall: float


@torch.no_grad()
def score_texts(model: Transformer, text: TextTokens, texts: Iterator[str]) -> TextScore:
    """Score every token that follows another, with begin and end tokens as in training.

    Documents longer than the model's context are cut into parts that are scored separately.

    Raises:
        DataError: no document has two tokens.
    """
    documents, num_bytes = 0, 0

    def pieces() -> Iterator[Passage]:
        nonlocal documents, num_bytes
        for one in texts:
            documents += 1
            num_bytes += len(one.encode())
            yield from cut(text.document(one), model.config.max_positions)

    nats, tokens = 0.0, 0
    for batch in packed_batches(pieces(), _BATCH_TOKENS):
        nats += float(batch_loss(model, batch, torch.float32).nats)
        tokens += len(batch.ids_T)
    if not tokens:
        raise DataError("texts: no document has two tokens")
    loss = nats / tokens
    bits_per_byte = nats / math.log(2) / num_bytes
    return TextScore(documents, tokens, loss, math.exp(min(loss, 700.0)), bits_per_byte)


def read_questions(file: Path) -> list[Question]:
    """Read a JSONL file of questions: ``prompt``, ``answer`` and optionally ``until`` per line.

    Raises:
        DataError: a line is not such an object, or the file is empty or has more than 100,000
            questions; the message names file, line and key.
    """
    questions: list[Question] = []
    for where, record in json_objects(file):
        if len(questions) == _MAX_QUESTIONS:
            raise DataError(f"{where}: a file may have at most {_MAX_QUESTIONS} questions")
        questions.append(_question(where, record))
    return questions


def _question(where: str, record: dict[str, Any]) -> Question:
    if not {"prompt", "answer"} <= set(record) <= {"prompt", "answer", "until"}:
        keys = ", ".join(sorted(record)) or "none"
        raise DataError(f"{where}: expected the keys prompt, answer and perhaps until, not {keys}")
    for key, value in record.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key}: expected a string")
        check = encodable_text if key == "until" else checked_text
        check(value, f"{where}: {key}")
    until = record.get("until", "")
    question = Question(record["prompt"], record["answer"].strip(), until, where)
    if until and until in question.answer:
        raise DataError(f"{where}: the answer must not contain until ({until!r})")
    return question


def score_recall(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]
) -> RecallScore:
    """Answer all questions greedily and count exact answers; raises as ``greedy_answers``."""
    answers = greedy_answers(engine, tokenizer, questions)
    right = sum(map(is_right, questions, answers))
    return RecallScore(len(questions), right, right / len(questions))


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer of ``greedy_answers`` equals the expected one in every character."""
    return answer == question.answer


def greedy_answers(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]
) -> list[str]:
    """Answer all questions in one batch, greedily.

    An answer ends before ``until`` or at the end of the text, without white space around it. It is
    cut a few tokens after the length of the expected answer.

    Raises:
        DataError: a question is too long for the model.
        RuntimeError: the engine failed.
    """
    answers: list[list[int]] = [[] for _ in questions]
    for number, question in enumerate(questions):
        wanted = tokenizer.encode(question.answer + question.until, add_special_tokens=False)
        params = SamplingParams(temperature=0.0, max_tokens=len(wanted) + _EXTRA_TOKENS)
        try:
            engine.add(Request(str(number), tuple(tokenizer.encode(question.prompt)), params))
        except RequestError as error:
            raise DataError(f"{question.where}: {error}") from None
    while engine.has_work:
        for output in engine.step().outputs:
            if output.finish_reason == "error":
                raise RuntimeError(output.error)
            # the stop token is not part of the answer
            num_ids = len(output.token_ids) - (output.stop_token_id is not None)
            answers[int(output.request_id)] += output.token_ids[:num_ids]
    return [
        _answer(tokenizer.decode(ids), question.until)
        for question, ids in zip(questions, answers, strict=True)
    ]


def _answer(text: str, until: str) -> str:
    """A generated text up to ``until``, without white space around it."""
    text = text.strip()
    return text.partition(until)[0].strip() if until else text
