"""Hashes by which KV blocks of equal prefixes are found; nobody outside can forge or probe them."""

import hashlib
import secrets
from array import array
from collections.abc import Sequence


class PrefixHasher:
    """Hashes of one engine: keyed with a secret of its own, chained from block to block.

    A salt keeps apart the prefixes of callers who do not want theirs to be found by others, even
    by the time that an answer takes.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(32)

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], salt: str) -> None:
        """Append to ``hashes`` those of the full blocks of ``token_ids`` that it lacks."""
        size = self._block_size
        previous = hashes[-1] if hashes else self._digest(salt.encode())
        for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
            previous = self._digest(
                previous + array("q", token_ids[start : start + size]).tobytes()
            )
            hashes.append(previous)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._secret, digest_size=16).digest()
