"""The web page's files over HTTP: content types, caching, policy, and the switch that hides it."""

import asyncio
import re

import pytest

from server.config import HttpOptions
from server.http.app import create_app
from server.http.page_routes import _FOLDER, PAGE_FILES
from tests.server.http.test_app import build, post

PATHS = {name: "/" if name == "index.html" else f"/page/{name}" for name in PAGE_FILES}


def get(app, path, method="GET", **headers):
    """Status, headers and body."""

    async def with_headers(scope, receive, send):
        given = [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]
        await app(scope | {"headers": given}, receive, send)

    async def stay():
        await asyncio.Event().wait()

    start, *parts = asyncio.run(post(with_headers, {}, stay, method=method, path=path))
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], fields, b"".join(part["body"] for part in parts)


@pytest.mark.parametrize("name", PAGE_FILES)
def test_a_file_has_its_type_and_is_fetched_again_only_if_it_changed(name):
    _, _, app = build()
    status, fields, body = get(app, PATHS[name])
    assert (status, body) == (200, (_FOLDER / name).read_bytes())
    assert fields["content-type"] == PAGE_FILES[name]
    assert fields["cache-control"] == "no-cache" and fields["x-content-type-options"] == "nosniff"
    status, again, body = get(app, PATHS[name], if_none_match=f'"other", W/{fields["etag"]}')
    assert (status, body, again["etag"]) == (304, b"", fields["etag"])
    assert get(app, PATHS[name], method="HEAD")[0] == 200


def test_the_policy_allows_neither_inline_code_nor_other_origins():
    _, fields, _ = get(build()[2], "/")
    rules = dict(
        rule.strip().split(" ", 1) for rule in fields["content-security-policy"].split(";")
    )
    assert rules["default-src"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}


def test_all_files_of_the_folder_are_served_and_nothing_else():
    assert {path.name for path in _FOLDER.iterdir()} == set(PAGE_FILES)
    app = build()[2]
    for path in ("/page/", "/page/index.html", "/page/..%2fapp.py", "/page/../app.py"):
        assert get(app, path)[0] == 404


def test_every_url_in_the_files_is_relative():
    for name, content_type in PAGE_FILES.items():
        text = (_FOLDER / name).read_text()
        urls = re.findall(r"""(?:src|href|action)="([^"]*)"|(?:request|fetch)\("([^"]*)\"""", text)
        assert not [url for pair in urls for url in pair if url.startswith(("/", "http"))], name
        assert "style=" not in text and "innerHTML" not in text
        assert "<script>" not in text, content_type


def test_without_the_page_its_paths_do_not_exist():
    _, service, _ = build()
    app = create_app(service, 2**20, 30, ui=HttpOptions(ui=False).ui)
    assert {get(app, path)[0] for path in PATHS.values()} == {404}
    assert get(app, "/health")[0] == 200


def test_the_model_says_whether_it_has_a_chat_template():
    assert b'"has_chat_template":false' in get(build()[2], "/v1/models")[2]
    assert b'"has_chat_template":true' in get(build(chat_template=object())[2], "/v1/models")[2]
