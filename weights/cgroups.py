"""Finds the folders of this process's control groups, which hold their limits."""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def cgroup_folders(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Folders of this process's cgroups and of all their ancestors, if visible, innermost first.

    Supports both cgroup versions, on the host and inside a container. The folders may not exist.
    Yields nothing if the process has no readable cgroup file.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        # in a container the cgroup's own folder is the root, whatever its path on the host
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            yield root / part
