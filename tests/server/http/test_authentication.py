"""Authentication: every path but the open ones answers 401 without a valid key."""

import asyncio
import json

import httpx
import pytest

from server.access import AccessOptions
from server.http.front import Front
from tests.server.http.test_app import build, post

KEY = "Sesame-1"
WRONG = {
    "no key": [],
    "wrong key": [("Authorization", "Bearer nothing")],
    "other case": [("Authorization", f"Bearer {KEY.lower()}")],
    "empty key": [("Authorization", "Bearer ")],
    "no scheme": [("Authorization", KEY)],
    "other scheme": [("Authorization", f"Basic {KEY}")],
    "longer": [("Authorization", f"Bearer {KEY}x")],
    "shorter": [("Authorization", f"Bearer {KEY[:-1]}")],
    "several": [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    "another header": [("X-Api-Key", KEY)],
}


def front(app, **options):
    access = AccessOptions(api_key=(f"{KEY}", "Other-1"), **options)
    return Front(app, access, access.keys(""), access_log=False)


def ask(app, *requests, headers=()):
    """The answers to (method, path) requests."""

    async def all_of_them():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(*one, headers=list(headers)) for one in requests]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_every_path_but_the_open_ones_is_a_401_without_a_valid_key(headers):
    _, _, app = build()
    paths = {*app.openapi()["paths"], "/openapi.json", "/docs", "/v1/embeddings", "/v1/score"}
    assert len(paths) > 10
    paths |= {"/nowhere", "/health/", "/HEALTH", "/ready/x", "/page", "/v1"}
    methods = ("GET", "POST", "HEAD", "DELETE", "PUT", "PATCH", "TRACE")
    open_ones = {(method, path) for method in ("GET", "HEAD") for path in ("/health", "/ready")}
    tried = sorted({(method, path) for path in paths for method in methods} - open_ones)
    for request, answer in zip(tried, ask(front(app), *tried, headers=headers), strict=True):
        assert answer.status_code == 401, request
        assert answer.headers["www-authenticate"] == "Bearer"
        if request[0] != "HEAD":
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == "invalid_api_key" and KEY.lower() not in str(error).lower()


def test_probes_the_page_and_options_need_no_key():
    _, _, app = build()
    open_ones = [("GET", "/health"), ("HEAD", "/ready"), ("GET", "/"), ("GET", "/page/app.js")]
    open_ones += [("OPTIONS", "/v1/completions"), ("OPTIONS", "/nowhere")]
    assert 401 not in {answer.status_code for answer in ask(front(app), *open_ones)}
    # a path that begins like the page's does not lead elsewhere
    sent = asyncio.run(post(front(app), None, None, method="GET", path="/page/../v1/models"))
    assert sent[0]["status"] == 404


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} "])
def test_a_valid_key_opens_everything(header):
    _, _, app = build()
    requests = [("GET", path) for path in ("/v1/models", "/metrics", "/version", "/openapi.json")]
    answers = ask(front(app), *requests, headers=[("Authorization", header)])
    assert {answer.status_code for answer in answers} == {200}


def test_without_keys_everything_is_open():
    _, _, app = build()
    access = AccessOptions()
    opened = Front(app, access, access.keys(""), access_log=False)
    assert ask(opened, ("GET", "/v1/models"))[0].status_code == 200


def test_the_body_of_an_unauthenticated_request_is_not_read():
    _, _, app = build()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-length", b"1000000")],
        "query_string": b"",
    }
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    asyncio.run(front(app)(scope, receive, send))
    assert sent[0]["status"] == 401 and json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize("root", ["", "/llm"])
def test_a_proxy_may_send_the_root_path_or_strip_it(root):
    _, _, app = build()
    behind = front(app, root_path="/llm")
    paths = [f"{root}/health", f"{root}/v1/models"]
    answers = ask(behind, *(("GET", path) for path in paths))
    assert [answer.status_code for answer in answers] == [200, 401]
    key = [("Authorization", f"Bearer {KEY}")]
    assert ask(behind, ("GET", paths[1]), headers=key)[0].status_code == 200
    assert ask(behind, ("GET", "/llmhealth"))[0].status_code == 401
    # no redirect, which would name the host that the client sent
    slashed = ("GET", f"{root}/v1/models/"), ("GET", f"{root}/health/")
    assert [one.status_code for one in ask(behind, *slashed, headers=key)] == [404, 404]
