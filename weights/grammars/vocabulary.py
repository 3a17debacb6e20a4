"""The texts of a tokenizer's tokens, from which grammars derive the tokens that they allow."""

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from weights.checkpoints.tokenizer import Tokenizer

# tokens that the library decides about together; its own ones suit the strings of JSON
_WORD_SLICES = (r" ?[a-z]+", r" ?[A-Za-z]+")


class Vocabulary:
    """The bytes of all tokens, in the form that ``TokenizerWrapper`` reads.

    Attributes:
        tokens: by token id, the bytes that it adds to a text; the name of a special token; empty
            for an id that the tokenizer does not know.
        special_token_ids: ids that no text contains.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        special = tokenizer.special_ids.union(eos_ids)
        self.special_token_ids = sorted(i for i in special if i < vocab_size)
        self.eos_token_id = eos_ids[0]
        # decode after some text, because many tokenizers drop the space of the first token
        anchor = tokenizer.encode("a", add_special_tokens=False)
        prefix = len(tokenizer.decode(anchor))

        def spelled(token_id: int) -> bytes:
            if token_id in special:
                return tokenizer.token_text(token_id).encode()
            known = tokenizer.token_bytes(token_id)
            if known is not None:
                return known
            return tokenizer.decode([*anchor, token_id])[prefix:].encode()

        self.tokens = [spelled(token_id) for token_id in range(vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        """Texts are never tokenised; see ``no_forcing`` in ``lark_source``."""
        raise RuntimeError("a grammar must not force texts")


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """The library's tokenizer for a model with ``vocab_size`` token ids and at least one EOS."""
    vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
    slices = [*LLTokenizer.general_slices(), *_WORD_SLICES]
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(eos_ids), slices=slices)
