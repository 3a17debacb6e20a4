"""The control groups of this process, as folders that hold their limits."""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def cgroup_folders(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Folders of this process's cgroups and of all their ancestors, if visible, innermost first.

    Works for cgroups of both versions, seen from the machine or from inside a container. The
    folders need not exist. A process without a readable cgroup file has none.
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
        # a container sees its own cgroup as the root, whatever its path is outside
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents):
            yield root / part
