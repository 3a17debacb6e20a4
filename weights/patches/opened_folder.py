"""Opens the files of a patch folder, each once and without following symbolic links."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weights.errors import PatchError, PatchReadError

# an open of a FIFO must not wait for a writer
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
# errors that say nothing about the folder
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


@dataclass(frozen=True)
class OpenedFile:
    """A regular file; whatever happens to its name, the descriptor stays that of one file."""

    path: Path
    descriptor: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return os.fstat(self.descriptor).st_size

    def read_into(self, memory: memoryview, offset: int) -> int:
        """Fill ``memory`` from an offset; returns the number of bytes, fewer at the file's end.

        Raises:
            PatchReadError: the file cannot be read.
        """
        done = 0
        try:
            while done < len(memory):
                count = os.preadv(self.descriptor, [memory[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise PatchReadError(f"{self.path}: {error.strerror}") from None
        return done

    def read(self, num_bytes: int) -> bytes:
        """The first ``num_bytes`` bytes, or the whole file if it is shorter.

        Raises:
            PatchReadError: the file cannot be read.
        """
        try:
            return os.pread(self.descriptor, num_bytes, 0)
        except OSError as error:
            raise PatchReadError(f"{self.path}: {error.strerror}") from None


@contextmanager
def opened_files(folder: Path, *names: str, follow: bool = True) -> Iterator[list[OpenedFile]]:
    """Open regular files of a folder. The files must not be symbolic links.

    Without ``follow``, neither must the last component of ``folder``.

    Raises:
        PatchError: the folder or a file cannot be opened, or is not what it must be.
        PatchReadError: the machine lacks files or memory, or the disk fails.
    """
    with ExitStack() as stack:
        flags = os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        directory = _open(stack, folder, flags)
        files = []
        for name in names:
            file = OpenedFile(folder / name, _open(stack, folder / name, os.O_NOFOLLOW, directory))
            if not stat.S_ISREG(os.fstat(file.descriptor).st_mode):
                raise PatchError(f"{file.path}: is not a regular file")
            files.append(file)
        yield files


def _open(stack: ExitStack, path: Path, flags: int, directory: int | None = None) -> int:
    name = path if directory is None else path.name
    try:
        descriptor = os.open(name, _FLAGS | flags, dir_fd=directory)
    except OSError as error:
        # a folder that is a link is ENOTDIR
        if flags & os.O_NOFOLLOW and error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(path):
            raise PatchError(f"{path}: is a symbolic link, which is not followed") from None
        if error.errno == errno.ENXIO:  # a socket
            raise PatchError(f"{path}: is not a regular file") from None
        kind = PatchReadError if error.errno in _SHORTAGES else PatchError
        raise kind(f"{path}: {error.strerror}") from None
    stack.callback(os.close, descriptor)
    return descriptor


def _is_link(path: Path) -> bool:
    """Whether a path that could not be opened is a symbolic link, to say so."""
    return os.path.islink(path)
