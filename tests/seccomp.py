"""Runs a command under a seccomp profile of Docker's format: python -m tests.seccomp FILE CMD."""

import ctypes
import json
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# from linux/bpf_common.h and linux/seccomp.h: load a word, keep bits, compare, return
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# places of the number, the architecture and the first argument in the kernel's struct
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


def call_numbers() -> dict[str, int]:
    """The numbers of this machine's system calls by name, from the kernel's headers."""
    command = ["gcc", "-E", "-dM", "-include", "asm/unistd.h", "-x", "c", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"__NR_(\w+) (\d+)\n", text)}


def program(profile: Mapping[str, Any]) -> bytes:
    """The filter of a profile whose rules all allow, as instructions of classic BPF.

    Arguments are compared by their lower 32 bits. Names that this machine lacks are left out.
    """
    numbers = call_numbers()
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[platform.machine()]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for rule in profile["syscalls"]:
        assert rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]:
            if name not in numbers:
                continue
            body = [*_comparison(rule.get("args", []))]
            steps += [(_EQUAL, 0, len(body), numbers[name]), *body]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    steps.append((_RETURN, 0, 0, _ERRNO | profile["defaultErrnoRet"]))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _comparison(arguments: list[dict[str, Any]]) -> list[tuple[int, int, int, int]]:
    """Instructions that allow a call if its argument fits, and else load the number again."""
    if not arguments:
        return [(_RETURN, 0, 0, _ALLOW)]
    (one,) = arguments
    is_masked = one["op"] == "SCMP_CMP_MASKED_EQ"
    assert is_masked or one["op"] == "SCMP_CMP_EQ"
    mask = [(_AND, 0, 0, one["value"])] if is_masked else []
    return [
        (_LOAD, 0, 0, _ARGUMENTS + 8 * one["index"]),
        *mask,
        (_EQUAL, 0, 1, one["valueTwo"] if is_masked else one["value"]),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _NUMBER),
    ]


def confine(profile: Mapping[str, Any]) -> None:
    """Apply a profile to this process and its children."""
    code = program(profile)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, header)):
        if library.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    confine(json.loads(Path(sys.argv[1]).read_text()))
    os.execvp(sys.argv[2], sys.argv[2:])
