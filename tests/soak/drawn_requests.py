"""Random requests of every kind, with the answers that the plain loop gives to them."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.model.transformer import Transformer
from tests.models import EOS_ID, byte_tokenizer
from tests.server.faulty_serve import FAULTY_ID
from tests.server.running import Running
from tests.soak.plain_answers import PlainAnswer, plain_answers
from weights.checkpoints.tokenizer import JsonTokenizer

BYTES = JsonTokenizer(byte_tokenizer())
MAX_TOKENS = 40
# long enough that hardly a cut request ends by itself
CUT_TOKENS = 300
NUM_PROMPTS = 60
NUM_BASES = 3
DIGITS = tuple(BYTES.encode("0123456789"))
NUM_DIGITS = 8
_P = TypeVar("_P")
KINDS = ("plain", "samples", "stop", "stop id", "logprobs", "chat", "digits", "seeded")


@dataclass(frozen=True)
class Choice:
    """One answer of a response."""

    text: str
    ids: tuple[int, ...]
    reason: str | None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Cut:
    """The moment at which the client leaves.

    Attributes:
        kind: ``body``: in the middle of the request's body; ``moment``: after ``seconds``;
            ``events``: after ``events`` events of the stream.
    """

    kind: str
    seconds: float
    events: int


@dataclass(frozen=True)
class DrawnRequest:
    """A request, its client's patience, and what comes back.

    Attributes:
        expected: the answer of each sample; None if it is not known.
        is_faulty: whether it makes its step fail.
    """

    path: str
    body: Mapping[str, Any]
    num_prompt_tokens: int
    expected: Choice | None = None
    cut: Cut | None = None
    is_faulty: bool = False

    @property
    def num_samples(self) -> int:
        return self.body.get("n", 1)

    @property
    def is_streamed(self) -> bool:
        return self.body.get("stream", False)


@dataclass
class RequestSource:
    """Draws requests over a fixed set of prompts, whose answers are computed once.

    Attributes:
        answers: prompts as ids, and their answers.
        chats: messages of a user, and their answers.
        digits: prompts as ids, and their answers in digits.
        seeded_answers: answers to ``seeded_bodies`` as JSON, from ``ask_seeded``.
    """

    answers: list[tuple[list[int], PlainAnswer]]
    chats: list[tuple[str, PlainAnswer]]
    digits: list[tuple[list[int], PlainAnswer]]
    seeded_answers: dict[str, Choice] = field(default_factory=dict)

    def seeded_bodies(self) -> list[dict[str, Any]]:
        """Sampled requests."""
        return [
            {
                "prompt": prompt,
                "max_tokens": 10 + number,
                "temperature": 1.0,
                "seed": number,
                "logit_bias": {str(FAULTY_ID): -100},
                "ignore_eos": True,
                "return_token_ids": True,
            }
            for number, (prompt, _) in enumerate(self.answers[:12])
        ]

    def ask_seeded(self, server: Running) -> None:
        """Record what an idle server answers to the sampled requests, one after another."""
        for body in self.seeded_bodies():
            (choice,) = server.complete(**body).json()["choices"]
            answer = Choice(choice["text"], tuple(choice["token_ids"]), choice["finish_reason"])
            self.seeded_answers[json.dumps(body)] = answer

    def draw(self, rng: random.Random, *, cut: bool, faulty: bool = False) -> DrawnRequest:
        """A request; the client of a ``cut`` one leaves early, a ``faulty`` one fails."""
        if cut:
            return self._cut(rng)
        if faulty:
            prompt = [*rng.choice(self.answers)[0][:20], FAULTY_ID]
            body = _options(rng, {"prompt": prompt, "max_tokens": 20, "temperature": 0})
            return DrawnRequest("/v1/completions", body, len(prompt), is_faulty=True)
        kind = rng.choice(KINDS)
        if kind == "chat":
            return self._chat(rng)
        if kind == "seeded":
            body = rng.choice(self.seeded_bodies())
            expected = self.seeded_answers[json.dumps(body)]
            return _completion(_options(rng, body), expected)
        if kind == "digits":
            prompt, answer = rng.choice(self.digits)
            regex = {"regex": f"[0-9]{{{NUM_DIGITS}}}"}
            body = {"prompt": prompt, "max_tokens": 60, "structured_outputs": regex} | _GREEDY
            expected = Choice(BYTES.decode(answer.ids), answer.ids, "stop")
            return _completion(_options(rng, body), expected)
        prompt, answer = rng.choice(self.answers)
        count = rng.randrange(1, len(answer.ids) + 1)
        body = {"prompt": prompt, "max_tokens": count} | _GREEDY
        if kind == "samples":
            body["n"] = rng.randrange(2, 4)
        expected = _cut_at_end(answer, count)
        if kind == "logprobs":
            body["logprobs"] = 2
            scores = answer.logprobs[: len(expected.ids)]
            expected = Choice(expected.text, expected.ids, expected.reason, scores)
        elif kind == "stop":
            body, expected = _with_stop(rng, body, expected)
        elif kind == "stop id":
            stop = rng.choice(expected.ids)
            body["stop_token_ids"] = [stop]
            ids = expected.ids[: expected.ids.index(stop) + 1]
            expected = Choice(BYTES.decode(ids[:-1]), ids, "stop")
        return _completion(_options(rng, body), expected)

    def _chat(self, rng: random.Random) -> DrawnRequest:
        text, answer = rng.choice(self.chats)
        count = rng.randrange(1, len(answer.ids) + 1)
        messages = [{"role": "user", "content": text}]
        body = _options(rng, {"messages": messages, "max_tokens": count} | _GREEDY)
        expected = _cut_at_end(answer, count)
        return DrawnRequest("/v1/chat/completions", body, len(_chat_ids(text)), expected)

    def _cut(self, rng: random.Random) -> DrawnRequest:
        prompt, _ = rng.choice(self.answers)
        body = {"prompt": prompt, "max_tokens": CUT_TOKENS, "ignore_eos": True} | _GREEDY
        body |= {"n": rng.choice((1, 1, 2)), "logit_bias": {str(FAULTY_ID): -100}}
        kind = rng.choice(("body", "moment", "moment", "events", "events"))
        body["stream"] = kind == "events" or rng.random() < 0.5
        cut = Cut(kind, rng.random() ** 2, rng.randrange(1, 30))
        return DrawnRequest("/v1/completions", body, len(prompt), cut=cut)


_GREEDY = {"temperature": 0, "return_token_ids": True}


def request_source(model: Transformer, seed: int) -> RequestSource:
    """Draw the prompts and compute their answers; it takes some seconds."""
    rng = random.Random(seed)
    bases = [_random_ids(rng, rng.randrange(40, 120)) for _ in range(NUM_BASES)]
    prompts = [_random_ids(rng, rng.randrange(1, 120)) for _ in range(NUM_PROMPTS // 2)]
    prompts += [
        rng.choice(bases) + _random_ids(rng, rng.randrange(1, 40)) for _ in range(NUM_PROMPTS // 2)
    ]
    chats = [" ".join(rng.choices(("memory", "row", "key", "é", "7"), k=9)) for _ in range(12)]
    answers = _clear(prompts, plain_answers(model, prompts, MAX_TOKENS), 8)
    chat_ids = [_chat_ids(text) for text in chats]
    chat_answers = _clear(chats, plain_answers(model, chat_ids, MAX_TOKENS), 8)
    digits = plain_answers(model, prompts[:20], NUM_DIGITS, allowed=DIGITS)
    assert not any(FAULTY_ID in answer.ids for _, answer in (*answers, *chat_answers))
    return RequestSource(answers, chat_answers, _clear(prompts[:20], digits, NUM_DIGITS))


def _clear(
    prompts: Sequence[_P], answers: Sequence[PlainAnswer], least: int
) -> list[tuple[_P, PlainAnswer]]:
    """Prompts with their answers, without those of fewer than ``least`` tokens."""
    pairs = zip(prompts, answers, strict=True)
    kept = [(prompt, answer) for prompt, answer in pairs if len(answer.ids) >= least]
    assert len(kept) > len(prompts) // 2
    return kept


def _random_ids(rng: random.Random, count: int) -> list[int]:
    """Random bytes, and a letter: half a character at the end would change the answer's text."""
    return [*(rng.randrange(256) for _ in range(count)), *BYTES.encode("x")]


