"""litellm, unmodified: answers, streams, tool calls and errors of a real server."""

import asyncio
import gc
import importlib

import httpx
import pytest

from tests.models import HERMES_TEMPLATE
from tests.server.running import running

# litellm leaves its own connections open, and uses what its dependencies deprecate
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

KEY = "a-key"
GREEDY = {"temperature": 0, "max_tokens": 12}
SCHEMA = {"enum": [{"q": 1}, {"q": 2}]}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}
PROVIDERS = ("hosted_vllm", "openai")


def said(text):
    return [{"role": "user", "content": text}]


MESSAGES = said("hello")


@pytest.fixture(scope="module")
def server(memory_plus_folder, tmp_path_factory):
    template = tmp_path_factory.mktemp("templates") / "hermes.jinja"
    template.write_text(HERMES_TEMPLATE)

    def client(url):
        return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"})

    options = "--chat-template", str(template), "--api-key", KEY
    with running(memory_plus_folder, *options, client=client) as started:
        yield started


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        # otherwise it downloads a list of prices
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module = importlib.import_module("litellm")
        yield module
    # its clients stay in a cache; collect them here, where warnings are ignored
    module.in_memory_llm_clients_cache.flush_cache()
    gc.collect()


@pytest.fixture(params=PROVIDERS)
def target(request, server):
    """Arguments that send a request to the server, by one of litellm's providers."""
    return {
        "model": f"{request.param}/tiny-memory",
        "api_base": f"{server.url}/v1",
        "api_key": KEY,
        "max_retries": 0,
    }


@pytest.fixture(scope="module")
def run(litellm):
    """Runs a coroutine, then closes the connections that litellm would keep for its event loop."""

    async def closing(asked):
        try:
            return await asked
        finally:
            await litellm.close_litellm_async_clients()
            litellm.in_memory_llm_clients_cache.flush_cache()

    return lambda asked: asyncio.run(closing(asked))


@pytest.fixture(scope="module")
def chat(server):
    """The server's own chat answer."""

    def create(**options):
        body = {"messages": MESSAGES} | GREEDY | options
        return server.http.post("/v1/chat/completions", json=body).raise_for_status().json()

    return create


def test_completion_returns_the_servers_answer(litellm, target, chat):
    options = {"n": 2, "seed": 3, "stop": ["zz"], "logprobs": True, "top_logprobs": 2}
    theirs = litellm.completion(messages=MESSAGES, **GREEDY | options, **target)
    ours = chat(**options)
    for choice, expected in zip(theirs.choices, ours["choices"], strict=True):
        assert choice.message.content == expected["message"]["content"]
        assert choice.finish_reason == expected["finish_reason"] == "length"
        assert len(choice.logprobs.content) == 12
        for entry, known in zip(
            choice.logprobs.content, expected["logprobs"]["content"], strict=True
        ):
            assert (entry.token, entry.logprob) == (known["token"], known["logprob"])
            assert len(entry.top_logprobs) == 2
    counts = theirs.usage.prompt_tokens, theirs.usage.completion_tokens
    assert counts == (ours["usage"]["prompt_tokens"], 24)


def test_sampling_options_of_vllm_reach_the_server(litellm, target, chat):
    options = {"min_tokens": 3, "ignore_eos": True, "repetition_penalty": 1.3, "top_k": 7}
    options |= {"min_p": 0.01}
    theirs = litellm.completion(messages=MESSAGES, extra_body=options, **GREEDY, **target)
    assert theirs.choices[0].message.content == chat(**options)["choices"][0]["message"]["content"]


def test_acompletion_serves_many_at_once(litellm, run, target, chat):
    async def ask():
        calls = [litellm.acompletion(messages=MESSAGES, **GREEDY, **target) for _ in range(8)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert set(run(ask())) == {chat()["choices"][0]["message"]["content"]}


def test_a_stream_joins_to_the_answer_and_ends_with_usage(litellm, target, chat):
    options = GREEDY | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=MESSAGES, **options, **target))
    joined = litellm.stream_chunk_builder(chunks)
    expected = chat()
    assert joined.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert joined.choices[0].finish_reason == "length"
    assert joined.usage.completion_tokens == 12
    assert joined.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


def test_an_asynchronous_stream_joins_to_the_answer(litellm, run, target, chat):
    async def joined():
        stream = await litellm.acompletion(messages=MESSAGES, stream=True, **GREEDY, **target)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert run(joined()) == chat()["choices"][0]["message"]["content"]


def test_text_completion_whole_and_streamed(litellm, target, server):
    prompts = ["hello", "you"]
    ours = server.complete(prompt=prompts, logprobs=1, **GREEDY).json()
    theirs = litellm.text_completion(prompt=prompts, logprobs=1, **GREEDY, **target)
    texts = [choice["text"] for choice in ours["choices"]]
    assert [choice.text for choice in theirs.choices] == texts
    for choice, expected in zip(theirs.choices, ours["choices"], strict=True):
        assert choice.logprobs.token_logprobs == expected["logprobs"]["token_logprobs"]
    stream = litellm.text_completion(prompt="hello", stream=True, **GREEDY, **target)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == texts[0]


def test_tools_are_called_and_their_results_sent_back(litellm, target):
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole = litellm.completion(messages=MESSAGES, max_tokens=200, seed=1, **options, **target)
    (choice,) = whole.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "find"
    assert call.function.arguments in ('{"q": 1}', '{"q": 2}', '{"q":1}', '{"q":2}')

    result = {"role": "tool", "tool_call_id": call.id, "content": "found"}
    messages = [*MESSAGES, choice.message, result]
    after = litellm.completion(messages=messages, tools=[TOOL], **GREEDY, **target)
    assert after.usage.prompt_tokens > whole.usage.prompt_tokens

    named = {"type": "function", "function": {"name": "find"}}
    options |= {"tool_choice": named, "stream": True}
    chunks = litellm.completion(messages=MESSAGES, max_tokens=200, seed=1, **options, **target)
    (streamed,) = litellm.stream_chunk_builder(list(chunks)).choices
    assert streamed.finish_reason == "tool_calls"
    assert [made.function.name for made in streamed.message.tool_calls] == ["find"]


def test_structured_output_follows_its_schema(litellm, target):
    schema = {"name": "answer", "schema": {"enum": ["yes", "no"]}}
    format = {"type": "json_schema", "json_schema": schema}
    answer = litellm.completion(messages=MESSAGES, max_tokens=20, response_format=format, **target)
    assert answer.choices[0].message.content in ('"yes"', '"no"')
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "error", "status"),
    [
        ({"api_key": "another"}, "AuthenticationError", 401),
        ({"model": "other"}, "NotFoundError", 404),
        ({"top_p": 7}, "BadRequestError", 400),
        ({"max_tokens": 600}, "ContextWindowExceededError", 400),
        ({"messages": said("x" * 600)}, "ContextWindowExceededError", 400),
        ({"messages": said("x" * 9999)}, "ContextWindowExceededError", 400),
    ],
)
def test_errors_have_litellms_types(litellm, target, changes, error, status):
    provider, _ = target["model"].split("/")
    if "model" in changes:
        changes = {"model": f"{provider}/{changes['model']}"}
    with pytest.raises(getattr(litellm, error)) as raised:
        litellm.completion(**{"messages": MESSAGES} | target | changes)
    assert raised.value.status_code == status
    assert type(raised.value).__name__ == error
