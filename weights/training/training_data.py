"""A run's tokenizer and tokenised documents: made once, in the run's folder, then found there."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece

from weights.checkpoints.config_json import read_config
from weights.checkpoints.tokenizer import (
    TOKENIZER_FILES,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from weights.errors import CheckpointError, DataError
from weights.training.corpus import corpus_files, documents
from weights.training.token_file import TokenFile
from weights.training.train_config import DataConfig
from weights.training.train_tokenizer import train_tokenizer


@dataclass(frozen=True)
class TextTokens:
    """How texts become a model's tokens.

    Attributes:
        tokenizer: it.
        files: what a checkpoint folder carries of it, by name.
        vocab_size: ids are less.
        bos_id: put before every document, where there is one.
        eos_ids: those that end a text; the smallest is put behind every document, if there is one.
    """

    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]

    def document(self, text: str) -> list[int]:
        """The tokens of a whole document."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        begin = [] if self.bos_id is None else [self.bos_id]
        return begin + ids + sorted(self.eos_ids)[:1]


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on; ``validation`` is None where nothing is held out."""

    text: TextTokens
    train: TokenFile
    validation: TokenFile | None


def prepare_data(config: DataConfig, folder: Path, seed: int, init_from: str = "") -> TrainingData:
    """Tokenise documents into ``folder``, or find what was tokenised there.

    Raises:
        DataError: a text cannot be read, or there are too few.
        CheckpointError: the given tokenizer cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.partial-*"):  # by a run that was killed
        shutil.rmtree(left)
    files = corpus_files(config.train)
    held_out = corpus_files(config.validation)
    own = {path.resolve() for path in held_out}
    # once each, and none that is held out, though a folder of both were named
    files = [path for path in dict.fromkeys(files) if path.resolve() not in own]
    if not files:
        raise DataError("data.train: every file is held out by data.validation")
    share = 0.0 if held_out else config.validation_share
    learnt = partial(_part, files, share, seed, is_held_out=False)
    text = _text_tokens(config, folder, learnt, init_from)
    train = _tokens(folder / "train", text, learnt())
    validation = None
    if held_out:
        validation = _tokens(folder / "validation", text, documents(held_out))
    elif share:
        part = _part(files, share, seed, is_held_out=True)
        validation = _tokens(folder / "validation", text, part)
    return TrainingData(text, train, validation)


def _part(files: Sequence[Path], share: float, seed: int, is_held_out: bool) -> Iterator[str]:
    """Some of the documents, each part the other's rest; the first is held out, if any is."""
    drawn = random.Random(seed)
    for number, text in enumerate(documents(files)):
        if (bool(share) and (number == 0 or drawn.random() < share)) == is_held_out:
            yield text


def _tokens(folder: Path, text: TextTokens, texts: Iterator[str]) -> TokenFile:
    if folder.exists():
        return TokenFile(folder)
    return TokenFile.write(folder, map(text.document, texts), text.vocab_size)


def _text_tokens(
    config: DataConfig, folder: Path, learnt: Callable[[], Iterator[str]], init_from: str
) -> TextTokens:
    given = config.tokenizer or init_from
    if given and Path(given).is_dir():
        return checkpoint_text(Path(given))
    if given:
        try:
            return _of_sentencepiece(Path(given).read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{given}: not a sentencepiece model ({error})") from None
    kept = folder / "tokenizer.model"
    if not kept.exists():
        partial = kept.with_suffix(".partial")
        partial.write_bytes(train_tokenizer(learnt(), config.vocab_size))
        partial.rename(kept)
    return _of_sentencepiece(kept.read_bytes())


def checkpoint_text(folder: Path) -> TextTokens:
    """A checkpoint folder's own (CheckpointError)."""
    config = read_config(folder)
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return TextTokens(
        tokenizer=load_tokenizer(folder),
        files={path.name: path.read_bytes() for path in present},
        vocab_size=config.model.vocab_size,
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
    )


def _of_sentencepiece(model: bytes) -> TextTokens:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    bos_id, eos_id = processor.bos_id(), processor.eos_id()
    settings = json.dumps({"add_bos_token": bos_id >= 0}).encode()
    return TextTokens(
        tokenizer=SentencePieceTokenizer(model, add_bos=bos_id >= 0),
        files={"tokenizer.model": model, "tokenizer_config.json": settings},
        vocab_size=processor.GetPieceSize(),
        bos_id=bos_id if bos_id >= 0 else None,
        eos_ids=frozenset({eos_id} if eos_id >= 0 else ()),
    )
