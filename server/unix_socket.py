"""A listening unix socket whose file is removed at the end."""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ConfigError

_BACKLOG = 2048


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on ``path`` while the ``with`` block runs; the umask sets who may connect.

    A socket file that a killed server left is replaced.

    Raises:
        ConfigError: the path cannot be used, or another process listens on it.
    """
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ConfigError(f"uds: {path}: {error.strerror or error}") from None
        ours = path.stat()
        try:
            listener.listen(_BACKLOG)
            yield listener
        finally:
            # another server may have replaced the file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), ours):
                    path.unlink()


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"uds: {path}: exists and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink()
    except OSError as error:
        raise ConfigError(f"uds: {path}: {error.strerror or error}") from None
    else:
        raise ConfigError(f"uds: {path}: another process listens on it")
