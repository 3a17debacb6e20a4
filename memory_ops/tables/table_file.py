"""The open file of a table: direct or buffered reads, and a check that it did not change."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from memory_ops.anonymous import anonymous_zeros
from memory_ops.tables.value_table import TableReadError

_ALIGNMENTS = tuple(512 << n for n in range(8))  # up to 64 KiB
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_PART_BYTES = 4 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 16 * 2**10

logger = logging.getLogger(__name__)


class TableFile:
    """A file whose bytes from ``offset`` on are a table's rows, opened for random reads.

    The table is lost if its contents change, and stays lost: cached rows and rows in the file no
    longer belong together. A changed size or modification time alone is no proof. It makes
    ``check`` compare the contents once: all of them with their checksum, if there is one. Without
    a checksum it compares 256 evenly spaced pieces of 16 KiB (a table of up to 4 MiB whole) with
    their digest from when the file was opened. That finds a table that was rewritten or trained
    further, but may miss a change of a few rows.

    Attributes:
        file: its path when it was opened.
        descriptor: reads it, past the page cache if the filesystem allows that.
        alignment: offsets and sizes of reads are multiples of it; 1 for buffered reads.
        fault: why no row can be read now; None while all is well.
    """

    def __init__(
        self,
        file: Path,
        offset: int,
        num_bytes: int,
        *,
        is_direct: bool = True,
        checksum: str | None = None,
    ) -> None:
        """Open the file; without a ``checksum``, read up to 4 MiB of it.

        Args:
            file: holds the rows.
            offset: of the first row, in bytes.
            num_bytes: of all rows.
            is_direct: read past the page cache, if the filesystem allows that.
            checksum: SHA-256 of all rows, in hexadecimal digits.

        Raises:
            TableReadError: the file cannot be opened or read, or is too short.
        """
        self.file = file
        self.fault: str | None = None
        self._offset, self._num_bytes, self._is_changed = offset, num_bytes, False
        self.descriptor, self.alignment = _open(file, is_direct)
        try:
            self._state = self._current_state()
            if offset + num_bytes > self._state[0]:
                raise TableReadError(f"{file}: ends before the last row")
            self._is_sampled = checksum is None
            self._digest = checksum or self._contents_digest(lambda: None)
        except OSError as error:
            self.close()
            raise TableReadError(f"{file}: {error.strerror}") from None
        except TableReadError:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. Calling it again does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def check(self, on_progress: Callable[[], None]) -> None:
        """Return if the contents are the same as before; a comparison calls ``on_progress``.

        Raises:
            TableReadError: they have changed, or cannot be compared now; ``fault`` says the same.
        """
        if not self._is_changed:
            self.fault = self._find_fault(on_progress)
        if self.fault is not None:
            raise TableReadError(self.fault)

    def _find_fault(self, on_progress: Callable[[], None]) -> str | None:
        try:
            state = self._current_state()
            if state == self._state:
                return None
            self._is_changed = not self._has_same_contents(on_progress)
        except OSError as error:
            return f"{self.file}: {error.strerror}"
        if self._is_changed:
            return f"{self.file}: was changed since it was opened"
        logger.warning(
            "%s: its size or modification time changed, %s did not: the table stays in use",
            self.file,
            "the sample of its rows" if self._is_sampled else "its rows",
        )
        # of before the comparison: whatever changed during it is compared again
        self._state = state
        return None

    def _current_state(self) -> tuple[int, int]:
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns

    def _has_same_contents(self, on_progress: Callable[[], None]) -> bool:
        return self._contents_digest(on_progress) == self._digest

    def _contents_digest(self, on_progress: Callable[[], None]) -> str:
        size = _SAMPLE_BYTES if self._is_sampled else _PART_BYTES
        starts: Sequence[int] = range(0, self._num_bytes, size)
        if self._is_sampled and len(starts) > _SAMPLES:
            last = self._num_bytes - size
            starts = [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)]
        memory = _aligned_memory(size + 2 * self.alignment, self.alignment)
        digest = hashlib.sha256()
        for start in starts:
            begin = self._offset + start
            digest.update(self._read(memory, begin, min(size, self._num_bytes - start)))
            on_progress()
        return digest.hexdigest()

    def _read(self, memory: memoryview, begin: int, num_bytes: int) -> memoryview:
        """Bytes of the file, fewer than ``num_bytes`` where it ends; they lie in ``memory``."""
        before, done = begin % self.alignment, 0
        size = -(-(before + num_bytes) // self.alignment) * self.alignment
        while done < size:
            count = os.preadv(self.descriptor, [memory[done:size]], begin - before + done)
            done += count
            if not count or count % self.alignment:  # the end
                break
        return memory[before : min(done, before + num_bytes)]


def _open(file: Path, is_direct: bool) -> tuple[int, int]:
    """A descriptor, and what offsets and sizes of its reads must be multiples of."""
    try:
        if is_direct and (opened := _open_direct(file)) is not None:
            return opened
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise TableReadError(f"{file}: {error.strerror}") from None
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, 1


def _open_direct(file: Path) -> tuple[int, int] | None:
    """As ``_open`` with O_DIRECT; None if the filesystem has no such reads, which is logged."""
    descriptor, reason = -1, ""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        for alignment in _ALIGNMENTS:
            try:
                os.preadv(descriptor, [_aligned_memory(alignment, alignment)], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                reason = f"{error.strerror}, for any size up to {alignment} bytes"
                continue
            return descriptor, alignment
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        reason = str(error.strerror)
    if descriptor >= 0:
        os.close(descriptor)
    logger.warning("%s: direct reads fail (%s): it is read through the page cache", file, reason)
    return None


def _aligned_memory(num_bytes: int, alignment: int) -> memoryview:
    memory = anonymous_zeros((num_bytes + alignment,), torch.uint8)
    skipped = -memory.data_ptr() % alignment
    return memory[skipped : skipped + num_bytes].numpy().data
