"""How much memory this process can still take: what the machine has, and what its cgroup allows."""

from dataclasses import dataclass
from pathlib import Path

from weights.cgroups import CGROUPS, PROC, cgroup_folders

_KIB = 1024


@dataclass(frozen=True)
class AvailableMemory:
    """Bytes that can be had without swapping, and what bounds them, for a reader."""

    num_bytes: int
    bound: str


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> AvailableMemory:
    """The least of MemAvailable and of what each cgroup of this process has left.

    Beyond ``memory.high`` a cgroup is slowed down until it stands still, so that is a limit too.
    Pages of files, which a cgroup counts as its own, can be given up and are not in the way.
    Works with cgroups of both versions, seen from the machine or from inside a container; one that
    cannot be read bounds nothing.

    Raises:
        OSError: the kernel's meminfo cannot be read.
        ValueError: it tells no MemAvailable, or a cgroup's file is not as kernels write it.
    """
    found = AvailableMemory(_mem_available(proc / "meminfo"), "MemAvailable")
    for folder in cgroup_folders("memory", proc, cgroups):
        left = _left(folder)
        if left is not None and left < found.num_bytes:
            found = AvailableMemory(left, f"the limit of cgroup {folder}")
    return found


def _mem_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * _KIB
    raise ValueError(f"{meminfo}: has no MemAvailable")


def _left(folder: Path) -> int | None:
    """What a cgroup has left of its limit; None where there is none."""
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
        # version 1 counts those of cgroups below under other names
        files = sum(
            int(numbers.get(f"total_{name}", numbers.get(name, 0)))
            for name in ("active_file", "inactive_file")
        )
        return max(0, min(limits) - usage + files)
    return None


def _high(folder: Path) -> str:
    """Where version 2 begins to slow a cgroup down; as no limit where it has no such file."""
    try:
        return (folder / "memory.high").read_text().strip()
    except OSError:
        return "max"
