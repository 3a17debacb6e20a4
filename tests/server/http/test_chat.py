"""The chat route: the official client on a real server, and tool calls on a fake engine."""

import asyncio
import json

import openai
import pytest

from engine.request import TokenOutput
from tests.models import EOS_ID, HERMES_TEMPLATE, byte_tokenizer
from tests.server.http.test_app import answer, build, post
from weights.checkpoints.chat_template import ChatTemplate
from weights.checkpoints.tokenizer import JsonTokenizer

BYTES = JsonTokenizer(byte_tokenizer())
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def client(memory_server):
    with openai.OpenAI(base_url=f"{memory_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def chat(client):
    """Create a chat completion of the tiny model."""

    def create(messages=MESSAGES, **options):
        return client.chat.completions.create(
            **{"model": "tiny-memory", "messages": messages, "max_tokens": 12} | GREEDY | options
        )

    return create


def test_the_prompt_is_that_of_the_template(memory_server, chat):
    whole = chat()
    text = memory_server.complete(
        prompt="<user>hello\n<assistant>", max_tokens=12, temperature=0, ignore_eos=True
    ).json()
    (choice,) = whole.choices
    assert choice.message.content == text["choices"][0]["text"]
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert whole.usage.prompt_tokens == text["usage"]["prompt_tokens"]


def test_a_stream_joins_to_the_whole_answer(chat):
    whole = chat(n=2)
    chunks = list(chat(n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    for index, choice in enumerate(whole.choices):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert parts[0].delta.role == "assistant"
        assert all(part.delta.role is None for part in parts[1:])
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_asynchronous_client_gets_the_same_answers(memory_server, chat):
    options = {"model": "tiny-memory", "messages": MESSAGES, "max_tokens": 12} | GREEDY

    async def ask():
        url = f"{memory_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            whole, stream = await asyncio.gather(create(**options), create(stream=True, **options))
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(parts)

    assert asyncio.run(ask()) == (chat().choices[0].message.content,) * 2


def test_token_ids_of_the_prompt_are_beside_the_choices(memory_server, chat):
    extra = {"ignore_eos": True, "return_token_ids": True}
    prompt = memory_server.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    whole = chat(n=2, extra_body=extra)
    assert whole.prompt_token_ids == prompt
    for choice in whole.choices:
        assert BYTES.decode(choice.token_ids) == choice.message.content
        assert not hasattr(choice, "prompt_token_ids")
    first, *rest = chat(n=2, extra_body=extra, stream=True)
    assert first.prompt_token_ids == prompt
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in rest)
    for index, choice in enumerate(whole.choices):
        parts = [c for chunk in (first, *rest) for c in chunk.choices if c.index == index]
        assert [i for part in parts for i in part.token_ids] == choice.token_ids
    assert not hasattr(chat(), "prompt_token_ids") and not hasattr(chat().choices[0], "token_ids")


def test_the_last_message_can_be_continued(memory_server, chat):
    messages = [*MESSAGES, {"role": "assistant", "content": "I say "}]
    extra = {"ignore_eos": True, "continue_final_message": True}
    text = memory_server.complete(
        prompt="<user>hello\n<assistant>I say ", max_tokens=12, temperature=0, ignore_eos=True
    ).json()
    assert chat(messages, extra_body=extra).choices[0].message.content == text["choices"][0]["text"]


def test_log_probabilities_have_openai_s_form(chat):
    content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert len(entry.top_logprobs) == 3
        # greedy: the token itself is the likeliest
        assert (entry.token, entry.logprob) == (
            entry.top_logprobs[0].token,
            entry.top_logprobs[0].logprob,
        )
        assert entry.logprob <= 0 and all(0 <= byte < 256 for byte in entry.bytes)
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_by_default_only_the_model_s_length_limits_an_answer(memory_server):
    body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    answered = memory_server.http.post("/v1/chat/completions", json=body).json()
    assert answered["usage"]["total_tokens"] == 512
    body["max_completion_tokens"] = 3
    answered = memory_server.http.post("/v1/chat/completions", json=body).json()
    assert answered["usage"]["completion_tokens"] == 3


def test_messages_of_official_clients_can_be_sent_back(chat):
    message = chat().choices[0].message
    history = [*MESSAGES, message.model_dump(), {"role": "user", "content": "and?"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(history).choices[0].message.content is not None
    both = chat([{"role": "user", "content": parts}]), chat([{"role": "user", "content": "a\nb"}])
    assert both[0].usage.prompt_tokens == both[1].usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs"),
        ({"extra_body": {"continue_final_message": True, "add_generation_prompt": True}}, None),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"store": True}, "store"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_refused_by_name(chat, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(**options)
    assert error.value.body["type"] == "invalid_request_error"
    assert param is None or error.value.body["param"] == param


def answered(text, body, reason="stop"):
    """The sent messages of a chat request to which a fake engine answers with ``text``."""
    process, service, app = build(ChatTemplate(HERMES_TEMPLATE), 1000)
    sent = []

    async def scenario():
        left = asyncio.Event()
        call = asyncio.create_task(post(app, body, left.wait, sent, path="/v1/chat/completions"))
        while not process.sent and not call.done():
            await asyncio.sleep(0)
        request_id = process.sent[0].request_id
        ids = BYTES.encode(text, add_special_tokens=False)
        for token_id in ids[:-1]:
            answer(service, TokenOutput(request_id, (token_id,)))
        answer(service, TokenOutput(request_id, (ids[-1],), reason))
        await call

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert sent[0]["status"] == 200, sent
    return process.sent[0], b"".join(message.get("body", b"") for message in sent)


CALL = '<tool_call>\n{"name": "find", "arguments": {"q": 1}}\n</tool_call>'


def test_calls_are_returned_as_calls():
    request, data = answered(f"Well. {CALL}\n{CALL}", {"messages": MESSAGES, "tools": [TOOL]})
    assert BYTES.decode(request.prompt_ids).startswith(json.dumps(TOOL))
    (choice,) = json.loads(data)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well. "
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "find", "arguments": '{"q": 1}'}] * 2
    assert len({call["id"] for call in calls}) == 2


def test_streamed_calls_have_indices():
    body = {"messages": MESSAGES, "tools": [TOOL], "stream": True}
    _, data = answered(CALL + CALL, body)
    events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")][:-2]
    choices = [json.loads(event)["choices"][0] for event in events]
    calls = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert "".join(c["delta"].get("content", "") for c in choices) == ""
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_without_tools_or_with_choice_none_a_call_is_text():
    for body in ({"messages": MESSAGES}, {"messages": MESSAGES, "tools": [TOOL]}):
        request, data = answered(CALL, body | {"tool_choice": "none"})
        assert json.loads(data)["choices"][0]["message"]["content"] == CALL
        assert "find" not in BYTES.decode(request.prompt_ids)


def test_a_cut_call_is_text_and_its_reason_stays():
    body = {"messages": MESSAGES, "tools": [TOOL]}
    (choice,) = json.loads(answered(CALL[:-3], body, "length")[1])["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == CALL[:-3]


def test_a_model_without_template_says_so():
    *_, app = build()
    sent = asyncio.run(
        post(app, {"messages": MESSAGES}, asyncio.Event().wait, path="/v1/chat/completions")
    )
    assert sent[0]["status"] == 400
    assert "--chat-template" in json.loads(sent[1]["body"])["error"]["message"]


def test_tokenize_and_detokenize_agree_with_the_routes(memory_server):
    http = memory_server.http
    asked = http.post("/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
    text = http.post("/tokenize", json={"prompt": "<user>hello\n<assistant>"}).json()
    assert asked["tokens"] == text["tokens"] and asked["count"] == len(text["tokens"])
    assert "".join(asked["token_strs"]) == "<user>hello\n<assistant>"
    assert asked["max_model_len"] == 512
    back = http.post("/detokenize", json={"tokens": asked["tokens"]}).json()
    assert back == {"prompt": "<user>hello\n<assistant>"}
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "x" * 10**6}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [1] * 513}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [EOS_ID]}).json() == {"prompt": ""}


def test_endpoints_that_the_model_cannot_have_are_refused_by_name(memory_server):
    for path in ("/v1/embeddings", "/v1/score"):
        refused = memory_server.http.post(path, json={"input": "x"})
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "unsupported_endpoint"
