"""Routes and request fields of row patches, with a fake engine: keys, names, limits and errors."""

import asyncio
import json
import re
from dataclasses import replace

import httpx
import pytest

from engine.request import PatchRef
from server.access import AccessOptions
from server.http.app import create_app
from server.http.front import Front
from server.http.served_patches import ServedPatches
from server.patch_options import PatchOptions
from tests.server.http.test_app import build, post
from tests.server.http.test_served_patches import FakeEngine

KEYS = ("root admin", "tenant patches=a", "half root2 admin patches=c", "plain")
SCALE = "memory_patches: scale must be a number from -100 to 100"
A, B = "a" * 64, "b" * 64


@pytest.fixture
def served(tmp_path):
    """(fake process, application) of a server with patches a and b, of which b is a default."""
    process, service = served_parts(tmp_path)
    return process, create_app(service, 2**20, 30)


def served_parts(tmp_path):
    """(fake process, service) with patches a and b, of which b is a default."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    process, service, _ = build(chat_template=object())
    options = PatchOptions(
        patch=(f"a={tmp_path}/a", f"b={tmp_path}/b"),
        default_patches=("b",),
        patch_dir=str(tmp_path),
    )
    patches = ServedPatches(FakeEngine(), service.metrics.patches, options, 4)
    asyncio.run(patches.load_first())
    return process, replace(service, patches=patches)


def ask(app, *requests, key=None):
    """The answers to (method, path, body) requests."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if key is not None:
        access = AccessOptions(api_key=KEYS)
        app = Front(app, access, access.keys(""), access_log=False)

    async def all_of_them():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            return [
                await client.request(method, path, json=body[0] if body else None)
                for method, path, *body in requests
            ]

    return asyncio.run(all_of_them())


def load(name):
    return "POST", "/v1/memory/patches", {"name": name}


def remove(name):
    return "DELETE", f"/v1/memory/patches/{name}"


def test_patches_are_listed_loaded_and_removed(served):
    _, app = served
    loaded, listed, models, removed, after = ask(
        *(app, load("c"), ("GET", "/v1/memory/patches"), ("GET", "/v1/models")),
        *(remove("c"), ("GET", "/v1/memory/patches")),
    )
    assert loaded.status_code == 200
    assert {**loaded.json(), "created": 0} == {
        "object": "memory_patch",
        "name": "c",
        "created": 0,
        "default": False,
        "content_hash": "c" * 64,
        "rows": 7,
        "bytes": 100,
        "tables": {"memory.table": 7},
        "data": None,
    }
    assert [one["name"] for one in listed.json()["data"]] == ["a", "b", "c"]
    assert [one["default"] for one in listed.json()["data"]] == [False, True, False]
    parents = {one["id"]: one["parent"] for one in models.json()["data"]}
    assert parents == {"mock": None, "mock+a": "mock", "mock+b": "mock", "mock+c": "mock"}
    assert next(iter(parents)) == "mock"  # the page takes the first one
    assert removed.json() == {"object": "memory_patch.deleted", "name": "c", "deleted": True}
    assert [one["name"] for one in after.json()["data"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (load("a"), 409, "already loaded"),
        (load("none"), 404, "patch none: "),
        (load(".."), 400, "name: String should match pattern"),
        (load("a/b"), 400, "name: String should match pattern"),
        (load(""), 400, "name: String should match pattern"),
        (load(7), 400, "name: "),
        (remove("c"), 404, "no patch 'c' is loaded"),
        (remove("b"), 409, "default"),
        (("POST", "/v1/memory/patches", {"name": "c", "folder": "/"}), 400, "unknown option"),
        (("GET", "/v1/models/mock+c"), 404, "does not exist"),
        (("GET", "/v1/models/other+a"), 404, "does not exist"),
        (("POST", "/tokenize", {"model": "mock+c", "prompt": "x"}), 404, "does not exist"),
    ],
)
def test_mistakes_are_errors_that_name_them(served, request_, status, message):
    (answer,) = ask(served[1], request_)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_patched_model_is_described_and_tokenises(served):
    one, ids = ask(
        *(served[1], ("GET", "/v1/models/mock+a")),
        ("POST", "/tokenize", {"model": "mock+a", "prompt": "x"}),
    )
    assert one.json()["id"] == "mock+a" and one.json()["root"] == one.json()["parent"] == "mock"
    assert ids.json()["count"] == 1


