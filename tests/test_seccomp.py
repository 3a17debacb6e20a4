"""The seccomp profile of containers: what it allows, and that memplus runs under it."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seccomp import call_numbers
from tests.test_house import ROOT

PROFILE = ROOT / "docker" / "seccomp.json"
# calls that change the kernel, other processes, devices, namespaces or the clock
FORBIDDEN = """
    acct add_key bpf chroot clock_settime clone3 delete_module finit_module fsopen init_module
    io_uring_register ioperm iopl kexec_file_load kexec_load keyctl mknod mknodat mount move_mount
    name_to_handle_at open_by_handle_at open_tree perf_event_open personality pivot_root
    process_vm_readv process_vm_writev ptrace quotactl reboot request_key setdomainname sethostname
    setns settimeofday swapoff swapon syslog umount2 unshare userfaultfd vhangup
"""
# calls of x86-64 that newer architectures replaced by more general ones
ONLY_ON_X86 = """
    access alarm arch_prctl chmod chown creat dup2 epoll_create epoll_wait eventfd fork futimesat
    getdents getpgrp lchown link lstat mkdir open pause pipe poll readlink rename rmdir select
    signalfd stat symlink time unlink utime utimes vfork
"""
MISSING = {"x86_64": set(), "aarch64": set(ONLY_ON_X86.split())}
# a thread starts, a namespace does not; only these families of sockets open
SCRIPT = """
import ctypes, errno, socket, sys, threading
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
def refused(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(int(number), *arguments) == -1 and ctypes.get_errno() == errno.ENOSYS
refused(sys.argv[1], 0x10000000)
refused(sys.argv[2], 0x10000011, 0, 0, 0, 0)
socket.socket(socket.AF_INET).close()
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def profile() -> dict:
    return json.loads(PROFILE.read_text())


def confined(file: Path, *command: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "tests.seccomp", str(file), sys.executable, *command]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_profile_allows_known_calls_once_and_none_that_are_privileged():
    assert profile()["defaultAction"] == "SCMP_ACT_ERRNO"
    names = [name for rule in profile()["syscalls"] for name in rule["names"]]
    assert set(names) - MISSING[platform.machine()] <= call_numbers().keys()
    assert {name for name in names if names.count(name) > 1} == {"socket"}
    assert not set(names) & set(FORBIDDEN.split())


def test_threads_start_and_namespaces_do_not():
    numbers = call_numbers()
    calls = [str(numbers[name]) for name in ("unshare", "clone")]
    done = confined(PROFILE, "-c", SCRIPT, *calls)
    assert (done.stdout.split(), done.stderr) == (["thread", "ENOSYS"], "")


@pytest.mark.slow
def test_rows_are_read_by_io_uring_or_without_it_by_threads(memory_plus_folder, tmp_path):
    (tmp_path / "threads.json").write_text(json.dumps(without_io_uring()))
    options = ("--model", str(memory_plus_folder), "--table-tier", "disk", "--table-cache", "1MiB")
    command = ("-m", "server.cli.main", "generate", "memory", "--temperature", "0", *options)
    ring = confined(PROFILE, *command)
    threads = confined(tmp_path / "threads.json", *command)
    assert (ring.returncode, threads.returncode) == (0, 0), ring.stderr + threads.stderr
    assert ring.stdout == threads.stdout != ""
    # a kernel may lack io_uring, but then plain runs say so too
    assert ("no io_uring" in ring.stderr) == (not has_io_uring())
    assert "no io_uring (Function not implemented): 16 threads" in threads.stderr


@pytest.mark.slow
def test_the_disk_tier_is_timed_without_io_uring(memory_plus_folder, tmp_path):
    (tmp_path / "threads.json").write_text(json.dumps(without_io_uring()))
    options = ("--model", str(memory_plus_folder), "--tiers", "disk", "--cache-shares", "0.5")
    short = ("--batches", "1", "--output-len", "2", "--rounds", "1")
    out = ("--out", str(tmp_path / "out"), "--json", str(tmp_path / "results.json"))
    command = ("-m", "server.cli.main", "bench", "memory", *options, *short, *out)
    done = confined(tmp_path / "threads.json", *command)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["tokens_per_s"] > 0 and result["reads_per_token"] > 0
    assert result["limit_reads_per_s"] is None


def without_io_uring() -> dict:
    without = profile()
    for rule in without["syscalls"]:
        rule["names"] = [name for name in rule["names"] if not name.startswith("io_uring")]
    return without


def has_io_uring() -> bool:
    script = (
        "import ctypes, sys; setup = ctypes.CDLL(None).syscall;"
        "print(setup(int(sys.argv[1]), 1, ctypes.create_string_buffer(120)))"
    )
    number = str(call_numbers()["io_uring_setup"])
    done = subprocess.run([sys.executable, "-c", script, number], capture_output=True, text=True)
    return int(done.stdout) >= 0
