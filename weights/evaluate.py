"""What a model is worth: perplexity of texts, and facts that it recalls without looking them up."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.engine import Engine
from engine.model.transformer import Transformer
from engine.request import Request
from engine.sampling_params import SamplingParams
from weights.errors import DataError
from weights.loss import batch_loss
from weights.token_stream import PackedTokens
from weights.tokenizer import Tokenizer
from weights.training_data import TextTokens

_TOKENS_AT_ONCE = 1024
# a wrong answer may be longer than the right one, which says nothing more
_SPARE_TOKENS = 8


@dataclass(frozen=True)
class TextScore:
    """How well texts are foreseen: mean nats a token, and what follows from them."""

    documents: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Question:
    """A prompt whose greedy continuation, up to ``until`` or the end of the text, is the answer."""

    prompt: str
    answer: str
    until: str = ""


@dataclass(frozen=True)
class RecallScore:
    """Closed-book recall: the share of answers that are right in every character."""

    questions: int
    right: int
    recall: float


@torch.no_grad()
def score_texts(model: Transformer, text: TextTokens, texts: Iterator[str]) -> TextScore:
    """The loss of every token that follows another; longer documents are cut at the model's end.

    Raises:
        DataError: no document has two tokens.
    """
    documents = tokens = num_bytes = 0
    nats = 0.0
    for batch, count, size in _batches(text, texts, model.config.max_positions):
        nats += float(batch_loss(model, batch, torch.float32).nats)
        tokens += len(batch.ids_T)
        documents += count
        num_bytes += size
    if not tokens:
        raise DataError("texts: no document has two tokens")
    loss = nats / tokens
    bits_per_byte = nats / math.log(2) / num_bytes
    return TextScore(documents, tokens, loss, math.exp(min(loss, 700.0)), bits_per_byte)


def read_questions(file: Path) -> list[Question]:
    """A JSONL file, a line a question: ``prompt``, ``answer`` and perhaps ``until``.

    Raises:
        DataError: a line is no such object, or there is none.
    """
    questions = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            question = Question(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}, line {number}: no question ({error})") from None
        if not all(isinstance(part, str) for part in vars(question).values()):
            raise DataError(f"{file}, line {number}: expected texts")
        if not question.prompt or not question.answer:
            raise DataError(f"{file}, line {number}: prompt or answer is empty")
        questions.append(question)
    if not questions:
        raise DataError(f"{file}: is empty")
    return questions


def score_recall(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question]
) -> RecallScore:
    """Ask all questions at once, greedily.

    Raises:
        RequestError: a question is too long for the model.
    """
    answers: list[list[int]] = [[] for _ in questions]
    for number, question in enumerate(questions):
        wanted = tokenizer.encode(question.answer + question.until, add_special_tokens=False)
        params = SamplingParams(temperature=0.0, max_tokens=len(wanted) + _SPARE_TOKENS)
        engine.add(Request(str(number), tuple(tokenizer.encode(question.prompt)), params))
    while engine.has_work:
        for output in engine.step().outputs:
            # the id that ended it is no part of the answer
            kept = len(output.token_ids) - (output.stop_token_id is not None)
            answers[int(output.request_id)] += output.token_ids[:kept]
    right = 0
    for question, ids in zip(questions, answers, strict=True):
        found = tokenizer.decode(ids).strip()
        if question.until:
            found = found.partition(question.until)[0].strip()
        right += found == question.answer
    return RecallScore(len(questions), right, right / len(questions))


def _batches(
    text: TextTokens, texts: Iterator[str], max_positions: int
) -> Iterator[tuple[PackedTokens, int, int]]:
    """Documents packed together, with their number and their bytes of UTF-8."""
    pieces: list[list[int]] = []
    count = size = 0
    for one in texts:
        ids = text.document(one)
        pieces += [ids[i : i + max_positions + 1] for i in range(0, len(ids) - 1, max_positions)]
        count += 1
        size += len(one.encode())
        if sum(map(len, pieces)) >= _TOKENS_AT_ONCE:
            yield _packed(pieces), count, size
            pieces, count, size = [], 0, 0
    if pieces:
        yield _packed(pieces), count, size


def _packed(pieces: Sequence[Sequence[int]]) -> PackedTokens:
    lengths = [len(piece) - 1 for piece in pieces]
    return PackedTokens(
        ids_T=np.concatenate([piece[:-1] for piece in pieces]),
        targets_T=np.concatenate([piece[1:] for piece in pieces]),
        positions_T=np.concatenate([np.arange(length) for length in lengths]),
        starts=(0, *np.cumsum(lengths).tolist()),
    )
