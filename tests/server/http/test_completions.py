"""The completions route over real HTTP, on a tiny Memory+ model."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.models import byte_tokenizer, plain_greedy
from tests.server.running import Running, running
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.tokenizer import JsonTokenizer

BYTES = JsonTokenizer(byte_tokenizer())
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(memory_plus_folder):
    """The answer of the plain forward loop to a prompt of ids."""
    model, _ = load_model(memory_plus_folder)
    return lambda ids, count: plain_greedy(model, ids, count)


def stream(server: Running, **body) -> list[dict]:
    """The JSON of every event; asserts that the last line is the end mark."""
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_memory_model_gives_the_tokens_of_a_plain_forward_loop(memory_server, expected):
    ids = BYTES.encode("Memory layers")
    answer = memory_server.complete(
        prompt="Memory layers", max_tokens=20, return_token_ids=True, **GREEDY
    ).json()
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == expected(ids, 20)
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None
    assert choice["text"] == BYTES.decode(ids + choice["token_ids"])[len("Memory layers") :]
    assert answer["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 20,
        "total_tokens": len(ids) + 20,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    assert answer["object"] == "text_completion" and answer["model"] == "tiny-memory"


def test_every_form_of_prompt(memory_server, expected):
    first, second = BYTES.encode("one"), BYTES.encode("two!")
    answers = {
        "text": memory_server.complete(prompt="one", max_tokens=4, **GREEDY),
        "ids": memory_server.complete(prompt=first, max_tokens=4, **GREEDY),
        "texts": memory_server.complete(prompt=["one", "two!"], max_tokens=4, **GREEDY),
        "lists": memory_server.complete(prompt=[first, second], max_tokens=4, **GREEDY),
    }
    texts = {
        form: [choice["text"] for choice in answer.json()["choices"]]
        for form, answer in answers.items()
    }
    assert texts["text"] == texts["ids"] and texts["texts"] == texts["lists"]
    assert texts["texts"][0] == texts["text"][0]
    assert [choice["index"] for choice in answers["lists"].json()["choices"]] == [0, 1]
    assert answers["lists"].json()["usage"]["prompt_tokens"] == 7


def test_a_stream_has_one_event_per_token_and_joins_to_the_whole_answer(memory_server):
    body = {"prompt": ["stream", "me"], "max_tokens": 15, "return_token_ids": True, **GREEDY}
    whole = memory_server.complete(**body).json()
    events = stream(memory_server, **body)
    for choice in whole["choices"]:
        parts = [
            event["choices"][0]
            for event in events
            if event["choices"][0]["index"] == choice["index"]
        ]
        assert [len(part["token_ids"]) for part in parts] == [1] * 15
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        assert [part["prompt_token_ids"] for part in parts[1:]] == [None] * 14
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert [part["finish_reason"] for part in parts] == [None] * 14 + ["length"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_usage_comes_in_a_separate_last_event(memory_server):
    options = {"stream_options": {"include_usage": True}}
    events = stream(memory_server, prompt="abc", max_tokens=3, **GREEDY, **options)
    assert [event["usage"] for event in events[:-1]] == [None] * 3
    assert events[-1]["choices"] == []
    last = events[-1]["usage"]
    assert (last["prompt_tokens"], last["completion_tokens"], last["total_tokens"]) == (3, 3, 6)


def test_usage_comes_with_every_event_on_request(memory_server):
    options = {"stream_options": {"continuous_usage_stats": True}}
    events = stream(memory_server, prompt="abc", max_tokens=3, **GREEDY, **options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_spans_tokens_is_cut_exactly(memory_server, streamed):
    body = {"prompt": "stop here", "max_tokens": 40, **GREEDY}
    text = memory_server.complete(**body).json()["choices"][0]["text"]
    # a character is one or several tokens, so these four span tokens
    at = next(at for at in range(8, 30) if text.find(text[at : at + 4]) == at)
    stop = text[at : at + 4]
    body |= {"stop": ["never there", stop]}
    if streamed:
        choices = [event["choices"][0] for event in stream(memory_server, **body)]
    else:
        choices = memory_server.complete(**body).json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text[:at]
    assert choices[-1]["finish_reason"] == "stop" and choices[-1]["stop_reason"] == stop


def test_a_stop_id_ends_the_answer_and_adds_no_text(memory_server, expected):
    tokens = expected(BYTES.encode("ids"), 20)
    at = next(at for at in range(3, 20) if tokens[at] not in tokens[:at])
    body = {"prompt": "ids", "max_tokens": 20, "stop_token_ids": [tokens[at]], **GREEDY}
    answer = memory_server.complete(**body, return_token_ids=True).json()
    (choice,) = answer["choices"]
    assert choice["token_ids"] == tokens[: at + 1] and choice["stop_reason"] == tokens[at]
    shown = BYTES.decode(BYTES.encode("ids") + tokens[:at])
    assert choice["finish_reason"] == "stop" and choice["text"] == shown[3:]


def test_a_seed_repeats_an_answer(memory_server):
    body = {"prompt": "x", "max_tokens": 20, "temperature": 2.0, "ignore_eos": True}
    texts = [
        memory_server.complete(**body, seed=seed).json()["choices"][0]["text"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_null_and_neutral_values_change_nothing(memory_server):
    plain = memory_server.complete(prompt="x", **GREEDY).json()["choices"]
    neutral = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": {}}
    nulls = dict.fromkeys(("max_tokens", "stop", "logprobs", "suffix", "seed", "stream_options"))
    answer = memory_server.complete(
        prompt="x", repetition_penalty=1.0, user="me", **GREEDY, **neutral, **nulls
    )
    assert answer.json()["choices"] == plain and len(plain[0]["text"]) > 0


def test_the_openai_client_completes_streams_and_lists(memory_server):
    with openai.OpenAI(base_url=f"{memory_server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny-memory"]
        body = {"model": "tiny-memory", "prompt": "hello", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**body)
        with client.completions.create(**body, stream=True) as events:
            parts = [event.choices[0].text for event in events]
        assert "".join(parts) == whole.choices[0].text and len(parts) == 8
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**body, extra_body={"novel": 1})
        assert caught.value.param == "novel"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**(body | {"model": "other"}))


BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [260]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "x", "max_tokens": 512}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "3"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 3.5}, "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "temperature": float("nan")}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "temperature": 1e300}, "temperature"),
    ({"prompt": "x", "repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"prompt": "x", "allowed_token_ids": [256], "min_tokens": 2}, "allowed_token_ids"),
    ({"prompt": "x" * 400, "prompt_logprobs": 20, "n": 64}, "prompt_logprobs"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "stop": 3}, "stop"),
    ({"prompt": "x", "stop_token_ids": [999]}, "stop_token_ids"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"other": 1}}, "stream_options"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 65}, "n"),
    ({"prompt": "x", "n": True}, "n"),
    ({"prompt": "x", "n": 2, "best_of": 1}, "best_of"),
    ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    ({"prompt": "x", "echo": 1}, "echo"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "min_p": 1.5}, "min_p"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "logit_bias": {"5": 1e9}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"five": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"999": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"5": "1"}}, "logit_bias"),
    ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "x", "allowed_token_ids": [999]}, "allowed_token_ids"),
    ({"prompt": "x", "allowed_token_ids": [64], "bad_words": ["a"]}, "allowed_token_ids"),
    ({"prompt": "x", "bad_words": [""]}, "bad_words"),
    ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"prompt": "x", "priority": 101}, "priority"),
    ({"prompt": "x", "cache_salt": "x" * 257}, "cache_salt"),
    ({"prompt": "x", "novel_option": 1}, "novel_option"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("body", "param"), BAD)
def test_an_invalid_field_is_a_400_that_names_it(memory_server, body, param, streamed):
    body = body | ({"stream": True} if streamed and "stream" not in param else {})
    answer = memory_server.http.post(
        "/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"].startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x" * 512}, "prompt"),
        ({"prompt": "x" * 513}, "prompt"),
        ({"prompt": "x" * 9999}, "prompt"),
        ({"prompt": "x" * 500, "max_tokens": 13}, "max_tokens"),
    ],
)
def test_too_many_tokens_have_the_code_and_words_that_clients_look_for(memory_server, body, param):
    answer = memory_server.complete(**body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "this model's maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize("body", ["{", "", "[1]", '"x"', "[" * 100_000, '{"prompt": ' + "9" * 9999])
def test_a_broken_body_is_a_400(memory_server, body):
    headers = {"Content-Type": "application/json"}
    answer = memory_server.http.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_errors_of_unknown_paths_methods_and_models_have_the_same_shape(memory_server):
    answers = [
        memory_server.http.get("/nowhere"),
        memory_server.http.get("/v1/completions"),
        memory_server.complete(prompt="x", model="other"),
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 404]
    shapes = [answer.json()["error"].keys() for answer in answers]
    assert shapes == [{"message", "type", "param", "code"}] * 3
    assert answers[2].json()["error"]["code"] == "model_not_found"


def test_a_good_request_after_bad_ones_works(memory_server):
    before = memory_server.metric("memplus:generation_tokens_total")
    for body, _ in BAD[:5]:
        memory_server.complete(**body)
    assert memory_server.complete(prompt="x", max_tokens=3, **GREEDY).status_code == 200
    assert memory_server.metric("memplus:generation_tokens_total") == before + 3


def test_the_main_metrics_are_exported(memory_server):
    text = memory_server.http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "admission_rejections_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_bucket",
        "request_decode_time_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "iteration_tokens_total_bucket",
    ):
        assert f"memplus:{name}" in text


def test_queue_prefill_and_decode_times_add_up_to_the_whole(memory_server):
    assert memory_server.complete(prompt=["x", "y"], max_tokens=5, **GREEDY).status_code == 200
    parts = [f"memplus:request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
    whole = "memplus:e2e_request_latency_seconds"
    counts = {memory_server.metric(f"{name}_count") for name in (*parts, whole)}
    assert len(counts) == 1 and min(counts) >= 2
    sums = [memory_server.metric(f"{name}_sum") for name in parts]
    assert min(sums) > 0
    assert sum(sums) == pytest.approx(memory_server.metric(f"{whole}_sum"))


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_disconnects_frees_its_blocks(slow_folder, streamed):
    body = json.dumps({"prompt": "x", "max_tokens": 3000, "stream": streamed, **GREEDY}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with running(slow_folder) as server:
        with socket.create_connection(server.address) as leaving:
            leaving.sendall(head.encode() + body)
            # disconnect once the engine runs the request
            while not server.metric("memplus:num_requests_running"):
                pass
        while server.metric("memplus:num_requests_running"):
            pass
        assert server.metric("memplus:kv_cache_usage_perc") == 0
        # the engine counts computed tokens: it stopped before the end
        assert 0 < server.metric("memplus:iteration_tokens_total_sum") < 3000


def test_extreme_values_do_not_affect_other_requests(memory_server):
    body = {"prompt": "neighbour", "max_tokens": 200, **GREEDY}
    alone = memory_server.complete(**body).json()["choices"][0]["text"]
    extremes = [
        {"top_k": 10**30},
        {"temperature": 1e-300},
        {"temperature": 100},
        {"top_p": 1e-300},
        {"seed": -(2**63)},
        {"stop": ["x" * 1024] * 16},
        {"logit_bias": {str(i): -100 for i in range(260)}},
        {"repetition_penalty": 100},
        {"repetition_penalty": 0.01},
        {"frequency_penalty": -2, "presence_penalty": -2},
        {"min_p": 1.0},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"stop_token_ids": list(range(256))},
    ]
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(memory_server.complete, **body)
        for extreme in extremes:
            answer = memory_server.complete(prompt="x", max_tokens=5, **extreme)
            assert answer.status_code == 200, answer.text
        assert neighbour.result().json()["choices"][0]["text"] == alone


LARGE = [
    {"prompt": "x" * 3_000_000},
    {"prompt": [1] * 1_000_000},
    {"prompt": [[1]] * 500_000},
    {"prompt": "x", "stop_token_ids": [999] * 500_000},
    {"prompt": "x", "stop": ["x" * 3_000_000]},
    {"prompt": "x", "stop": ["x"] * 500_000},
    {"prompt": ["x"] * 300_000 + [1]},
]


@pytest.mark.parametrize("body", LARGE, ids=range(len(LARGE)))
def test_the_error_of_a_large_body_is_short(memory_server, body):
    answer = memory_server.complete(**body)
    assert answer.status_code == 400 and len(answer.content) < 500


def test_a_wrong_content_type_is_a_400(memory_server):
    answer = memory_server.http.post("/v1/completions", content='{"prompt": "x"}')
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]
