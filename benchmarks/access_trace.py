"""``memplus bench trace``: records the rows that a model's memory layers read, for replay."""

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
from weights.checkpoints.checkpoint import CPU, load_model
from weights.errors import DataError
from weights.training.corpus import corpus_files, documents
from weights.training.training_data import TextTokens, checkpoint_text


@dataclass(frozen=True)
class AccessTrace:
    """Row reads of a model on some texts, in token order.

    Attributes:
        rows_TMHK: int64 row ids of T tokens, M memory layers, H heads, K rows per head.
        counts_MR: int64 reads of each row by each layer, over all ``num_tokens``.
        num_tokens: counted tokens; ``rows_TMHK`` has the first T of them.
    """

    rows_TMHK: NDArray[np.int64]
    counts_MR: NDArray[np.int64]
    num_tokens: int

    def save(self, file: Path) -> None:
        """Write a compressed file for ``load``."""
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
        """Read a file that ``save`` has written.

        Raises:
            DataError: the file is not an access trace.
        """
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return cls(
                    arrays["rows"].astype(np.int64),
                    arrays["counts"].astype(np.int64),
                    int(arrays["num_tokens"]),
                )
        except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: not an access trace ({error})") from None


def checked_trace(file: Path, shape: tuple[int, int, int]) -> AccessTrace:
    """Load a trace; DataError if its layers, heads and rows per head are not ``shape``."""
    trace = AccessTrace.load(file)
    found = trace.rows_TMHK.shape[1:]
    if found != shape or len(trace.rows_TMHK) < 2:
        raise DataError(f"{file}: has {found} layers, heads and rows per head, not {shape}")
    num_rows = trace.counts_MR.shape[1]
    is_whole = 0 <= trace.rows_TMHK.min() <= trace.rows_TMHK.max() < num_rows
    if num_rows & (num_rows - 1) or not is_whole:
        raise DataError(f"{file}: {num_rows} rows are not a power of two, or fewer than are read")
    return trace


def record(
    folder: Path,
    texts: Sequence[str],
    num_tokens: int,
    num_traced: int,
    device: torch.device = CPU,
) -> AccessTrace:
    """Run a model over texts on a device and record the rows that its memory layers read.

    Raises:
        ConfigError: the model has no memory layers, or the texts have fewer than ``num_tokens``.
        CheckpointError, DataError: model or texts cannot be read.
    """
    model, config = load_model(folder, device=device)
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
    """Yields the rows ``[T, M, H, K]`` that each document's tokens read."""
    device = model.model.embed_tokens.weight.device
    for one in texts:
        ids_T = torch.tensor(text.document(one)[: model.config.max_positions], device=device)
        positions_T = torch.arange(len(ids_T), device=device)
        layout = TokenLayout(positions_T, (0, len(ids_T)))
        out = model(ids_T, layout, positions_T[-1:], with_trace=True)
        yield torch.stack([trace.rows_THK for trace in out.memory.values()], dim=1).cpu().numpy()


def summarize(trace: AccessTrace) -> str:
    """Describe the skew of the reads, one line per memory layer."""
    lines = []
    for layer, counts_R in enumerate(trace.counts_MR):
        shares = np.sort(counts_R)[::-1].cumsum() / counts_R.sum()
        hot = [float(shares[max(0, len(shares) // part - 1)]) for part in (1000, 100, 10)]
        read = np.count_nonzero(counts_R) / len(counts_R)
        lines.append(
            f"memory {layer}: {read:.1%} of the rows read; the most-read 0.1 / 1 / 10 % of all get"
            f" {hot[0]:.1%} / {hot[1]:.1%} / {hot[2]:.1%} of the reads"
        )
    return "\n".join(lines)
