"""``memplus bench trace``: records the rows that a model's memory layers read, for replay."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.row_trace import AccessTrace
from engine.errors import ConfigError
from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import CPU, load_model
from weights.training.corpus import corpus_files, documents
from weights.training.row_reads import ReadCounter, write_row_reads
from weights.training.training_data import TextTokens, checkpoint_text


def record(
    folder: Path,
    texts: Sequence[str],
    num_tokens: int,
    num_traced: int,
    device: torch.device = CPU,
    *,
    keep_record: bool = False,
) -> AccessTrace:
    """Run a model over texts on a device and record the rows that its memory layers read.

    ``keep_record`` writes the counts of reads into the model's folder too, for ``memplus learn``.

    Raises:
        ConfigError: the model has no memory layers, a number is below 1, or the texts have fewer
            than ``num_tokens``.
        CheckpointError, DataError: model or texts cannot be read.
    """
    for name, number in (("tokens", num_tokens), ("traced", num_traced)):
        if number < 1:
            raise ConfigError(f"{name}: must be at least 1, not {number}")
    model, config = load_model(folder, device=device)
    memory = config.model.memory
    if memory is None:
        raise ConfigError(f"model: {folder} has no memory layers")
    counts_MR = np.zeros((len(config.model.memory_layers), memory.num_rows), dtype=np.int64)
    traced: list[NDArray[np.int64]] = []
    done = 0
    files = documents(corpus_files(texts))
    counter = ReadCounter(config.model) if keep_record else None
    with tqdm(total=num_tokens, unit="token") as bar:
        for rows_TMHK in _reads(model, checkpoint_text(folder), files, num_tokens, counter):
            if done < num_traced:
                traced.append(rows_TMHK[: num_traced - done])
            for counts_R, rows_THK in zip(counts_MR, rows_TMHK.swapaxes(0, 1), strict=True):
                counts_R += np.bincount(rows_THK.reshape(-1), minlength=memory.num_rows)
            done += len(rows_TMHK)
            bar.update(len(rows_TMHK))
            if done == num_tokens:
                if counter is not None:
                    write_row_reads(folder, counter.reads)
                return AccessTrace(np.concatenate(traced), counts_MR, num_tokens)
    raise ConfigError(f"tokens: the texts have {done}, fewer than {num_tokens}")


@torch.no_grad()
def _reads(
    model: Transformer,
    text: TextTokens,
    texts: Iterator[str],
    num_tokens: int,
    counter: ReadCounter | None,
) -> Iterator[NDArray[np.int64]]:
    """Yields the rows ``[T, M, H, K]`` that each document reads, up to ``num_tokens`` tokens.

    ``counter`` counts them.
    """
    device = model.model.embed_tokens.weight.device
    for one in texts:
        most = min(num_tokens, model.config.max_positions)
        ids_T = torch.tensor(text.document(one)[:most], device=device)
        num_tokens -= len(ids_T)
        positions_T = torch.arange(len(ids_T), device=device)
        layout = TokenLayout(positions_T, (0, len(ids_T)))
        out = model(ids_T, layout, positions_T[-1:], with_trace=True)
        if counter is not None:
            counter.add(out.memory, layout.query_starts)
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
