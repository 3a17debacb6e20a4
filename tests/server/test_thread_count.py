"""Thread counts: fake affinity masks, cores and cgroups of both versions, and the real command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from server.config import ThreadOptions, set_threads
from server.thread_count import default_threads

READ_BY_OPENMP = ("OMP_", "GOMP_", "MKL_")


@pytest.fixture
def machine(tmp_path):
    """``default_threads`` on a fake machine; ``quotas``: CPUs by cgroup folder."""

    def found(num_cpus, quotas=None, version=2, own="/a/b", threads_per_core=1):
        proc, cgroups, cpus = (tmp_path / name for name in ("proc", "cgroups", "cpus"))
        (proc / "self").mkdir(parents=True)
        line = {1: f"5:cpu,cpuacct:{own}", 2: f"0::{own}"}[version]
        (proc / "self" / "cgroup").write_text(f"7:cpuset:/else\n{line}\n")
        for place, quota in (quotas or {}).items():
            write_quota(cgroups / ("cpu" if version == 1 else "") / place, quota, version)
        for cpu in range(num_cpus):
            first = cpu - cpu % threads_per_core
            topology = cpus / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            siblings = f"{first}-{first + threads_per_core - 1}\n"
            (topology / "thread_siblings_list").write_text(siblings)
        return default_threads(range(num_cpus), proc, cgroups, cpus)

    return found


def write_quota(folder: Path, quota: float | None, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        number = "max" if quota is None else str(int(quota * 50_000))
        (folder / "cpu.max").write_text(f"{number} 50000\n")
    else:
        number = "-1" if quota is None else str(int(quota * 100_000))
        (folder / "cpu.cfs_quota_us").write_text(f"{number}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.parametrize("num_cpus", range(1, 65))
def test_without_a_quota_each_cpu_of_the_mask_gets_a_thread(machine, num_cpus):
    found = machine(num_cpus)
    assert (found.count, found.reason) == (num_cpus, f"CPUs in the affinity mask: {num_cpus}")


@pytest.mark.parametrize("quota", range(1, 64))
def test_a_quota_bounds_the_threads(machine, quota):
    found = machine(64, {"a/b": quota})
    assert found.count == quota
    assert found.reason == f"cgroup quota {quota}.0 CPUs, 64 in the affinity mask"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_the_smallest_quota_up_to_the_root_applies(machine, version, place):
    quotas = {"": None, "a": 8, "a/b": None} | {place: 2}
    assert machine(64, quotas, version).count == 2


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_sees_its_cgroup_as_the_root(machine, version):
    assert machine(64, {"": 3}, version, own="/docker/0123").count == 3


@pytest.mark.parametrize(("quota", "count"), [(2.5, 2), (1.99, 1), (0.5, 1), (0.1, 1), (4.0, 4)])
def test_a_quota_is_rounded_down_but_to_no_less_than_one_thread(machine, quota, count):
    assert machine(64, {"a": quota}).count == count


def test_a_quota_above_the_affinity_mask_has_no_effect(machine):
    found = machine(2, {"a": 2.0, "a/b": 16})
    assert (found.count, found.reason) == (2, "CPUs in the affinity mask: 2")


def test_two_hardware_threads_of_a_core_get_one_thread(machine):
    found = machine(8, threads_per_core=2)
    assert (found.count, found.reason) == (4, "CPUs in the affinity mask: 8 on 4 cores")


def test_a_quota_counts_cpus_and_not_cores(machine):
    assert machine(8, {"a": 3}, threads_per_core=2).count == 3


@pytest.mark.parametrize("text", ["much\n", "100000 0\n", "x y z\n", ""])
def test_a_malformed_quota_sets_no_limit(machine, tmp_path, text):
    (tmp_path / "cgroups" / "a").mkdir(parents=True)
    (tmp_path / "cgroups" / "a" / "cpu.max").write_text(text)
    assert machine(2).count == 2


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_a_thread_count_out_of_range_is_refused(threads):
    with pytest.raises(ConfigError, match="threads: .* is outside"):
        ThreadOptions(threads)


SHOWN = """
import os, sys
from server.cli import main as cli
def show(options):
    import torch
    print(torch.get_num_threads())
cli.generate = show
if sys.argv[1] != "all":
    os.sched_setaffinity(0, {int(sys.argv[1])})
sys.exit(cli.main(["generate", "x", *sys.argv[2:]]))
"""


def run_generate(cpu: int | str, *arguments: str, **own: str) -> tuple[str, int]:
    """(log line of the command, number of torch threads)."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(READ_BY_OPENMP)}
    command = [sys.executable, "-c", SHOWN, str(cpu), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=plain | own, check=True)
    return result.stderr.strip(), int(result.stdout)


def test_the_command_uses_the_affinity_mask():
    cpu = min(os.sched_getaffinity(0))
    assert run_generate(cpu) == ("threads: 1 (CPUs in the affinity mask: 1)", 1)


def test_the_option_takes_precedence():
    # more threads than cores, which MKL does not use by default
    wanted = ("threads: 64 (--threads)", 64)
    assert run_generate("all", "--threads", "64") == wanted
    assert (
        run_generate("all", "--threads", "64", OMP_NUM_THREADS="2", MKL_NUM_THREADS="1") == wanted
    )


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_environment_variables_of_the_user_are_kept(name):
    assert run_generate("all", **{name: "1"}) == (f"threads: 1 ({name})", 1)


@pytest.mark.parametrize(
    ("own", "added"),
    [({}, True), ({"GOMP_SPINCOUNT": "77"}, False), ({"OMP_WAIT_POLICY": "active"}, False)],
)
def test_waiting_threads_sleep_soon_unless_the_user_sets_a_policy(monkeypatch, own, added):
    monkeypatch.setattr(os, "environ", dict(own))
    set_threads(ThreadOptions())
    set_by_us = {name: os.environ[name] for name in os.environ.keys() - own.keys()}
    assert ("GOMP_SPINCOUNT" in set_by_us) is added
    # libgomp's default is 300,000, which spins for more than a time slice
    assert 0 < int(set_by_us.get("GOMP_SPINCOUNT", 1)) < 10_000
