"""Texts of a vocabulary's tokens, and a name for each that no other token has."""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property

# prefixes of names that are not the token's text
_BYTES, _ID = "bytes:", "token_id:"
_REPLACEMENT = "\ufffd"


class TokenTable:
    """Texts and names by token id, both made at the first use for the whole vocabulary."""

    def __init__(
        self,
        make_texts: Callable[[], Mapping[int, str]],
        token_bytes: Callable[[int], bytes | None],
        byte_ids: Collection[int] = (),
    ) -> None:
        """``make_texts`` returns the text of every token.

        ``token_bytes`` is that of ``Tokenizer``; ``byte_ids`` are tokens that stand for one byte,
        which may have the text of another token.
        """
        self._make_texts = make_texts
        self._token_bytes = token_bytes
        self._byte_ids = frozenset(byte_ids)

    def text(self, token_id: int) -> str:
        """The text of a token, empty if there is no such token."""
        return self._texts.get(token_id, "")

    def name(self, token_id: int) -> str:
        """The name of a token; see ``Tokenizer.token_name``."""
        return self._names.get(token_id) or f"{_ID}{token_id}"

    @cached_property
    def _texts(self) -> Mapping[int, str]:
        return self._make_texts()

    @cached_property
    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        taken: set[str] = set()
        for token_id in sorted(self._texts, key=lambda one: (one in self._byte_ids, one)):
            text = self._texts[token_id]
            name = text
            if not text or _REPLACEMENT in text or text.startswith((_BYTES, _ID)) or text in taken:
                data = self._token_bytes(token_id)
                name = f"{_ID}{token_id}" if not data else _BYTES + _escaped(data)
                if name in taken:
                    name = f"{_ID}{token_id}"
            taken.add(name)
            names[token_id] = name
        return names


def _escaped(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)
