"""Evaluation of a model: perplexity of texts, and closed-book recall of facts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.engine import Engine
from engine.errors import RequestError
from engine.model.transformer import Transformer
from engine.request import Request
from engine.sampling.params import SamplingParams
from weights.checkpoints.tokenizer import Tokenizer
from weights.errors import DataError
from weights.training.corpus import json_objects
from weights.training.loss import batch_loss
from weights.training.packing import Passage, cut, packed_batches
from weights.training.training_data import TextTokens

_BATCH_TOKENS = 1024
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
    """A prompt and the expected greedy continuation, up to ``until`` or the end of the text."""

    prompt: str
    answer: str
    until: str = ""


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
        DataError: a line is not such an object, or the file is empty.
    """
    questions = []
    for where, record in json_objects(file):
        try:
            question = Question(**record)
        except TypeError as error:
            raise DataError(f"{where}: is not a question ({error})") from None
        if not all(isinstance(part, str) for part in vars(question).values()):
            raise DataError(f"{where}: prompt, answer and until must be strings")
        question = replace(question, answer=question.answer.strip())
        if not question.prompt or not question.answer:
            raise DataError(f"{where}: prompt or answer is empty")
        if question.until and question.until in question.answer:
            raise DataError(f"{where}: the answer must not contain until ({question.until!r})")
        questions.append(question)
    return questions


def score_recall(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]
) -> RecallScore:
    """Answer all questions in one batch, greedily.

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
            raise DataError(f"question {number + 1}: {error}") from None
    while engine.has_work:
        for output in engine.step().outputs:
            if output.finish_reason == "error":
                raise RuntimeError(output.error)
            # the stop token is not part of the answer
            num_ids = len(output.token_ids) - (output.stop_token_id is not None)
            answers[int(output.request_id)] += output.token_ids[:num_ids]
    right = 0
    for question, ids in zip(questions, answers, strict=True):
        found = tokenizer.decode(ids).strip()
        if question.until:
            found = found.partition(question.until)[0].strip()
        right += found == question.answer
    return RecallScore(len(questions), right, right / len(questions))
