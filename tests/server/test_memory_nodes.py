"""Memory alternates between the NUMA nodes of the CPUs; this machine may have only one."""

import errno
import platform
import subprocess
import sys

import pytest

from server import memory_nodes
from server.memory_nodes import nodes_of, spread_over_nodes

linux_only = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads the kernel's policy"
)

# runs in a new process, since a policy lasts as long as its thread
_SPREAD = """
import ctypes, os, sys
from pathlib import Path
from server import memory_nodes

def policy():
    mode, nodes = ctypes.c_int(), (ctypes.c_uint64 * 16)()
    arguments = (ctypes.byref(mode), nodes, ctypes.c_ulong(1024), None, ctypes.c_ulong(0))
    assert not ctypes.CDLL(None).syscall(ctypes.c_long(239), *arguments)
    return mode.value, nodes[0]

before = policy()
if before[0] != 0:
    sys.exit(77)  # this test itself runs under a policy
if sys.argv[1] == "twice":
    memory_nodes.interleave([0])
    print(memory_nodes.spread_over_nodes({0, 1}, Path(sys.argv[2])), policy() == (3, 1))
else:
    # node 1 may not exist: the kernel ignores it
    print(memory_nodes.spread_over_nodes({0, 1}, Path(sys.argv[2])), policy()[0])
"""


@pytest.fixture
def two_nodes(tmp_path):
    for node, cpus in enumerate(("0,4-5\n", "1-3,6\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    (tmp_path / "node2").mkdir()  # memory without CPUs
    (tmp_path / "node2" / "cpulist").write_text("\n")
    (tmp_path / "online").write_text("0-2\n")
    return tmp_path


def run(*arguments):
    command = [sys.executable, "-c", _SPREAD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("runs under a memory policy")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("affinity", "nodes"),
    [({0}, [0]), ({5, 4}, [0]), ({2, 6}, [1]), ({0, 3}, [0, 1]), ({9}, []), (set(), [])],
)
def test_the_nodes_of_the_cpus_are_found(two_nodes, affinity, nodes):
    assert nodes_of(affinity, two_nodes) == nodes


def test_a_system_without_nodes_has_none(tmp_path):
    assert nodes_of({0, 1}, tmp_path / "missing") == []
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text("nonsense\n")
    assert nodes_of({0, 1}, tmp_path) == []


@linux_only
def test_memory_alternates_between_the_nodes_of_the_cpus(two_nodes):
    assert run("once", two_nodes) == "[0, 1] 3"


@linux_only
def test_a_policy_that_was_chosen_before_stays(two_nodes):
    assert run("twice", two_nodes) == "[] True"


@linux_only
@pytest.mark.parametrize("affinity", [{0}, {1, 2}])
def test_with_cpus_of_one_node_the_policy_stays(two_nodes, monkeypatch, affinity):
    monkeypatch.setattr(memory_nodes, "interleave", lambda nodes: pytest.fail("was called"))
    assert spread_over_nodes(affinity, two_nodes) == []


@linux_only
def test_a_refusal_is_logged(two_nodes, monkeypatch, caplog):
    def refuse(which, *arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # Docker refuses both calls, of which the first only asks
    monkeypatch.setattr(memory_nodes, "_call", refuse)
    assert spread_over_nodes({0, 1}, two_nodes) == []
    assert "stays on one of the NUMA nodes 0, 1: Operation not permitted" in caplog.text
