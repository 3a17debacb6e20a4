"""Prepares a run's tokenizer and tokenised documents, once per run folder."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece

from weights.checkpoints.config_json import read_config
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from weights.errors import CheckpointError, DataError
from weights.training.corpus import corpus_files, documents
from weights.training.token_file import TokenFile
from weights.training.train_config import DataConfig
from weights.training.train_tokenizer import train_tokenizer


@dataclass(frozen=True)
class TextTokens:
    """Tokenisation of documents.

    Attributes:
        tokenizer: the tokenizer.
        files: its files in a checkpoint folder, by name.
        vocab_size: upper bound of ids.
        bos_id: begin token added before every document; None adds none.
        eos_ids: tokens that end a text; the smallest, if any, is added after every document.
    """

    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]

    @property
    def end(self) -> list[int]:
        """The end token, in a list; empty without one."""
        return sorted(self.eos_ids)[:1]

    def document(self, text: str) -> list[int]:
        """The tokens of a whole document."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        begin = [] if self.bos_id is None else [self.bos_id]
        return begin + ids + self.end


@dataclass(frozen=True)
class TrainingData:
    """Data of a run; ``validation`` is None if no documents are held out."""

    text: TextTokens
    train: TokenFile
    validation: TokenFile | None


def prepare_data(config: DataConfig, folder: Path, seed: int, init_from: str = "") -> TrainingData:
    """Tokenise documents into ``folder``, or open the ones tokenised there before.

    Raises:
        DataError: a text cannot be read, or there are too few documents.
        CheckpointError: the given tokenizer cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.partial-*"):  # left by a killed run
        shutil.rmtree(left)
    files = corpus_files(config.train)
    held_out = corpus_files(config.validation)
    validation_files = {path.resolve() for path in held_out}
    # remove duplicates and held-out files, which a folder in data.train may contain
    files = [path for path in dict.fromkeys(files) if path.resolve() not in validation_files]
    if not files:
        raise DataError("data.train: all files are in data.validation too; add others")
    share = 0.0 if held_out else config.validation_share
    train_documents = partial(_split, files, share, seed, is_held_out=False)
    text = _text_tokens(config, folder, train_documents, init_from)
    train = _tokens(folder / "train", text, train_documents())
    validation = None
    if held_out:
        validation = _tokens(folder / "validation", text, documents(held_out))
    elif share:
        part = _split(files, share, seed, is_held_out=True)
        validation = _tokens(folder / "validation", text, part)
    return TrainingData(text, train, validation)


def _split(files: Sequence[Path], share: float, seed: int, is_held_out: bool) -> Iterator[str]:
    """The held-out or the other documents; if ``share`` is not 0, the first is held out."""
    generator = random.Random(seed)
    for number, text in enumerate(documents(files)):
        if (bool(share) and (number == 0 or generator.random() < share)) == is_held_out:
            yield text


def _tokens(folder: Path, text: TextTokens, texts: Iterator[str]) -> TokenFile:
    if folder.exists():
        return TokenFile(folder)
    return TokenFile.write(folder, map(text.document, texts), text.vocab_size)


def _text_tokens(
    config: DataConfig, folder: Path, train_documents: Callable[[], Iterator[str]], init_from: str
) -> TextTokens:
    given = config.tokenizer or init_from
    if given and Path(given).is_dir():
        return checkpoint_text(Path(given))
    if given:
        try:
            return _sentencepiece_text(Path(given).read_bytes())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{given}: not a sentencepiece model ({error})") from None
    saved = folder / "tokenizer.model"
    if not saved.exists():
        partial = saved.with_suffix(".partial")
        partial.write_bytes(train_tokenizer(train_documents(), config.vocab_size))
        partial.rename(saved)
    return _sentencepiece_text(saved.read_bytes())


def checkpoint_text(folder: Path) -> TextTokens:
    """Tokenisation of a checkpoint folder's model (CheckpointError)."""
    config = read_config(folder)
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    return TextTokens(
        tokenizer=load_tokenizer(folder),
        files={path.name: path.read_bytes() for path in present},
        vocab_size=config.model.vocab_size,
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
    )


def _sentencepiece_text(model: bytes) -> TextTokens:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    bos_id, eos_id = processor.bos_id(), processor.eos_id()
    settings = json.dumps({"add_bos_token": bos_id >= 0}).encode()
    return TextTokens(
        tokenizer=SentencePieceTokenizer(model),
        files={"tokenizer.model": model, "tokenizer_config.json": settings},
        vocab_size=processor.GetPieceSize(),
        bos_id=bos_id if bos_id >= 0 else None,
        eos_ids=frozenset({eos_id} if eos_id >= 0 else ()),
    )
