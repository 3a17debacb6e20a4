"""``memplus bench lookahead``: recall and precision of row prediction, by distance and width."""

import json
import math
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
from weights.checkpoints.checkpoint import CPU, load_model
from weights.training.corpus import corpus_files, documents
from weights.training.training_data import checkpoint_text


@dataclass(frozen=True)
class Recall:
    """Quality of the row prediction of one memory layer.

    Attributes:
        layer: index of the memory layer.
        distance: layers between prediction and lookup, the memory layer included.
        candidates: predicted rows per head.
        recall: share of the rows read that were predicted.
        precision: share of the predicted rows that were read.
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
    device: torch.device = CPU,
) -> list[Recall]:
    """Run a model on a device; print a line per memory layer, distance and width.

    ``widths`` are the predicted rows per head, as multiples of K.

    Raises:
        ConfigError: the model has no memory layers, a number is out of range, or the texts have
            fewer than ``num_tokens`` tokens.
        CheckpointError, DataError: model or texts cannot be read.
    """
    if num_tokens < 1:
        raise ConfigError(f"tokens: must be at least 1, not {num_tokens}")
    for width in widths:
        if not 0 < width < math.inf:
            raise ConfigError(f"widths: must be above 0 and finite, not {width}")
    model, config = load_model(folder, device=device)
    memory = config.model.memory
    if memory is None:
        raise ConfigError(f"model: {folder} has no memory layers")
    most = memory.num_subkeys
    candidates = sorted({max(1, round(min(memory.top_k * width, most))) for width in widths})
    counts = _Counts()
    text = checkpoint_text(folder)
    with tqdm(total=num_tokens, unit="token") as bar:
        for one in documents(corpus_files(texts)):
            ids = text.document(one)[: min(config.model.max_positions, num_tokens - bar.n)]
            if ids:
                _count_predictions(model, torch.tensor(ids, device=device), candidates, counts)
                bar.update(len(ids))
            if bar.n == num_tokens:
                break
        if bar.n < num_tokens:
            raise ConfigError(f"tokens: the texts have {bar.n}, fewer than {num_tokens}")
    recalls = list(counts.recalls(memory.num_heads * memory.top_k, memory.num_heads))
    for recall in recalls:
        print(
            f"layer {recall.layer:>3}  predicted {recall.distance:>2} layers ahead"
            f"  {recall.candidates:>4} candidates  recall {recall.recall:.3f}"
            f"  precision {recall.precision:.3f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(recall) for recall in recalls], indent=1) + "\n")
    return recalls


class _Counts:
    """Correctly predicted rows and tokens, by layer, distance and candidates."""

    def __init__(self) -> None:
        self._correct: dict[tuple[int, int, int], int] = {}
        self._tokens: dict[tuple[int, int, int], int] = {}

    def add(self, key: tuple[int, int, int], read_THK: Tensor, predicted_THC: Tensor) -> None:
        """Count correct predictions; rows match across the heads of a token."""
        read_TK, predicted_TC = read_THK.flatten(1), predicted_THC.flatten(1)
        is_read = (read_TK[:, :, None] == predicted_TC[:, None]).any(-1)
        self._correct[key] = self._correct.get(key, 0) + int(is_read.sum())
        self._tokens[key] = self._tokens.get(key, 0) + len(read_TK)

    def recalls(self, num_read: int, num_heads: int) -> Iterator[Recall]:
        """Recall and precision of all counts; each token reads ``num_read`` rows."""
        for key in sorted(self._correct):
            correct = self._correct[key] / self._tokens[key]
            yield Recall(*key, correct / num_read, correct / (key[2] * num_heads))


@torch.inference_mode()
def _count_predictions(
    model: Transformer, ids_T: Tensor, candidates: Sequence[int], counts: _Counts
) -> None:
    residuals: list[Tensor] = []

    def save_residual(layer: int, residual_TD: Tensor) -> None:
        residuals.append(residual_TD)

    positions_T = torch.arange(len(ids_T), device=ids_T.device)
    layout, last = TokenLayout(positions_T, (0, len(ids_T))), positions_T[-1:]
    read = model(ids_T, layout, last, with_trace=True, before_layer=save_residual).memory
    for memory in predicted_memories(model.layers):
        rows_THK = read[memory.index].rows_THK
        for distance in range(1, memory.index + 2):
            for number in candidates:
                predicted = memory.rows(residuals[memory.index + 1 - distance], number)
                counts.add((memory.index, distance, number), rows_THK, predicted)
