"""Layers in front of the application: request ids, access log, cross-origin requests."""

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from engine.request import TokenOutput
from server.access import AccessOptions
from server.api_keys import ApiKeys, parse_key
from server.http.app import create_app
from server.http.front import Front
from server.request_id import CURRENT_ID, current_request_id, engine_request_id
from tests.server.http.test_app import answer, build, post
from tests.server.http.test_authentication import ask


def front(app, keys=(), access_log=False, **options):
    return Front(app, AccessOptions(**options), ApiKeys(keys), access_log=access_log)


def test_a_valid_request_id_is_returned_and_others_are_replaced():
    _, _, app = build()
    given = ["abc-123_:@/+=.", "x" * 128, "x" * 129, "a b", "a\tb", "é", ""]
    answers = [
        ask(front(app), ("GET", "/version"), headers=[(b"X-Request-Id", text.encode())])[0]
        for text in given
    ]
    ids = [one.headers["x-request-id"] for one in answers]
    assert ids[:2] == given[:2] and not set(ids[2:]) & set(given)
    assert len(set(ids)) == len(given) and all(len(one) == 32 for one in ids[2:])
    assert current_request_id() == ""


@pytest.mark.parametrize("path", ["/nowhere", "/v1/completions", "/v1/models/other"])
def test_errors_have_the_request_id_too(path):
    _, _, app = build()
    (response,) = ask(front(app), ("POST", path), headers=[("X-Request-Id", "mine")])
    assert response.status_code >= 400 and response.headers["x-request-id"] == "mine"


def test_the_engine_and_error_messages_get_the_request_id():
    process, service, app = build()

    async def fail():
        while not process.sent:
            await asyncio.sleep(0)
        failed = TokenOutput(process.sent[-1].request_id, (), "error", error="a step failed")
        answer(service, failed)
        await asyncio.Event().wait()

    async def with_id(scope, receive, send):
        scope["headers"] = [*scope["headers"], (b"x-request-id", b"job-7")]
        await front(app)(scope, receive, send)

    sent = asyncio.run(post(with_id, {"prompt": "a"}, fail))
    assert sent[0]["status"] == 500
    message = json.loads(sent[1]["body"])["error"]["message"]
    assert message == "a step failed (request job-7)"
    assert process.sent[0].request_id.startswith("cmpl-job-7-")


@pytest.mark.parametrize(("param", "status"), [(None, 500), ("response_format", 400)])
def test_only_failures_of_the_engine_are_logged(caplog, param, status):
    process, service, app = build()

    async def fail():
        while not process.sent:
            await asyncio.sleep(0)
        name = process.sent[-1].request_id
        answer(service, TokenOutput(name, (), "error", error="secret", error_param=param))
        await asyncio.Event().wait()

    sent = asyncio.run(post(app, {"prompt": "a"}, fail))
    assert sent[0]["status"] == status
    assert ("secret" in caplog.text) == (param is None)


def test_clients_that_send_the_same_request_id_get_different_engine_requests():
    token = CURRENT_ID.set("job-7")
    assert engine_request_id("cmpl") != engine_request_id("cmpl")
    CURRENT_ID.reset(token)


def access_lines(caplog):
    return [one.getMessage() for one in caplog.records if one.name == "server.http.access_log"]


def test_the_access_log_names_the_request_but_no_secret(caplog):
    caplog.set_level(logging.INFO)
    _, _, app = build()
    logged = front(app, [parse_key("sesame alice", "")], access_log=True)
    key = [("Authorization", "Bearer sesame")]
    ask(logged, ("GET", "/version?token=hidden"), headers=key)
    ask(logged, ("POST", "/v1/completions"), headers=[("Authorization", "Bearer wrong-one")])
    ask(logged, ("GET", "/%0aforged%20line%22" + "x" * 300))
    first, second, third = access_lines(caplog)
    assert 'key="alice" method="GET" path="/version" status=200 duration_ms=' in first
    assert 'key="" method="POST" path="/v1/completions" status=401 ' in second
    assert 'path="/\\nforged line\\"xxx' in third and "\n" not in third and len(third) < 400
    for secret in ("hidden", "sesame", "wrong-one"):
        assert secret not in first + second + third


