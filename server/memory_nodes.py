"""Machines with several NUMA nodes: the engine's memory alternates between those of its threads."""

import ctypes
import errno
import logging
import os
import platform
from collections.abc import Collection, Sequence
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
# (get_mempolicy, set_mempolicy), which the C library does not wrap
_CALLS = {"x86_64": (239, 238), "aarch64": (236, 237)}
# from linux/mempolicy.h
_DEFAULT, _INTERLEAVE = 0, 3
_MOST_NODES = 1024

logger = logging.getLogger(__name__)


def spread_over_nodes(affinity: Collection[int], folder: Path = _NODES) -> list[int]:
    """Place new pages of this thread, and of threads that it starts, on the nodes in turn.

    By default the kernel takes a page from the node of the thread that first writes it. One thread
    loads the weights, but all nodes' threads read them: they would share one node's bandwidth.
    A policy that was chosen before (``numactl``) stays, and so do pages that exist.

    Args:
        affinity: ids of the CPUs that this process may use.
        folder: the kernel's folder of nodes; tests substitute a fake.

    Returns:
        The nodes, or [] if the policy stays as it was.
    """
    nodes = nodes_of(affinity, folder)
    if len(nodes) < 2 or platform.machine() not in _CALLS:
        return []
    try:
        if _policy() != _DEFAULT:
            return []
        interleave(nodes)
    except OSError as error:
        names = ", ".join(map(str, nodes))
        logger.warning("memory stays on one of the NUMA nodes %s: %s", names, error.strerror)
        return []
    logger.info("memory alternates between the NUMA nodes %s", ", ".join(map(str, nodes)))
    return nodes


def nodes_of(affinity: Collection[int], folder: Path = _NODES) -> list[int]:
    """The nodes of these CPUs, ascending; none if the kernel lists no nodes."""
    found = []
    for path in folder.glob("node[0-9]*"):
        try:
            cpus = _numbers((path / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if not cpus.isdisjoint(affinity):
            found.append(int(path.name.removeprefix("node")))
    return sorted(found)


def interleave(nodes: Sequence[int]) -> None:
    """Let new pages alternate between ``nodes``.

    Raises:
        OSError: the kernel refuses, as Docker's default seccomp profile does.
    """
    words = (ctypes.c_uint64 * (_MOST_NODES // 64))()
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    # the kernel reads one bit less than this number
    _call(1, _INTERLEAVE, words, ctypes.c_ulong(_MOST_NODES + 1))


def _policy() -> int:
    """The policy of this thread; raises as ``interleave``."""
    policy = ctypes.c_int()
    _call(0, ctypes.byref(policy), None, ctypes.c_ulong(0), None, ctypes.c_ulong(0))
    return policy.value


def _call(which: int, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_CALLS[platform.machine()][which])
    if library.syscall(number, *arguments):
        code = ctypes.get_errno() or errno.ENOSYS
        raise OSError(code, os.strerror(code))


def _numbers(text: str) -> set[int]:
    """The numbers of a list like 0-3,8."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
