"""``memplus bench lookahead``: how many of the rows read were guessed, by distance and width."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import ConfigError
from engine.executors.lookahead import predicted_memories
from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import load_model
from weights.training.corpus import corpus_files, documents
from weights.training.training_data import checkpoint_text


@dataclass(frozen=True)
class Recall:
    """Guesses of one memory layer's rows.

    Attributes:
        layer: whose rows they are.
        distance: layers that run in between, its own among them.
        candidates: rows a head that are guessed.
        recall: share of the rows read that are among the guesses.
        precision: share of the guesses that are read.
    """

    layer: int
    distance: int
    candidates: int
    recall: float
    precision: float


def measure(
    folder: Path,
    texts: Sequence[str],
    num_tokens: int,
    widths: Sequence[float],
    json_file: Path | None,
) -> list[Recall]:
    """Print a line for every memory layer, distance and width, which is a multiple of K.

    Raises:
        ConfigError: the model has no memory layers, the texts fewer tokens, or the JSON file no
            folder.
        CheckpointError, DataError: model or texts cannot be read.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"json: there is no folder {json_file.parent}")
    model, config = load_model(folder)
    memory = config.model.memory
    if memory is None:
        raise ConfigError(f"model: {folder} has no memory layers")
    candidates = sorted({min(round(memory.top_k * width), memory.num_subkeys) for width in widths})
    counts = _Counts()
    text = checkpoint_text(folder)
    with tqdm(total=num_tokens, unit="token") as bar:
        for one in documents(corpus_files(texts)):
            ids = text.document(one)[: min(config.model.max_positions, num_tokens - bar.n)]
            if ids:
                _guess(model, torch.tensor(ids), candidates, counts)
                bar.update(len(ids))
            if bar.n == num_tokens:
                break
        if bar.n < num_tokens:
            raise ConfigError(f"tokens: the texts have {bar.n}, fewer than {num_tokens}")
    found = list(counts.recalls(memory.num_heads * memory.top_k, memory.num_heads))
    for recall in found:
        print(
            f"layer {recall.layer:>3}  guessed {recall.distance:>2} layers early"
            f"  {recall.candidates:>4} candidates  recall {recall.recall:.3f}"
            f"  precision {recall.precision:.3f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(recall) for recall in found], indent=1) + "\n")
    return found


class _Counts:
    """Guessed rows that were read, by layer, distance and candidates; and tokens."""

    def __init__(self) -> None:
        self._right: dict[tuple[int, int, int], int] = {}
        self._tokens: dict[tuple[int, int, int], int] = {}

    def add(self, key: tuple[int, int, int], read_THK: Tensor, guessed_THC: Tensor) -> None:
        """Count tokens, whose rows are matched within their own and over all heads."""
        read_TK, guessed_TC = read_THK.flatten(1), guessed_THC.flatten(1)
        is_read = (read_TK[:, :, None] == guessed_TC[:, None]).any(-1)
        self._right[key] = self._right.get(key, 0) + int(is_read.sum())
        self._tokens[key] = self._tokens.get(key, 0) + len(read_TK)

    def recalls(self, num_read: int, num_heads: int) -> Iterator[Recall]:
        """Of everything counted, of tokens that read so many rows each."""
        for key in sorted(self._right):
            right = self._right[key] / self._tokens[key]
            yield Recall(*key, right / num_read, right / (key[2] * num_heads))


@torch.inference_mode()
def _guess(model: Transformer, ids_T: Tensor, candidates: Sequence[int], counts: _Counts) -> None:
    residuals: list[Tensor] = []

    def keep(layer: int, residual_TD: Tensor) -> None:
        residuals.append(residual_TD)

    layout = TokenLayout(torch.arange(len(ids_T)), (0, len(ids_T)))
    last = torch.tensor([len(ids_T) - 1])
    read = model(ids_T, layout, last, with_trace=True, before_layer=keep).memory
    for memory in predicted_memories(model.layers):
        rows_THK = read[memory.index].rows_THK
        for distance in range(1, memory.index + 2):
            for number in candidates:
                guessed = memory.rows(residuals[memory.index + 1 - distance], number)
                counts.add((memory.index, distance, number), rows_THK, guessed)
