"""Reads facts to learn from JSONL or text files, and tokenises them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weights.errors import DataError
from weights.training.corpus import checked_text, documents, json_objects
from weights.training.evaluate import read_questions
from weights.training.packing import Passage, cut
from weights.training.training_data import TextTokens

_MAX_FACTS = 100_000
_TEXT_KEYS, _ANSWER_KEYS = {"text"}, {"prompt", "answer"}


@dataclass(frozen=True)
class Fact:
    """A text to learn or to ask for: all of it, or the answer that follows a prompt.

    Attributes:
        answer: the text.
        prompt: text that is given before the answer; may be empty.
        until: text that ends the answer; empty for the end of the text.
        where: file and line of the fact, for messages.
    """

    answer: str
    prompt: str = ""
    until: str = ""
    where: str = "fact"


def read_facts(file: Path) -> list[Fact]:
    """Read a ``.jsonl`` file of facts, or a ``.txt`` file that is one fact.

    A line is ``{"text": ...}`` or ``{"prompt": ..., "answer": ...}``. A fact that is given twice
    counts once.

    Raises:
        DataError: the file is of another kind, cannot be read, is empty or has more than 100,000
            facts; or a line is not a fact, or gives a prompt another answer than an earlier line.
            The message names file, line and key.
    """
    if file.suffix == ".txt":
        return [Fact(text, where=str(file)) for text in documents([file])]
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: is neither a .jsonl nor a .txt file")
    facts: dict[tuple[str, str], Fact] = {}
    for where, record in json_objects(file):
        fact = _fact(where, record)
        # no prompt has two answers, but texts have no prompt
        first = facts.setdefault((fact.prompt, "" if fact.prompt else fact.answer), fact)
        if first.answer != fact.answer:
            raise DataError(f"{where}: answer: {first.where} has another one for this prompt")
        if len(facts) > _MAX_FACTS:
            raise DataError(f"{where}: a file may have at most {_MAX_FACTS} facts")
    return list(facts.values())


def _fact(where: str, record: dict[str, Any]) -> Fact:
    if set(record) not in (_TEXT_KEYS, _ANSWER_KEYS):
        keys = ", ".join(sorted(record)) or "none"
        raise DataError(f"{where}: expected the keys text, or prompt and answer, not {keys}")
    for key, value in record.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key}: expected a string")
        checked_text(value, f"{where}: {key}")
    answer = record["answer"] if "answer" in record else record["text"]
    return Fact(answer, record.get("prompt", ""), where=where)


def read_asked(file: Path) -> list[Fact]:
    """Read questions to ask; see ``read_questions`` (DataError)."""
    return [
        Fact(question.answer, question.prompt, question.until, question.where)
        for question in read_questions(file)
    ]


def fact_passages(facts: Sequence[Fact], text: TextTokens, max_positions: int) -> list[Passage]:
    """Tokenise facts as documents of the training data, begin and end tokens included.

    The first token of a text is given: nothing before it says which text follows. A text that is
    longer than the context is cut into several passages. An answer with ``until`` ends with that
    text and has no end token. A prompt's tokens are those that a server reads for it. A space is
    put between prompt and answer if neither has white space there.

    Raises:
        DataError: prompt and answer have more tokens than the model's context, a fact has no token
            to learn, or the tokenizer cannot continue the prompt with the answer.
    """
    return [passage for fact in facts for passage in _passages(fact, text, max_positions)]


def _passages(fact: Fact, text: TextTokens, max_positions: int) -> list[Passage]:
    if fact.prompt:
        ids, num_given = _answer_ids(fact, text)
        if len(ids) - 1 > max_positions:
            raise DataError(
                f"{fact.where}: has {len(ids)} tokens, but the model reads at most {max_positions}"
            )
    else:
        assert not fact.until
        ids, num_given = text.document(fact.answer), 1 if text.bos_id is None else 2
    if num_given >= min(len(ids), max_positions + 1):
        raise DataError(f"{fact.where}: has no token to learn")
    first, *others = cut(ids, max_positions)
    return [replace(first, num_given=num_given), *others]


def _answer_ids(fact: Fact, text: TextTokens) -> tuple[list[int], int]:
    """Tokens of prompt and answer, and how many of them are the prompt's."""
    is_apart = fact.prompt[-1].isspace() or fact.answer[0].isspace()
    answer = f"{'' if is_apart else ' '}{fact.answer}{fact.until}"
    given = text.encode(fact.prompt)
    whole = text.encode(fact.prompt + answer)
    if whole[: len(given)] != given:
        # a token of the whole text spans the end of the prompt, but a server never reads that one
        whole = given + text.encode(answer)
        if text.tokenizer.decode(whole) != fact.prompt + answer:
            raise DataError(
                f"{fact.where}: answer: the tokenizer cannot continue the prompt with it;"
                " end the prompt at a word boundary"
            )
    begin = list(text.tokenizer.begin_ids)
    end = [] if fact.until else text.end
    return begin + whole + end, len(begin) + len(given)