def _chat_ids(text: str) -> list[int]:
    return BYTES.encode(f"<user>{text}\n<assistant>")


def _completion(body: Mapping[str, Any], expected: Choice) -> DrawnRequest:
    return DrawnRequest("/v1/completions", body, len(body["prompt"]), expected)


def _options(rng: random.Random, body: Mapping[str, Any]) -> dict[str, Any]:
    """Options that do not change the answer."""
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.2:
        options["priority"] = rng.randrange(-2, 3)
    if rng.random() < 0.2:
        options["cache_salt"] = "salted"
    if rng.random() < 0.1:
        options["memory_trace"] = True
    return {**body, **options}


def _cut_at_end(answer: PlainAnswer, count: int) -> Choice:
    ids = answer.ids[:count]
    if EOS_ID in ids:
        ids = ids[: ids.index(EOS_ID) + 1]
        return Choice(BYTES.decode(ids), ids, "stop")
    return Choice(BYTES.decode(ids), ids, "length")


def _with_stop(
    rng: random.Random, body: dict[str, Any], expected: Choice
) -> tuple[dict[str, Any], Choice]:
    """A stop string of the answer's own, if it has two ASCII characters in a row."""
    found = [match[1] for match in re.finditer(r"(?=([!-~]{2}))", expected.text)]
    if not found:
        return body, expected
    stop = rng.choice(found)
    end = next(n for n in range(1, len(expected.ids) + 1) if stop in BYTES.decode(expected.ids[:n]))
    text = expected.text[: expected.text.index(stop)]
    return {**body, "stop": [stop, "never said"]}, Choice(text, expected.ids[:end], "stop")
