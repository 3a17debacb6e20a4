"""An access trace: the rows that memory layers read for each token, in a file for replay."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weights.errors import DataError


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


def shaped_trace(file: Path, shape: tuple[int, int, int]) -> AccessTrace:
    """Load a trace of a model with these numbers of memory layers, heads and rows per head.

    Raises:
        DataError: it is not a trace, or one of another shape, or of fewer than 2 tokens.
    """
    trace = AccessTrace.load(file)
    found = trace.rows_TMHK.shape[1:]
    if found != shape:
        raise DataError(
            f"{file}: has {found} memory layers, heads and rows per head, not {shape}; record the"
            " reads of this model: `memplus bench trace TEXTS --model DIR --out FILE.npz`"
        )
    if len(trace.rows_TMHK) < 2:
        raise DataError(f"{file}: has fewer than 2 tokens")
    num_rows = trace.counts_MR.shape[1]
    if not 0 <= trace.rows_TMHK.min() <= trace.rows_TMHK.max() < num_rows:
        raise DataError(f"{file}: reads rows outside its {num_rows} rows")
    return trace


def checked_trace(file: Path, shape: tuple[int, int, int]) -> AccessTrace:
    """Load a trace for tables of 2^n rows, as ``shaped_trace``; DataError if its own is another."""
    trace = shaped_trace(file, shape)
    num_rows = trace.counts_MR.shape[1]
    if num_rows & (num_rows - 1):
        raise DataError(f"{file}: {num_rows} rows are not a power of two")
    return trace
