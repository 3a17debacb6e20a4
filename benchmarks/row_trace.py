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
