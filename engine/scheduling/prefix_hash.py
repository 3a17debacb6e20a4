"""Keyed hashes that identify KV blocks of equal prefixes; clients cannot forge them."""

import hashlib
import secrets
from array import array
from collections.abc import Sequence


class PrefixHasher:
    """Hashes of one engine: keyed with a random secret, chained from block to block.

    Callers with different salts share no prefixes, so response times reveal nothing between them.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(32)

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], salt: str) -> None:
        """Append to ``hashes`` the missing hashes of the full blocks of ``token_ids``."""
        size = self._block_size
        previous = hashes[-1] if hashes else self._digest(salt.encode())
        for start in range(len(hashes) * size, len(token_ids) - size + 1, size):
            block = array("q", token_ids[start : start + size])
            previous = self._digest(previous + block.tobytes())
            hashes.append(previous)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self._secret, digest_size=16).digest()
