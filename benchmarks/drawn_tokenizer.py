"""A tokenizer of random words, as large as a model's, for timing grammars without a model."""

import random
from collections.abc import Sequence

EOS_ID = 0


class DrawnTokenizer:
    """An end token, the 256 bytes, and random words with and without a leading space."""

    special_ids = frozenset({EOS_ID})
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    longest_token = 9

    def __init__(self, vocab_size: int) -> None:
        drawn = random.Random(0)
        self._tokens = [b"", *(bytes([byte]) for byte in range(256))]
        while len(self._tokens) < vocab_size:
            letters = drawn.choices(range(ord("a"), ord("z") + 1), k=drawn.randrange(2, 9))
            self._tokens.append(drawn.choice((b"", b" ")) + bytes(letters))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._tokens[token_id] for token_id in ids).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return "<eos>" if token_id == EOS_ID else self.decode([token_id])

    def token_name(self, token_id: int) -> str:
        return f"token_id:{token_id}"
