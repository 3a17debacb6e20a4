"""The tokenizer of a model whose own files have none: a folder that the user names."""

from pathlib import Path
from typing import NamedTuple

import sentencepiece

from weights.checkpoints.added_tokens import read_tokenizer_config
from weights.checkpoints.tokenizer import TOKENIZER_FILES, load_tokenizer
from weights.errors import CheckpointError


class TokenizerFolder(NamedTuple):
    """The files of a tokenizer, and the ids of its begin and end tokens."""

    files: dict[str, bytes]
    bos_id: int | None
    eos_id: int


def read_tokenizer_folder(
    folder: Path, vocab_size: int, usual_eos: str | None = None
) -> TokenizerFolder:
    """Read a folder's tokenizer and check that it can be used.

    Args:
        vocab_size: number of the model's tokens.
        usual_eos: the token that ends a text if no file names another.

    Raises:
        CheckpointError: a file cannot be read, or no file names the token that ends a text, or the
            model lacks the tokens that begin and end one.
    """
    tokenizer = load_tokenizer(folder)
    config = read_tokenizer_config(folder)

    def named(name: str | None) -> int | None:
        ids = [] if name is None else tokenizer.encode(name, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and tokenizer.token_text(ids[0]) == name else None

    bos_id, eos_id = named(config.bos), named(config.eos or usual_eos)
    if eos_id is None and not (folder / "tokenizer.json").exists():
        bos_id, eos_id = _own_ids(folder / "tokenizer.model", bos_id)
    if eos_id is None:
        raise CheckpointError(
            f"{folder}: no token ends a text; name it as eos_token in tokenizer_config.json"
        )
    largest = max(eos_id, bos_id or 0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{folder}: token {largest} is outside the model's vocabulary, {vocab_size}"
        )
    paths = [folder / name for name in TOKENIZER_FILES]
    try:
        files = {path.name: path.read_bytes() for path in paths if path.exists()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None
    return TokenizerFolder(files, bos_id, eos_id)


def _own_ids(path: Path, bos_id: int | None) -> tuple[int | None, int | None]:
    """The ids that a sentencepiece model names itself."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())
    found = [one if one >= 0 else None for one in (processor.bos_id(), processor.eos_id())]
    return (bos_id if bos_id is not None else found[0]), found[1]