def test_only_admins_change_patches(served):
    _, app = served
    for key in ("plain", "tenant"):
        answers = ask(app, load("c"), remove("a"), key=key)
        assert [one.status_code for one in answers] == [403, 403]
        assert answers[0].json()["error"]["code"] == "admin_needed"
    assert [one.status_code for one in ask(app, load("c"), load("d"), key="half")] == [200, 403]
    answers = ask(app, remove("c"), load("d"), remove("a"), key="root")
    assert [one.status_code for one in answers] == [200, 200, 200]
    assert ask(app, load("c"), key="wrong")[0].status_code == 401


def test_a_limited_key_sees_and_uses_only_its_patches(served):
    _, app = served
    listed, models, seen, hidden, unknown = ask(
        *(app, ("GET", "/v1/memory/patches"), ("GET", "/v1/models"), ("GET", "/v1/models/mock+a")),
        *(("GET", "/v1/models/mock+b"), ("GET", "/v1/models/mock+zzz")),
        key="tenant",
    )
    assert [one["name"] for one in listed.json()["data"]] == ["a"]
    assert [one["id"] for one in models.json()["data"]] == ["mock", "mock+a"]
    assert [one.status_code for one in (seen, hidden, unknown)] == [200, 403, 403]
    bodies = [{"memory_patches": ["a", "b"]}, {"model": "mock+b"}, {"memory_patches": ["zzz"]}]
    requests = [("POST", "/v1/completions", {"prompt": "x", **body}) for body in bodies]
    for answer, param, name in zip(
        ask(app, *requests, key="tenant"),
        ("memory_patches", "model", "memory_patches"),
        ("b", "b", "zzz"),
        strict=True,
    ):
        error = answer.json()["error"]
        assert answer.status_code == 403 and error["param"] == param
        assert f"'{name}'" in error["message"] and error["code"] == "patch_not_allowed"


def test_a_limited_key_gets_the_metrics_of_its_patches_only(served):
    def patches(key):
        (answer,) = ask(served[1], ("GET", "/metrics"), key=key)
        assert "memplus:num_requests_running" in answer.text
        return set(re.findall(r'patch="(\w+)"', answer.text))

    assert patches("tenant") == {"a"} and patches("half") == set()
    assert patches("root") == patches("plain") == patches(None) == {"a", "b"}


def test_a_limited_key_gets_404_for_names_that_no_patch_can_have(served):
    for name in ("..", "x/y", "n" * 65):
        (answer,) = ask(served[1], ("GET", f"/v1/models/mock+{name}"), key="tenant")
        assert answer.status_code == 404, name


def test_a_server_that_lost_a_default_patch_is_not_ready(tmp_path):
    _, service = served_parts(tmp_path)
    app = create_app(service, 2**20, 30)
    assert ask(app, ("GET", "/ready"))[0].status_code == 200
    service.patches._lost(A)
    assert ask(app, ("GET", "/ready"))[0].status_code == 200
    service.patches._lost(B)
    (answer,) = ask(app, ("GET", "/ready"))
    # it needs no key, so it must not name a patch
    message = "a default row patch was lost when the engine restarted"
    assert answer.status_code == 503 and answer.json()["error"]["message"] == message
    again, ready = ask(app, load("b"), ("GET", "/ready"))
    assert again.json()["default"] is True and ready.status_code == 200


def sent_patches(served, body):
    """The patches of the requests that reach the engine."""
    process, app = served

    async def leave():
        while not process.sent:
            await asyncio.sleep(0)

    asyncio.run(post(app, {"prompt": ["x", "y"]} | body, leave))
    first, second, *_ = process.sent
    assert first.patches == second.patches
    return first.patches


