"""Memory available to this process: the least of MemAvailable and its cgroup limits."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weights.cgroups import CGROUPS, PROC, cgroup_folders

logger = logging.getLogger(__name__)
_KIB = 1024


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes available without swapping, and the name of the limit that determines them."""

    num_bytes: int
    bound: str


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> AvailableMemory:
    """The least of MemAvailable and the unused limit of each cgroup of this process.

    ``memory.high`` counts as a limit, because the kernel throttles a cgroup that exceeds it. The
    page cache that a cgroup is charged for counts as available, because the kernel can drop it.
    Supports both cgroup versions, on the host and inside a container. An unreadable cgroup is
    skipped.

    Raises:
        OSError: the kernel's meminfo cannot be read.
        ValueError: meminfo has no MemAvailable, or a cgroup file is malformed.
    """
    found = AvailableMemory(_mem_available(proc / "meminfo"), "MemAvailable")
    for folder in cgroup_folders("memory", proc, cgroups):
        left = _unused_bytes(folder)
        if left is not None and left < found.num_bytes:
            found = AvailableMemory(left, f"the limit of cgroup {folder}")
    return found


def memory_if_known(read: Callable[[], AvailableMemory]) -> AvailableMemory | None:
    """The result of ``read``; if it fails, log a warning and return None."""
    try:
        return read()
    except (OSError, ValueError) as error:
        logger.warning("memory is not checked: cannot read available memory: %s", error)
        return None


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * _KIB
    raise ValueError(f"{meminfo}: has no MemAvailable")


def _unused_bytes(folder: Path) -> int | None:
    """Unused bytes of a cgroup's limit; None if it has no limit."""
    for limit_name, usage_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            stat = (folder / "memory.stat").read_text()
        except OSError:
            continue
        limits = [int(one) for one in (limit, _high(folder)) if one != "max"]
        if not limits:
            return None
        numbers = dict(line.split() for line in stat.splitlines())
        # version 1 counts descendants only under the names with total_
        files = sum(
            int(numbers.get(f"total_{name}", numbers.get(name, 0)))
            for name in ("active_file", "inactive_file")
        )
        return max(0, min(limits) - usage + files)
    return None


def _high(folder: Path) -> str:
    """The throttling limit of version 2, or "max" if the file does not exist."""
    try:
        return (folder / "memory.high").read_text().strip()
    except OSError:
        return "max"
