"""The website of the documentation: complete, without warnings, and with no other host in it."""

import contextlib
import functools
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.chromium import chromium
from tests.docs.pages import DOCS, ROOT

# the theme knows these hosts, but asks them only for diagrams and repositories, which we do not use
UNUSED = ("unpkg.com", "api.github.com", "gitlab.com")
SHOWN = ("index.html", "layer/index.html", "operations/index.html", "api/operations/index.html")


class _Loads(HTMLParser):
    """Collects the addresses that a page loads; plain links load nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "srcset", "data", "style") or (tag == "link" and key == "href"):
                self.found.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the build fails on any warning, a broken link or heading among them."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return folder


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP; yields the URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for group in nav for pages in group.values() for page in pages]
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_hosts(site):
    pages = [*site.rglob("*.html")]
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text())
        assert not [one for one in loads.found if "//" in one], page
    for style in (*site.rglob("*.css"), *site.rglob("*.svg")):
        text = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", style.read_text())
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", text), style
    for script in site.rglob("*.js"):
        hosts = set(re.findall(r"[\"'`]https?://([\w.-]+)", script.read_text()))
        assert hosts <= {*UNUSED, "www.w3.org"}, script
    # files of the repository that pages link to are part of the site
    for linked in ("smollm2_memory/index.html", "facts/results/results.csv"):
        assert (site / "files" / "benchmarks" / linked).is_file()


@pytest.mark.slow
def test_pages_of_the_site_in_a_browser(site):
    with served(site) as url, chromium() as browser:
        asked: list[str] = []
        errors: list[str] = []
        for scheme, width in (("light", 1280), ("dark", 390)):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            for path in SHOWN:
                page.goto(f"{url}/{path}")
                # wide tables scroll inside the page
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path
                images = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
                assert not page.evaluate(images)
            page.close()
    assert not errors
    assert not [one for one in asked if not one.startswith((url, "data:", "blob:"))]