def test_the_access_log_is_off_by_default(caplog):
    caplog.set_level(logging.INFO)
    _, _, app = build()
    ask(front(app), ("GET", "/version"))
    assert access_lines(caplog) == []


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_asked_and_cut(caplog, log_prompts):
    caplog.set_level(logging.INFO)
    process, service, _ = build()
    app = create_app(replace(service, log_prompts=log_prompts), 2**20, 30)

    async def leave():
        while not process.sent:
            await asyncio.sleep(0)

    asyncio.run(post(app, {"prompt": ["zan\n", "zibar"], "user": "hidden"}, leave))
    asyncio.run(post(app, {"prompt": "z" * 9000}, leave))
    lines = [one.getMessage() for one in caplog.records if "prompt: " in one.getMessage()]
    if not log_prompts:
        assert not lines and "zibar" not in caplog.text
        return
    assert lines[0] == 'prompt: {"prompt":["zan\\n","zibar"]}'
    assert lines[1].startswith('prompt: {"prompt":"zzz') and len(lines[1]) < 4200


def test_pages_of_allowed_origins_may_call_the_server():
    _, _, app = build()
    allowed = ("https://one.example", "http://localhost:3000")
    shared = front(app, [parse_key("sesame", "")], cors_origin=allowed)
    for origin, is_allowed in ((allowed[0], True), (allowed[1], True), ("https://evil.com", False)):
        preflight = [("Origin", origin), ("Access-Control-Request-Method", "POST")]
        preflight += [("Access-Control-Request-Headers", "authorization,x-stainless-os")]
        (response,) = ask(shared, ("OPTIONS", "/v1/completions"), headers=preflight)
        assert (response.status_code == 200) == is_allowed
        assert (response.headers.get("access-control-allow-origin") == origin) == is_allowed
        # the page can read why it was refused
        (response,) = ask(shared, ("GET", "/v1/models"), headers=[("Origin", origin)])
        assert response.status_code == 401
        assert (response.headers.get("access-control-allow-origin") == origin) == is_allowed


def test_without_an_origin_no_page_may_call_the_server():
    _, _, app = build()
    headers = [("Origin", "https://one.example"), ("Access-Control-Request-Method", "POST")]
    for method, path in (("OPTIONS", "/v1/completions"), ("GET", "/version")):
        (response,) = ask(front(app), (method, path), headers=headers)
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("streamed", [False, True])
def test_every_response_has_one_request_id(streamed):
    process, service, app = build()

    async def finish():
        while not process.sent:
            await asyncio.sleep(0)
        answer(service, TokenOutput(process.sent[0].request_id, (65,), "length"))
        await asyncio.Event().wait()

    sent = asyncio.run(post(front(app), {"prompt": "a", "stream": streamed}, finish))
    assert [name for name, _ in sent[0]["headers"]].count(b"x-request-id") == 1


def test_the_root_path_without_a_slash_is_redirected_to_the_page():
    _, _, app = build()
    requests = [("GET", "/a/b"), ("HEAD", "/a/b"), ("GET", "/a/b?x=1"), ("GET", "/a/b/")]
    answers = [
        ask(front(app, [parse_key("k" * 32, "")], root_path="/a/b"), one)[0] for one in requests
    ]
    assert [one.status_code for one in answers] == [307, 307, 307, 200]
    places = [one.headers.get("location") for one in answers]
    assert places == ["/a/b/", "/a/b/", "/a/b/?x=1", None]
    (response,) = ask(front(app, root_path="/a/b"), ("POST", "/a/b"))
    assert response.status_code in (404, 405)
