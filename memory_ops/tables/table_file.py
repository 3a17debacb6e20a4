"""The open file of a disk table: opens it for direct reads and detects changed contents."""

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
    """A file, opened for random reads, whose bytes from ``offset`` on are a table's rows.

    If the contents change, the table is lost for good, because cached rows no longer match the
    file. If only the size or modification time changes, ``check`` compares the contents once. With
    a checksum it compares all rows. Without one it compares 256 evenly spaced pieces of 16 KiB
    (tables up to 4 MiB in full) with their digest from when the file was opened. That detects a
    table that was rewritten or trained further, but may miss a change of a few rows.

    Attributes:
        file: the path that was opened.
        descriptor: file descriptor; reads bypass the page cache if the filesystem allows it.
        alignment: offsets and sizes of reads must be multiples of it; 1 for buffered reads.
        fault: the reason why no row can be read now; None if rows can be read.
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
            file: path of the file that holds the rows.
            offset: bytes before the first row.
            num_bytes: bytes of all rows.
            is_direct: bypass the page cache (O_DIRECT) if the filesystem allows it.
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
        """Return if the contents have not changed; a comparison calls ``on_progress``.

        Raises:
            TableReadError: the contents changed or cannot be read; ``fault`` holds the message.
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
            return f"{self.file}: the file changed after it was opened: reload the table"
        logger.warning(
            "%s: size or modification time changed, but %s did not: the table stays in use",
            self.file,
            "a sample of its rows" if self._is_sampled else "its rows",
        )
        # the state before the comparison, so that changes during it are compared again
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
        """Bytes of the file as a part of ``memory``; fewer than ``num_bytes`` at its end."""
        before, done = begin % self.alignment, 0
        size = -(-(before + num_bytes) // self.alignment) * self.alignment
        while done < size:
            count = os.preadv(self.descriptor, [memory[done:size]], begin - before + done)
            done += count
            if not count or count % self.alignment:  # the end
                break
        return memory[before : min(done, before + num_bytes)]


def _open(file: Path, is_direct: bool) -> tuple[int, int]:
    """A descriptor and the alignment of its reads, in bytes."""
    try:
        if is_direct and (opened := _open_direct(file)) is not None:
            return opened
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise TableReadError(f"{file}: {error.strerror}") from None
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, 1


def _open_direct(file: Path) -> tuple[int, int] | None:
    """Like ``_open``, with O_DIRECT; None, with a warning, if the filesystem does not allow it."""
    descriptor, reason = -1, ""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        for alignment in _ALIGNMENTS:
            try:
                os.preadv(descriptor, [_aligned_memory(alignment, alignment)], 0)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                reason = f"{error.strerror}, for all sizes up to {alignment} bytes"
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
    logger.warning("%s: direct reads fail (%s): reads use the page cache instead", file, reason)
    return None


def _aligned_memory(num_bytes: int, alignment: int) -> memoryview:
    memory = anonymous_zeros((num_bytes + alignment,), torch.uint8)
    skipped = -memory.data_ptr() % alignment
    return memory[skipped : skipped + num_bytes].numpy().data
