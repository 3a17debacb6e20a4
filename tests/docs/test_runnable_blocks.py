"""Every block that a page marks as runnable runs, and prints what the page says.

The blocks of a page run in order, in one temporary folder that has the repository's ``docs``. A
block that ends with ``memplus serve`` starts a server, which the later blocks of the page reach at
http://127.0.0.1:8000; pages without such a block reach the default model there.
"""

import contextlib
import doctest
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, Block, marked_blocks, page_name
from tests.server.running import running

ADDRESS, SERVE = "127.0.0.1:8000", "memplus serve"
MARKED = {page_name(page): marked_blocks(page.read_text()) for page in PAGES}
MARKED = {name: blocks for name, blocks in MARKED.items() if blocks}


class Servers:
    """Servers by their command; each is started once, on a free port."""

    def __init__(self) -> None:
        self._urls: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def url(self, command: str) -> str:
        """The URL of the server that a ``memplus serve ...`` line starts."""
        if command not in self._urls:
            options = [*shlex.split(command, comments=True)[2:]]
            model = "wordnet"
            if "--model" in options:
                at = options.index("--model")
                model = options[at + 1]
                del options[at : at + 2]
            server = self._stack.enter_context(running(Path(model), *options))
            self._urls[command] = server.url
        return self._urls[command]

    def close(self) -> None:
        """End all servers."""
        self._stack.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the blocks of a page run, with a command ``memplus`` of this tree."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "memplus"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m server.cli.main "$@"\n')
    command.chmod(0o755)
    path = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = tmp_path / "page"
    place.mkdir()
    (place / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(place)
    return place


def run_page(blocks: list[Block], servers: Servers) -> None:
    """Run blocks in order; AssertionError with the line of a block that fails."""
    namespace: dict[str, object] = {"__name__": "page"}
    serve, printed = SERVE, ""
    for block in blocks:
        if block.kind == "output":
            check = doctest.OutputChecker().check_output
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert check(block.text, printed, flags), f"line {block.line}: printed {printed}"
            continue
        *lines, last = block.text.rstrip().splitlines()
        starts = block.language != "python" and last.startswith(SERVE)
        text = "\n".join(lines) if starts else block.text
        if ADDRESS in text:
            text = text.replace(ADDRESS, servers.url(serve).removeprefix("http://"))
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as written:
                # the line numbers of a traceback are those of the page
                exec(compile("\n" * (block.line - 1) + text, "page", "exec"), namespace)
            printed = written.getvalue()
        else:
            # the pages have no other languages
            assert block.language in ("bash", "sh"), f"line {block.line}: {block.language}"
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert not done.returncode, f"line {block.line}: {done.stdout}{done.stderr}"
            printed = done.stdout
        if starts:
            serve = last
            servers.url(serve)


@pytest.mark.slow
@pytest.mark.parametrize("name", MARKED)
def test_the_blocks_of_a_page_run(name, servers, folder):
    run_page(MARKED[name], servers)
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- runnable -->\n```bash\necho wrong\nfalse\n```", "line 3: wrong"),
        ("<!-- runnable -->\n```bash\necho a\n```\n<!-- output -->\n```text\nb\n```", "printed a"),
        ("<!-- runnable -->\n```ruby\nputs 1\n```", "line 3: ruby"),
    ],
)
def test_a_block_that_fails_is_named(text, message):
    with pytest.raises(AssertionError, match=message):
        run_page(marked_blocks(text), Servers())


def test_python_blocks_of_a_page_share_names():
    first, second = "<!-- runnable -->\n```python\nx = 3\n```", "print(x * 2)\n```"
    text = f"{first}\n<!-- runnable -->\n```python\n{second}\n<!-- output -->\n```text\n6\n```"
    run_page(marked_blocks(text), Servers())
    assert len(marked_blocks(text)) == 3