@pytest.mark.parametrize(
    ("body", "patches"),
    [
        ({}, (PatchRef(B),)),
        ({"memory_patches": None}, (PatchRef(B),)),
        ({"model": "mock"}, (PatchRef(B),)),
        ({"memory_patches": []}, ()),
        ({"memory_patches": ["b", {"name": "a", "scale": 0.5}]}, (PatchRef(A, 0.5), PatchRef(B))),
        ({"memory_patches": [{"name": "a", "scale": None}, "a"]}, (PatchRef(A, 2.0),)),
        ({"memory_patches": [{"name": "a", "scale": 0}]}, ()),
        ({"model": "mock+a"}, (PatchRef(A),)),
        ({"model": "mock+a", "memory_patches": None}, (PatchRef(A),)),
        ({"memory_patches": ["a"] * 16}, (PatchRef(A, 16.0),)),
    ],
)
def test_requests_use_the_patches_that_they_name(served, body, patches):
    assert sent_patches(served, body) == patches


def test_a_patch_that_is_removed_while_the_prompt_is_encoded_is_an_error_by_name(tmp_path):
    process, service = served_parts(tmp_path)
    encode = service.tokenizer.encode

    def encode_late(text, add_special_tokens):
        service.patches._lost(A)
        return encode(text, add_special_tokens)

    service.tokenizer.encode = encode_late
    app = create_app(service, 2**20, 30)
    body = {"prompt": "x", "memory_patches": ["a"]}
    start, answer = asyncio.run(post(app, body, asyncio.Event().wait))
    assert start["status"] == 400 and process.sent == []
    assert "no patch 'a' is loaded" in json.loads(answer["body"])["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"memory_patches": ["c"]}, 400, "memory_patches: no patch 'c' is loaded"),
        ({"memory_patches": "a"}, 400, "memory_patches: must be a list"),
        ({"memory_patches": ["a"] * 17}, 400, "memory_patches: at most 16 patches, not 17"),
        ({"memory_patches": [7]}, 400, "memory_patches: each patch must be"),
        ({"memory_patches": [{"scale": 1}]}, 400, "memory_patches: a name must have"),
        ({"memory_patches": ["../a"]}, 400, "memory_patches: a name must have"),
        (
            {"memory_patches": [{"name": "a", "weight": 1}]},
            400,
            "memory_patches: each patch must be",
        ),
        ({"memory_patches": [{"name": "a", "scale": 101}]}, 400, SCALE),
        ({"memory_patches": [{"name": "a", "scale": True}]}, 400, SCALE),
        ({"memory_patches": [{"name": "a", "scale": "1"}]}, 400, SCALE),
        ({"memory_patches": [{"name": "a", "scale": float("nan")}]}, 400, SCALE),
        ({"memory_patches": [{"name": "a", "scale": 10**400}]}, 400, SCALE),
        ({"model": "mock+a", "memory_patches": ["b"]}, 400, "memory_patches: cannot be combined"),
        ({"model": "mock+a", "memory_patches": []}, 400, "memory_patches: cannot be combined"),
        (
            {"memory_patches": [{"name": "a", "scale": 60}] * 2},
            400,
            "memory_patches: scale must be -100 to 100, not 120",
        ),
        ({"model": "mock+c"}, 404, "model: 'mock+c' does not exist"),
        ({"model": "mock+.."}, 404, "model: 'mock+..' does not exist"),
        ({"model": "m" * 99}, 404, f"model: '{'m' * 80}' does not exist"),
        ({"model": "mock+"}, 404, "model: 'mock+' does not exist"),
    ],
)
def test_wrong_patches_are_errors_that_name_the_field(served, path, body, status, message):
    process, app = served
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    start, answer = asyncio.run(post(app, prompt | body, None, path=path))
    error = json.loads(answer["body"])["error"]
    assert start["status"] == status and message in error["message"] and process.sent == []
    assert error["param"] == message.split(":")[0]
