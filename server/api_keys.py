"""API keys: reads them from text and finds the one that a request gives, in constant time."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from server.patch_options import NAME_RULE, PATCH_NAME

_KEY = re.compile(r"[!-+\--~]{1,512}")  # visible ASCII without the comma, which separates keys
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_ADMIN = "admin"
_PATCHES = "patches="


@dataclass(frozen=True)
class ApiKey:
    """A key that clients may use.

    Attributes:
        digest: the key's SHA-256 hash; the key itself is not kept.
        name: the name of its owner, for logs; empty if it has none.
        is_admin: whether it may change what is served.
        patches: the names of the row patches that it may use; None allows all.
    """

    digest: bytes = field(repr=False)
    name: str = ""
    is_admin: bool = False
    patches: frozenset[str] | None = None

    def may_use(self, patch: str) -> bool:
        """Whether requests with this key may use a row patch."""
        return self.patches is None or patch in self.patches


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
    """The key of ``KEY [NAME] [admin] [patches=PATCH:PATCH]``.

    Commas separate keys in the environment, so colons separate the patches of a key.

    Raises:
        ConfigError: the text is malformed; the message names ``source`` and never the key.
    """
    key, *words = text.split() or [""]
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{source}: a key must have 1 to 512 visible ASCII characters and no comma"
        )
    patches = None
    if words and words[-1].startswith(_PATCHES):
        patches = _patches(words.pop().removeprefix(_PATCHES), source)
    is_admin = words[-1:] == [_ADMIN]
    names = words[:-1] if is_admin else words
    if len(names) > 1 or not all(map(_NAME.fullmatch, names)):
        raise ConfigError(f"{source}: expected KEY [NAME] [{_ADMIN}] [{_PATCHES}PATCH:PATCH]")
    return ApiKey(_digest(key.encode()), "".join(names), is_admin, patches)


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


def _patches(text: str, source: str) -> frozenset[str]:
    names = text.split(":") if text else []
    if not all(re.fullmatch(PATCH_NAME, name) for name in names):
        raise ConfigError(f"{source}: each name in {_PATCHES} must have {NAME_RULE}")
    return frozenset(names)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
