"""Background text of a learning run: reads texts, and counts the rows that they read."""

import math
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.transformer import Transformer
from weights.errors import DataError
from weights.training.corpus import corpus_files, documents
from weights.training.packing import Passage, cut
from weights.training.row_reads import RowReads, count_reads
from weights.training.training_data import TextTokens

# tokens of a document whose reads are counted; longer ones count as several
DOCUMENT_TOKENS = 256


def text_passages(
    paths: Sequence[str], text: TextTokens, length: int, most: float = math.inf
) -> list[Passage]:
    """The documents as passages of at most ``length`` tokens, until they have ``most`` tokens.

    Raises:
        DataError: a text cannot be read, or no document has two tokens.
    """
    if not paths:
        return []
    found: list[Passage] = []
    num_tokens = 0
    for passage in _cut_documents(paths, text, length):
        found.append(passage)
        num_tokens += len(passage)
        if num_tokens >= most:
            break
    if not found:
        raise DataError(f"{', '.join(paths)}: no document has two tokens")
    return found


def _cut_documents(paths: Sequence[str], text: TextTokens, length: int) -> Iterator[Passage]:
    for one in documents(corpus_files(paths)):
        yield from cut(text.document(one), length)


def background_reads(
    base: Transformer, record: RowReads | None, background: Sequence[Passage]
) -> RowReads:
    """The model's ``record`` of reads if there is one, else reads by ``background``.

    Raises:
        ConfigError: there is neither.
    """
    if record is not None:
        return record
    if background:
        return count_reads(base, tqdm(background, "background", unit="passage", leave=False))
    raise ConfigError(
        "background: the model has no record of the rows that other text reads, and without replay"
        " it writes no text; give texts with --background, or record the reads once with"
        " `memplus bench trace TEXTS --model DIR --record`, or choose --rank reads"
    )
