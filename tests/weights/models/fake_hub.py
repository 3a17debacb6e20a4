"""A Hugging Face Hub on this machine: the routes that ``huggingface_hub`` calls to download."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

MAIN = "main"
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeHub:
    """Repositories and how to answer for them.

    Attributes:
        url: the address, for ``HF_ENDPOINT``.
        commits: files by (repository, commit).
        branches: commits by (repository, branch).
        errors: by repository, the status and ``X-Error-Code`` of all answers, or of its files.
        tokens: by repository, the token that its readers need.
        cut: names of files whose first download breaks in the middle.
        endless: calls, by the names of files that never end, after their download has begun.
        requests: method, path and ``Range`` of each request for a file, in order.
    """

    url: str = ""
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    file_errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    endless: dict[str, Callable[[], None]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, repository: str, files: dict[str, bytes], branch: str = MAIN) -> str:
        """Commit files to a branch; the commit's hash."""
        names = [repository, branch, *files]
        commit = hashlib.sha1("\n".join(names).encode() + b"".join(files.values())).hexdigest()
        self.commits[repository, commit] = files
        self.branches[repository, branch] = commit
        return commit

    @property
    def downloaded(self) -> list[str]:
        """Names of the files whose content was requested."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET"]


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()

    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if found := _TREE.fullmatch(path):
            if files := self._files(found[1], found[2]):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in files.items()
                ]
                self._json(entries)
        elif found := _INFO.fullmatch(path):
            if self._files(found[1], found[2] or MAIN) is not None:
                commit = self._commit(found[1], found[2] or MAIN)
                self._json({"id": found[1], "sha": commit, "siblings": []})
        elif found := _FILE.fullmatch(path):
            self._file(found[1], found[2], unquote(found[3]))
        else:
            self._error(404, "")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _commit(self, repository: str, revision: str) -> str:
        revision = unquote(revision)
        return self.hub.branches.get((repository, revision), revision)

    def _files(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a commit; sends an error if they cannot be read."""
        wanted = self.hub.tokens.get(repository)
        given = self.headers.get("Authorization")
        if repository in self.hub.errors:
            self._error(*self.hub.errors[repository])
        elif wanted is not None and given != f"Bearer {wanted}":
            self._error(401, "RepoNotFound")
        else:
            files = self.hub.commits.get((repository, self._commit(repository, revision)))
            if files is None:
                is_known = any(name == repository for name, _ in self.hub.commits)
                # the Hub does not tell strangers which private repositories exist
                self._error(*(404, "RevisionNotFound") if is_known else (401, "RepoNotFound"))
            return files
        return None

    def _file(self, repository: str, revision: str, name: str) -> None:
        part = self.headers.get("Range")
        self.hub.requests.append((self.command, self.path, part))
        files = self._files(repository, revision)
        if files is None:
            return
        if repository in self.hub.file_errors:
            self._error(*self.hub.file_errors[repository])
            return
        if name not in files:
            self._error(404, "EntryNotFound")
            return
        content = files[name]
        start = int(part.removeprefix("bytes=").rstrip("-")) if part else 0
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", self._commit(repository, revision))
        self.send_header("ETag", f'"{_etag(content)}"')
        is_endless = name in self.hub.endless
        self.send_header("Content-Length", str(1 << 30 if is_endless else len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.cut:
            self.hub.cut.remove(name)
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])
        if is_endless:
            self.hub.endless[name]()
            # until the client closes the connection
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))
            self.close_connection = True

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
