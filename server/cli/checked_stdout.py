"""Stdout whose failures have a type of their own, apart from those of other files and sockets."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast


class StdoutError(OSError):
    """Stdout cannot be written: its reader has gone, its disk is full, or it is closed."""

    @property
    def is_closed_pipe(self) -> bool:
        """Whether the reader has gone, as after ``| head``."""
        return self.errno == errno.EPIPE


class CheckedStdout:
    """Writes to a stream, and raises StdoutError for its failures."""

    def __init__(self, stream: TextIO | None) -> None:
        """Take stdout, which is None if the shell has closed it (``>&-``)."""
        self._stream = stream
        self._failure: StdoutError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, as the stream does."""
        if self._stream is None:
            self._failure = StdoutError(errno.EBADF, os.strerror(errno.EBADF))
            raise self._failure
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        """Send what is buffered."""
        if self._stream is not None:
            with self._named():
                self._stream.flush()

    def finish(self) -> None:
        """Flush; raise an earlier failure that the writer has ignored, as argparse does."""
        self.flush()
        if self._failure is not None:
            raise self._failure

    def discard(self) -> None:
        """Drop what is buffered and what will be written: the interpreter's last flush too."""
        if self._stream is None:
            return
        with contextlib.suppress(io.UnsupportedOperation, OSError):  # a stream without a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = StdoutError(error.errno, error.strerror)
            raise self._failure from None


@contextlib.contextmanager
def checked_stdout() -> Iterator[None]:
    """Replace ``sys.stdout`` while the block runs, and flush it at the end (StdoutError).

    If it fails, ``discard`` has been called, so that nothing else fails after the block. An error
    of the block itself is raised, whatever happens to stdout.
    """
    checked = CheckedStdout(sys.stdout)
    with contextlib.redirect_stdout(cast(TextIO, checked)):
        try:
            try:
                yield
            except SystemExit:  # argparse's, after a help text
                checked.finish()
                raise
            # now, because a failure at the interpreter's end can no longer be handled
            checked.finish()
        except StdoutError:
            checked.discard()
            raise
        except BaseException:
            try:
                checked.flush()
            except StdoutError:
                checked.discard()
            raise
