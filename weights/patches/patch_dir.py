"""Finds a patch folder by its name in the folder of all patches; imports no torch."""

import os
import stat
from pathlib import Path

from weights.errors import PatchError, PatchNotFoundError


def folder_in(patch_dir: Path, name: str) -> Path:
    """The absolute path of a folder in ``patch_dir``; only ``patch_dir`` may be a symbolic link.

    Readers must open it without following a symbolic link, because it may be replaced by one.

    Raises:
        PatchNotFoundError: there is no such folder.
        PatchError: it is a symbolic link or a file, or ``name`` is not the name of a folder.
    """
    if name in ("", os.curdir, os.pardir) or os.sep in name or "\0" in name:
        raise PatchError(f"{name[:80]!r} is not the name of a patch folder")
    folder = patch_dir.resolve() / name
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        raise PatchNotFoundError(f"{name}: the folder of patches has no such folder") from None
    except OSError as error:
        raise PatchError(f"{name}: {error.strerror}") from None
    if stat.S_ISLNK(mode):
        raise PatchError(f"{name}: is a symbolic link; the folder of patches must hold the folder")
    if not stat.S_ISDIR(mode):
        raise PatchError(f"{name}: is not a folder")
    return folder
