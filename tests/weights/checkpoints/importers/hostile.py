"""An object whose pickle opens a file for writing, when Python's own unpickler reads it."""

from pathlib import Path


class Hostile:
    """Creates ``path`` if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")
