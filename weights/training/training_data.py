"""Prepares a run's tokenizer and tokenised documents, once per run folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from weights.checkpoints.config_json import read_config
from weights.checkpoints.new_folder import replace_file
from weights.checkpoints.sentencepiece_tokenizer import SentencePieceTokenizer
from weights.checkpoints.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from weights.errors import CheckpointError, DataError
from weights.training.token_file import TokenFile
from weights.training.train_config import DataConfig
from weights.training.training_texts import TrainingTexts

# file of a trained tokenizer in the folder of the tokens
TRAINED_TOKENIZER = "tokenizer.model"
# characters tokenised at once; a tokenizer takes about 50 bytes for each
_PART_CHARACTERS = 2**22


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
        """The tokens of a whole document. A huge one is tokenised in parts, to save memory.

        Raises:
            DataError: as ``encode``.
        """
        ids = [] if self.bos_id is None else [self.bos_id]
        for part in _parts(text):
            ids += self.encode(part)
        return ids + self.end

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone.

        Raises:
            DataError: it has the name of a special token that the model's vocabulary lacks.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if (largest := max(ids, default=0)) >= self.vocab_size:
            name = self.tokenizer.token_name(largest)
            raise DataError(
                f"texts: contain {name}, the name of token {largest}, but the model has only"
                f" {self.vocab_size} tokens; remove this name from the texts"
            )
        return ids


@dataclass(frozen=True)
class TrainingData:
    """Data of a run; ``validation`` is None if no documents are held out."""

    text: TextTokens
    train: TokenFile
    validation: TokenFile | None


def _parts(text: str) -> Iterator[str]:
    """The text, cut before spaces or line ends if it is long."""
    first = 0
    while len(text) - first > _PART_CHARACTERS:
        end = first + _PART_CHARACTERS
        end = max(text.rfind(mark, first + 1, end) for mark in "\n ")
        end = end if end > first else first + _PART_CHARACTERS
        yield text[first:end]
        first = end
    yield text[first:]


def prepare_data(
    config: DataConfig,
    folder: Path,
    seed: int,
    init_from: str = "",
    texts: TrainingTexts | None = None,
    resumed: Path | None = None,
) -> TrainingData:
    """Tokenise documents into ``folder``, or open the ones tokenised there before.

    ``texts`` are those of ``config``, if the caller has them. A run that resumes from the
    checkpoint ``resumed`` has its tokens and its tokenizer, and needs no other files.

    Raises:
        DataError: a text cannot be read, there are too few documents, or ``folder`` has tokens but
            not their tokenizer.
        CheckpointError: the given tokenizer cannot be read.
    """
    train, validation = folder / "train", folder / "validation"
    if resumed is not None:
        text = checkpoint_text(resumed)
    elif not train.exists():  # it is written last
        texts = texts or TrainingTexts(config, seed)
        text = _text_tokens(config, folder, texts, init_from)
        others = texts.held_out()
        if others is not None and not validation.exists():
            TokenFile.write(validation, map(text.document, others), text.vocab_size)
        TokenFile.write(train, map(text.document, texts.train()), text.vocab_size)
    else:
        text = _text_tokens(config, folder, texts, init_from)
    tokens = {path: TokenFile(path) for path in (train, validation) if path.exists()}
    for path, one in tokens.items():
        one.check_pairs(f"data.{path.name}")
    return TrainingData(text, tokens[train], tokens.get(validation))


def _text_tokens(
    config: DataConfig, folder: Path, texts: TrainingTexts | None, init_from: str
) -> TextTokens:
    given = given_text(config, init_from)
    if given is not None:
        return given
    saved = folder / TRAINED_TOKENIZER
    try:
        if not saved.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # a run writes the tokenizer before any tokens
            has_tokens = any((folder / name).exists() for name in ("train", "validation"))
            if has_tokens or texts is None:
                raise DataError(
                    f"{saved}: missing, but this tokenizer made the tokens in {folder}; remove this"
                    " folder, and the run makes tokenizer and tokens again"
                )
            replace_file(saved, texts.tokenizer())
        return _sentencepiece_text(saved.read_bytes())
    except OSError as error:
        raise DataError(f"{saved}: {error.strerror}") from None


def given_text(config: DataConfig, init_from: str) -> TextTokens | None:
    """Tokenisation with the given tokenizer (CheckpointError); None if one is to be trained."""
    given = config.tokenizer or init_from
    if not given:
        return None
    if Path(given).is_dir():
        return checkpoint_text(Path(given))
    if not config.tokenizer:
        raise CheckpointError(f"run.init_from: {given}: no such folder")
    try:
        return _sentencepiece_text(Path(given).read_bytes())
    except OSError as error:
        raise CheckpointError(f"data.tokenizer: {given}: {error.strerror}") from None
    except RuntimeError as error:
        raise CheckpointError(
            f"data.tokenizer: {given}: not a sentencepiece model ({error})"
        ) from None


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
