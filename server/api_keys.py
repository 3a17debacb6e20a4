"""API keys: reads them from text and finds the one that a request gives, in constant time."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError

_KEY = re.compile(r"[!-+\--~]{1,512}")  # visible ASCII without the comma, which separates keys
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_ADMIN = "admin"


@dataclass(frozen=True)
class ApiKey:
    """A key that clients may use.

    Attributes:
        digest: the key's SHA-256 hash; the key itself is not kept.
        name: the name of its owner, for logs; empty if it has none.
        is_admin: whether it may change what is served.
    """

    digest: bytes = field(repr=False)
    name: str = ""
    is_admin: bool = False


class ApiKeys:
    """The keys of a server; without any, every request is allowed."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """ConfigError if a key occurs twice."""
        self._keys = tuple(keys)
        if len({key.digest for key in self._keys}) < len(self._keys):
            raise ConfigError("api_key: a key is given twice")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, given: bytes) -> ApiKey | None:
        """The key that equals ``given``; the time that this takes does not depend on the keys."""
        digest, found = _digest(given), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def parse_key(text: str, source: str) -> ApiKey:
    """The key of ``KEY [NAME] [admin]``.

    Raises:
        ConfigError: the text is malformed; the message names ``source`` and never the key.
    """
    key, *words = text.split() or [""]
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{source}: a key must have 1 to 512 visible ASCII characters and no comma"
        )
    is_admin = words[-1:] == [_ADMIN]
    names = words[:-1] if is_admin else words
    if len(names) > 1 or not all(map(_NAME.fullmatch, names)):
        raise ConfigError(f"{source}: expected KEY [NAME] [{_ADMIN}]")
    return ApiKey(_digest(key.encode()), "".join(names), is_admin)


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file, one a line; empty lines and lines that begin with ``#`` are skipped.

    Raises:
        ConfigError: the file cannot be read, has no key, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file: {path}: is not a text file in UTF-8") from None
    keys = [
        parse_key(line, f"api_key_file: {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not keys:
        raise ConfigError(f"api_key_file: {path}: has no key")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
