"""The number of compute threads: the cores that CPU affinity and cgroup quotas allow."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from weights.cgroups import CGROUPS, PROC, cgroup_folders

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class ThreadCount:
    """A number of threads, and the reason for it in words for the log."""

    count: int
    reason: str


def default_threads(
    affinity: Collection[int],
    proc: Path = PROC,
    cgroups: Path = CGROUPS,
    cpus: Path = _CPUS,
) -> ThreadCount:
    """One thread for each core in the affinity mask, but no more than the CPU quota sustains.

    A quota of 2.5 CPUs allows 2 threads, because a third thread would be throttled in each period
    and the others would wait for it. A quota under 1 allows 1 thread. Threads of one core count
    once, because they share its vector units. A cgroup file that cannot be parsed sets no limit.

    Args:
        affinity: ids of the CPUs that this process may use.
        proc, cgroups, cpus: folders of the kernel; tests substitute fakes.
    """
    cores = len({_siblings(cpus / f"cpu{cpu}", cpu) for cpu in affinity})
    quotas = [_quota(folder) for folder in cgroup_folders("cpu", proc, cgroups)]
    quota = min((one for one in quotas if one is not None), default=math.inf)
    if quota < cores:
        reason = f"cgroup quota {quota:.1f} CPUs, {len(affinity)} in the affinity mask"
        return ThreadCount(max(1, math.floor(quota)), reason)
    on_cores = f" on {cores} cores" if cores < len(affinity) else ""
    return ThreadCount(cores, f"CPUs in the affinity mask: {len(affinity)}{on_cores}")


def _siblings(folder: Path, cpu: int) -> str:
    """The CPUs that share a core with this one, as the kernel lists them; itself if unknown."""
    try:
        return (folder / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota(folder: Path) -> float | None:
    """CPUs that a cgroup may use on average; None without a limit or a readable file."""
    try:
        quota, _, period = (folder / "cpu.max").read_text().strip().partition(" ")
    except OSError:
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
