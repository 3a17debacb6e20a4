"""Options of the completions API over real HTTP: echo, logprobs, samples and others."""

import codecs

import pytest
import torch

from tests.models import byte_tokenizer, plain_greedy, plain_logits
from tests.server.http.test_completions import GREEDY, stream
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import JsonTokenizer

BYTES = JsonTokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def model(memory_plus_folder):
    return load_model(memory_plus_folder)[0]


@pytest.fixture(scope="module")
def scores(model):
    """Exact log-probabilities of the tokens of a sequence, except the first."""

    def of(ids: list[int]) -> list[float]:
        lines = plain_logits(model, ids).double().log_softmax(-1)
        return [float(lines[at, token]) for at, token in enumerate(ids[1:])]

    return of


def one(server, **body) -> dict:
    answer = server.complete(**body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice


def test_echo_repeats_the_prompt(memory_server):
    plain = one(memory_server, prompt="echo me", max_tokens=5, **GREEDY)["text"]
    body = {"prompt": "echo me", "max_tokens": 5, "echo": True, **GREEDY}
    assert one(memory_server, **body)["text"] == "echo me" + plain
    parts = [event["choices"][0]["text"] for event in stream(memory_server, **body)]
    assert "".join(parts) == "echo me" + plain and len(parts) == 5
    by_ids = body | {"prompt": BYTES.encode("echo me")}
    assert one(memory_server, **by_ids)["text"] == "echo me" + plain


def test_logprobs_equal_the_full_log_softmax(memory_server, model, scores):
    choice = one(
        memory_server, prompt="score", max_tokens=6, logprobs=2, return_token_ids=True, **GREEDY
    )
    ids = BYTES.encode("score") + choice["token_ids"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(scores(ids)[4:], abs=1e-4)
    assert found["tokens"] == [BYTES.token_name(i) for i in choice["token_ids"]]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = [len(decoder.decode(BYTES.token_bytes(i) or b"")) for i in choice["token_ids"]]
    assert found["text_offset"] == [sum(shown[:at]) for at in range(6)]
    lines = plain_logits(model, ids).log_softmax(-1)[4:-1]
    for line, top in zip(lines, found["top_logprobs"], strict=True):
        best = line.topk(2).values.tolist()
        # different tokens may have the same text: bytes that are only part of a character
        assert max(top.values()) == pytest.approx(best[0], abs=1e-4) and 1 <= len(top) <= 2


def test_logprobs_0_gives_only_the_chosen_token(memory_server):
    choice = one(memory_server, prompt="x", max_tokens=3, logprobs=0, temperature=1, seed=3)
    found = choice["logprobs"]
    tops = zip(found["tokens"], found["token_logprobs"], strict=True)
    assert found["top_logprobs"] == [{token: value} for token, value in tops]


def test_logprobs_of_a_stream_equal_those_of_the_unstreamed_answer(memory_server):
    body = {"prompt": "stream", "max_tokens": 6, "logprobs": 1, "echo": True, **GREEDY}
    whole = one(memory_server, **body)["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in stream(memory_server, **body)]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in part[name]] == whole[name]
    values = [value for part in parts for value in part["token_logprobs"]]
    assert values[0] is whole["token_logprobs"][0] is None
    assert values[1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-4)


def test_tokens_can_be_returned_as_ids(memory_server):
    body = {"prompt": "x", "max_tokens": 2, "logprobs": 0, "return_tokens_as_token_ids": True}
    choice = one(memory_server, **body, return_token_ids=True, **GREEDY)
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


@pytest.mark.parametrize("streamed", [False, True])
def test_echo_without_an_answer_scores_the_prompt(memory_server, scores, streamed):
    ids = BYTES.encode("to be scored")
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    if streamed:
        (event,) = stream(memory_server, **body)
        (choice,) = event["choices"]
    else:
        choice = one(memory_server, **body)
    assert choice["text"] == "to be scored" and choice["finish_reason"] == "length"
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(scores(ids), abs=1e-4)
    assert "".join(found["tokens"]) == "to be scored"


def test_echo_of_a_prompt_without_answer_or_scores(memory_server):
    choice = one(memory_server, prompt="only me", max_tokens=0, echo=True)
    assert choice["text"] == "only me" and choice["logprobs"] is None


def test_prompt_logprobs_have_ids_and_ranks(memory_server, scores):
    ids = BYTES.encode("ranked")
    found = one(memory_server, prompt="ranked", max_tokens=1, prompt_logprobs=2)["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for token_id, exact, position in zip(ids[1:], scores(ids), found[1:], strict=True):
        own = position[str(token_id)]
        assert own["logprob"] == pytest.approx(exact, abs=1e-4)
        assert own["decoded_token"] == BYTES.token_text(token_id)
        assert {entry["rank"] for entry in position.values()} >= {1, 2}


def test_n_samples_equal_n_requests_with_consecutive_seeds(memory_server):
    body = {"max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    answer = memory_server.complete(prompt=["one", "two"], n=3, seed=40, **body).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    alone = [
        one(memory_server, prompt=prompt, seed=40 + sample, **body)["text"]
        for prompt in ("one", "two")
        for sample in range(3)
    ]
    assert texts == alone and len(set(texts)) == 6


def test_best_of_gives_the_likeliest(memory_server):
    body = {"prompt": "best", "max_tokens": 6, "temperature": 2.0, "ignore_eos": True, "seed": 9}
    every = memory_server.complete(n=6, logprobs=0, **body).json()["choices"]
    best = memory_server.complete(n=2, best_of=6, **body).json()
    ranked = sorted(every, key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert best["usage"]["completion_tokens"] == 36


def test_a_cached_prefix_is_counted_in_usage_and_metrics(memory_server):
    body = {"prompt": "a prompt that is longer than two blocks of sixteen", "max_tokens": 1}
    hits = memory_server.metric("memplus:prefix_cache_hits_total")
    cached = [
        memory_server.complete(**body, cache_salt=salt).json()["usage"]["prompt_tokens_details"]
        for salt in ("mine", "mine", "yours")
    ]
    assert [details["cached_tokens"] for details in cached] == [0, 48, 0]
    assert memory_server.metric("memplus:prefix_cache_hits_total") == hits + 48


def test_a_prompt_can_be_truncated_from_the_left(memory_server):
    short = one(memory_server, prompt="tail", max_tokens=5, **GREEDY)["text"]
    long = {"prompt": "head and tail", "max_tokens": 5, "truncate_prompt_tokens": 4, **GREEDY}
    assert one(memory_server, **long)["text"] == short
    assert one(memory_server, **long, echo=True)["text"] == "tail" + short
    whole = {"prompt": "x" * 60_000, "truncate_prompt_tokens": -1, "ignore_eos": True}
    usage = memory_server.complete(**whole).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (496, 16)


def test_a_stop_string_can_be_included_in_the_text(memory_server):
    body = {"prompt": "stop here", "max_tokens": 40, **GREEDY}
    text = one(memory_server, **body)["text"]
    at = next(at for at in range(8, 30) if text.find(text[at : at + 3]) == at)
    body |= {"stop": text[at : at + 3], "include_stop_str_in_output": True}
    assert one(memory_server, **body)["text"] == text[: at + 3]


def test_min_tokens_delays_the_end_of_an_answer(memory_server):
    body = {"prompt": "min", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    free = one(memory_server, **body, ignore_eos=True)
    stop = free["text"][1:3]
    body |= {"stop_token_ids": [free["token_ids"][1]], "stop": [stop]}
    assert len(one(memory_server, **body)["token_ids"]) <= 3
    late = one(memory_server, **body, min_tokens=8)
    assert len(late["token_ids"]) >= 8 and free["token_ids"][1] not in late["token_ids"][:8]


def test_special_tokens_are_shown_on_request(memory_server):
    body = {"prompt": "x", "max_tokens": 3, "allowed_token_ids": [257], "ignore_eos": True}
    assert one(memory_server, **body)["text"] == ""
    assert one(memory_server, **body, skip_special_tokens=False)["text"] == "<bos>" * 3


def test_words_can_be_forbidden_and_tokens_biased(memory_server, model):
    ids = BYTES.encode("x")
    (first,) = plain_greedy(model, ids, 1)
    second = int(plain_logits(model, ids)[-1].topk(2).indices[1])
    body = {"prompt": ids, "max_tokens": 1, "return_token_ids": True, **GREEDY}
    assert one(memory_server, **body)["token_ids"] == [first]
    assert one(memory_server, **body, logit_bias={str(first): -100})["token_ids"] == [second]
    assert one(memory_server, **body, logit_bias={"65": 100})["token_ids"] == [65]
    one_letter = {"allowed_token_ids": BYTES.encode("ab")}
    best = int(plain_logits(model, ids)[-1][BYTES.encode("ab")].argmax())
    assert one(memory_server, **body, **one_letter)["token_ids"] == [BYTES.encode("ab")[best]]
    worse = one(memory_server, **body, **one_letter, bad_words=["ab"[best]])["token_ids"]
    assert worse == [BYTES.encode("ab")[1 - best]]


def test_a_repetition_penalty_changes_the_answer(memory_server):
    body = {"prompt": "aaaa", "max_tokens": 30, "return_token_ids": True, **GREEDY}
    plain = one(memory_server, **body)["token_ids"]
    penalised = one(memory_server, **body, frequency_penalty=2.0, presence_penalty=2.0)["token_ids"]
    assert plain != penalised and len(set(penalised)) >= len(set(plain))
    assert torch.tensor(penalised).bincount().max() <= torch.tensor(plain).bincount().max()
