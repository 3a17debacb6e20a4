"""Truncates encoded texts at their beginning."""

from collections.abc import Sequence

from weights.checkpoints.tokenizer import Tokenizer


def last_tokens(tokenizer: Tokenizer, ids: Sequence[int], count: int) -> list[int]:
    """The last ``count`` tokens of a text that was encoded with its special tokens.

    The begin and end tokens that ``encode`` added are kept and count, as in vLLM: only tokens of
    the text are dropped. vLLM cuts prompts that are sent as ids without regard to their meaning.
    """
    begin, end = tokenizer.begin_ids, tokenizer.end_ids
    if len(ids) <= count:
        return list(ids)
    room = max(0, count - len(begin) - len(end))
    text_end = len(ids) - len(end)
    kept = [*begin, *ids[text_end - room : text_end], *end]
    return kept[:count]
