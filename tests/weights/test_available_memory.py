"""Available memory: of the machine, and within limits of cgroups v1 and v2."""

from pathlib import Path

import pytest

from weights.available_memory import available_memory

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8192 kB\n")
    return tmp_path / "proc"


def cgroup(folder: Path, limit: int | str, usage: int, version: int, files: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    total = "total_" if version == 1 else ""
    # version 1: counters without descendants must be ignored
    own = "inactive_file 0\nactive_file 0\n" if version == 1 else ""
    text = f"anon 5\n{own}{total}inactive_file {files // 2}\n{total}active_file {files // 2}\n"
    (folder / "memory.stat").write_text(text)
    return folder


def test_without_cgroups_it_is_mem_available(proc, tmp_path):
    found = available_memory(proc, tmp_path / "none")
    assert (found.num_bytes, found.bound) == (8 * MIB, "MemAvailable")
    (proc / "self" / "cgroup").write_text("0::/\n4:memory:/a\n")
    assert available_memory(proc, tmp_path / "none") == found


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_the_smallest_limit_at_any_level_applies(proc, tmp_path, version, place):
    line = {1: "4:cpu,memory:/a/b", 2: "0::/a/b"}[version]
    (proc / "self" / "cgroup").write_text(f"7:blkio:/\n{line}\n")
    root = tmp_path / "sys" / ("memory" if version == 1 else "")
    narrow = cgroup(root / place, 3 * MIB, 2 * MIB, version, MIB)
    for other in {"", "a", "a/b"} - {place}:
        cgroup(root / other, 2**63 - 4096 if version == 1 else "max", 2 * MIB, version)
    found = available_memory(proc, tmp_path / "sys")
    # file pages can be evicted, so they count as available
    assert (found.num_bytes, found.bound) == (2 * MIB, f"the limit of cgroup {narrow}")
    (proc / "meminfo").write_text("MemAvailable: 1024 kB\n")
    assert available_memory(proc, tmp_path / "sys").bound == "MemAvailable"


@pytest.mark.parametrize("limit", [3 * MIB, "max"])
def test_memory_high_limits_it_too(proc, tmp_path, limit):
    (proc / "self" / "cgroup").write_text("0::/a\n")
    folder = cgroup(tmp_path / "sys" / "a", limit, MIB, 2)
    (folder / "memory.high").write_text(f"{2 * MIB}\n")
    assert available_memory(proc, tmp_path / "sys").num_bytes == MIB
    (folder / "memory.high").write_text("max\n")
    expected = 8 * MIB if limit == "max" else 2 * MIB
    assert available_memory(proc, tmp_path / "sys").num_bytes == expected


@pytest.mark.parametrize("file", ["memory.high", "memory.max", "memory.current", "memory.stat"])
def test_malformed_files_are_an_error(proc, tmp_path, file):
    (proc / "self" / "cgroup").write_text("0::/a\n")
    folder = cgroup(tmp_path / "sys" / "a", 3 * MIB, MIB, 2)
    (folder / file).write_text("much\n")
    with pytest.raises(ValueError):
        available_memory(proc, tmp_path / "sys")


def test_a_container_sees_its_cgroup_as_the_root(proc, tmp_path):
    (proc / "self" / "cgroup").write_text("0::/docker/0123\n")
    cgroup(tmp_path / "sys", 3 * MIB, 4 * MIB, 2)
    assert available_memory(proc, tmp_path / "sys").num_bytes == 0


def test_this_machine_has_available_memory():
    assert 0 < available_memory().num_bytes < 2**50
