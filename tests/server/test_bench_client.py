"""Requests of vLLM's benchmark client, which is too large to install for tests."""

import json

import pytest

from server.http.metrics import Metrics

PROMPT = "Count to ten: one, two,"
COUNT = 12
# vLLM's client sends these with every request, and those below if its options ask for them
STREAMED = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
COMPLETION = {"repetition_penalty": 1.0, "max_tokens": COUNT, "logprobs": None} | STREAMED
CHAT = {"max_completion_tokens": COUNT} | STREAMED
SAMPLING = {
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "temperature": 0.7,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logprobs": 2,
}


def streamed(server, path, body, request_id="bench-1a2b-0"):
    """The chunks of a stream, as the client splits them."""
    headers = {"x-request-id": request_id}
    with server.http.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["x-request-id"] == request_id
        text = response.read().decode()
    messages = [message for message in text.split("\n\n") if message]
    assert all(message.startswith("data: ") for message in messages)
    *chunks, end = [message.removeprefix("data: ") for message in messages]
    assert end == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_the_first_model_is_found_and_named_to_the_tokenizer(memory_server):
    model = memory_server.http.get("/v1/models").json()["data"][0]
    assert model["id"] == model["root"] == "tiny-memory"
    # the client names the root when it makes prompts as long as the server counts them
    body = {"model": model["root"], "prompt": PROMPT, "add_special_tokens": False}
    tokens = memory_server.http.post("/tokenize", json=body).json()["tokens"]
    body = {"model": model["root"], "tokens": tokens[:8]}
    assert memory_server.http.post("/detokenize", json=body).json()["prompt"] == PROMPT[:8]


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (COMPLETION | {"prompt": PROMPT}, len(PROMPT)),
        (COMPLETION | {"prompt": PROMPT} | SAMPLING, len(PROMPT)),
        (COMPLETION | {"prompt": [5, 6, 7]}, 3),
    ],
    ids=["text", "sampling options", "token ids"],
)
def test_streamed_completions_have_what_latencies_are_computed_of(memory_server, body, length):
    *chunks, last = streamed(memory_server, "/v1/completions", body | {"model": "tiny-memory"})
    # the client takes a chunk with choices for a token, and the one without them for the counts
    assert len(chunks) > 1
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in chunks)
    assert not last["choices"]
    assert last["usage"]["prompt_tokens"] == length
    assert last["usage"]["completion_tokens"] == COUNT


@pytest.mark.parametrize("content", [PROMPT, [{"type": "text", "text": PROMPT}]])
def test_streamed_chats_have_what_latencies_are_computed_of(memory_server, content):
    body = CHAT | {"model": "tiny-memory", "messages": [{"role": "user", "content": content}]}
    *chunks, last = streamed(memory_server, "/v1/chat/completions", body)
    assert len(chunks) > 1
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert not last["choices"] and last["usage"]["completion_tokens"] == COUNT


def test_an_unknown_profiler_is_only_not_found(memory_server):
    for path in ("/start_profile", "/stop_profile"):
        assert memory_server.http.post(path).status_code == 404


def test_counts_of_drafts_have_the_names_that_the_client_reads():
    lines = Metrics("tiny", "vllm:").render().decode().splitlines()
    found = [line.split("{")[0] for line in lines if line.startswith("vllm:spec_decode")]
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert f"vllm:spec_decode_{name}_total" in found
