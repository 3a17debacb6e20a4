"""``memplus bench trace``: which rows a model's memory layers read, as a file to be played back."""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import load_model
from weights.errors import DataError
from weights.training.corpus import corpus_files, documents
from weights.training.training_data import TextTokens, checkpoint_text


@dataclass(frozen=True)
class AccessTrace:
    """Reads of the tokens of some texts, in their order.

    Attributes:
        rows_TMHK: int64, of T tokens in M memory layers: H heads of K rows.
        counts_MR: int64, how often each layer read each row, for all ``num_tokens``.
        num_tokens: of all texts, of which the first T have their rows told.
    """

    rows_TMHK: NDArray[np.int64]
    counts_MR: NDArray[np.int64]
    num_tokens: int

    def save(self, file: Path) -> None:
        """Write it, compressed; see ``load``."""
        counts = self.counts_MR.astype(np.uint32)
        with open(file, "wb") as out:
            np.savez_compressed(
                out,
                rows=self.rows_TMHK.astype(np.uint32),
                counts=counts,
                num_tokens=np.array(self.num_tokens),
            )

    @classmethod
    def load(cls, file: Path) -> "AccessTrace":
        """Read what ``save`` has written.

        Raises:
            DataError: the file is something else.
        """
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return cls(
                    arrays["rows"].astype(np.int64),
                    arrays["counts"].astype(np.int64),
                    int(arrays["num_tokens"]),
                )
        except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: no access trace ({error})") from None


def checked_trace(file: Path, shape: tuple[int, int, int]) -> AccessTrace:
    """A trace of so many layers, heads and rows a head (DataError if it is another)."""
    trace = AccessTrace.load(file)
    found = trace.rows_TMHK.shape[1:]
    if found != shape or len(trace.rows_TMHK) < 2:
        raise DataError(f"{file}: has reads of {found} layers, heads and rows, not {shape}")
    num_rows = trace.counts_MR.shape[1]
    is_whole = 0 <= trace.rows_TMHK.min() <= trace.rows_TMHK.max() < num_rows
    if num_rows & (num_rows - 1) or not is_whole:
        raise DataError(f"{file}: of {num_rows} rows, no power of two, or fewer than are read")
    return trace


def record(folder: Path, texts: Sequence[str], num_tokens: int, num_traced: int) -> AccessTrace:
    """Run a model over texts and keep what its memories read.

    Raises:
        ConfigError: the model has no memory layers, or the texts fewer tokens.
        CheckpointError, DataError: it, or they, cannot be read.
    """
    model, config = load_model(folder)
    memory = config.model.memory
    if memory is None:
        raise ConfigError(f"model: {folder} has no memory layers")
    counts_MR = np.zeros((len(config.model.memory_layers), memory.num_rows), dtype=np.int64)
    traced: list[NDArray[np.int64]] = []
    done = 0
    files = documents(corpus_files(texts))
    with tqdm(total=num_tokens, unit="token") as bar:
        for rows_TMHK in _reads(model, checkpoint_text(folder), files):
            rows_TMHK = rows_TMHK[: num_tokens - done]
            if done < num_traced:
                traced.append(rows_TMHK[: num_traced - done])
            for counts_R, rows_THK in zip(counts_MR, rows_TMHK.swapaxes(0, 1), strict=True):
                counts_R += np.bincount(rows_THK.reshape(-1), minlength=memory.num_rows)
            done += len(rows_TMHK)
            bar.update(len(rows_TMHK))
            if done == num_tokens:
                return AccessTrace(np.concatenate(traced), counts_MR, num_tokens)
    raise ConfigError(f"tokens: the texts have {done}, fewer than {num_tokens}")


@torch.no_grad()
def _reads(
    model: Transformer, text: TextTokens, texts: Iterator[str]
) -> Iterator[NDArray[np.int64]]:
    """The rows of each document's tokens."""
    for one in texts:
        ids_T = torch.tensor(text.document(one)[: model.config.max_positions])
        layout = TokenLayout(torch.arange(len(ids_T)), (0, len(ids_T)))
        out = model(ids_T, layout, torch.tensor([len(ids_T) - 1]), with_trace=True)
        yield torch.stack([trace.rows_THK for trace in out.memory.values()], dim=1).numpy()


def summarize(trace: AccessTrace) -> str:
    """How uneven the reads are, for a reader."""
    lines = []
    for layer, counts_R in enumerate(trace.counts_MR):
        shares = np.sort(counts_R)[::-1].cumsum() / counts_R.sum()
        hot = [float(shares[max(0, len(shares) // part - 1)]) for part in (1000, 100, 10)]
        read = np.count_nonzero(counts_R) / len(counts_R)
        lines.append(
            f"memory {layer}: {read:.1%} of the rows read; the hottest 0.1 / 1 / 10 % of all take"
            f" {hot[0]:.1%} / {hot[1]:.1%} / {hot[2]:.1%} of the reads"
        )
    return "\n".join(lines)
