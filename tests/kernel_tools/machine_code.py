"""Compiles the kernel of a call for GPUs this machine lacks and reads its machine code."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# `make test` compiles for one target, `make test-slow` for the others
QUICK_TARGET = "sm_90"


@dataclass(frozen=True)
class Figures:
    """Resources and instruction counts of one kernel's machine code.

    Attributes:
        registers: registers per lane (AMD: vector registers, with accumulation registers).
        shared: bytes of shared memory per program.
        spills: bytes of stack, and instructions or registers that spill.
        wide_loads: instructions that load 128 bits a lane from device memory, to registers or
            straight to shared memory.
        narrow_loads: instructions that load less than 32 bits a lane.
        barriers: instructions that wait for the program's other warps.
    """

    registers: int
    shared: int
    spills: int
    wide_loads: int
    narrow_loads: int
    barriers: int


class AbsentGpu(DriverBase):
    """A driver that knows only its target: it can compile for it but not launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # triton caches compiled kernels by device, so each target needs its own device
        return list(TARGETS.values()).index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., None]:
        raise AssertionError("nothing runs here")


def compiled(target: GPUTarget, call: Callable[[], object]) -> Figures:
    """The figures of the one kernel that ``call`` launches; see ``all_compiled``."""
    (figures,) = all_compiled(target, call)
    return figures


def all_compiled(target: GPUTarget, call: Callable[[], object]) -> list[Figures]:
    """The figures of the kernels that ``call`` launches, in order.

    The call runs as it is, up to the launch itself, which only compiles: arguments are specialised
    by their alignment as they are on a GPU.
    """
    kernels = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", warm_up)
        # never restored: these tests run in a separate process that has no other driver
        triton.runtime.driver.set_active(AbsentGpu(target))
        call()
    return [_figures_of(kernel) for kernel in kernels]


def check(figures: Figures, budget: tuple[int, int], wide_loads: int) -> None:
    """Assert the budget, no spills, and at least ``wide_loads`` loads of 128 bits per lane."""
    assert not figures.spills, f"spills: {figures}"
    assert figures.wide_loads >= wide_loads, f"loads are narrow, {wide_loads} wide ones: {figures}"
    assert not figures.narrow_loads, f"loads are narrow: {figures}"
    assert figures.registers <= budget[0], f"registers: {figures}"
    assert figures.shared <= budget[1], f"shared memory: {figures}"


def targets(names: Iterable[str] = TARGETS) -> list:
    """The names as parameters; all but the quick target are slow."""
    return [pytest.param(name, marks=marks_of(name)) for name in names]


def marks_of(target: str) -> list:
    return [] if target == QUICK_TARGET else [pytest.mark.slow]


def per_target(budgets: dict) -> list:
    """Each case of a budget table with each target; all but those of the quick target are slow."""
    return [
        pytest.param(
            case,
            target,
            limits,
            id=f"{'-'.join(map(str, case))}-{target}",
            marks=marks_of(target),
        )
        for case, row in budgets.items()
        for target, limits in zip(TARGETS, row, strict=True)
    ]


@functools.cache
def _figures_of(kernel) -> Figures:
    """The figures of a compiled kernel; triton returns one object for equal launches."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)


def _nvidia(kernel) -> Figures:
    tools = triton.knobs.nvidia
    usage_of = [tools.cuobjdump.path, "-res-usage"]
    # without control flow: that takes a third of the time, and adds comments only
    code_of = [tools.nvdisasm.path, "--print-code", "--no-dataflow"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([*command, cubin.name], capture_output=True, text=True, check=True)
            for command in (usage_of, code_of)
        )
    figures = r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    registers, stack, local = map(int, re.search(figures, usage.stdout + usage.stderr).groups())
    names = Counter(
        re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass.stdout)
    )
    # LDGSTS loads to shared memory
    loads = {n: count for n, count in names.items() if n.startswith(("LDG.", "LDGSTS."))}
    assert loads, "the listing has no loads: its format has changed"
    return Figures(
        registers,
        kernel.metadata.shared,
        stack + local + sum(n for name, n in names.items() if name.startswith(("STL", "LDL"))),
        sum(n for name, n in loads.items() if ".128" in name),
        sum(n for name, n in loads.items() if re.search(r"\.[US](8|16)\b", name)),
        sum(n for name, n in names.items() if name.startswith("BAR.")),
    )


def _amd(kernel) -> Figures:
    assert kernel.asm["hsaco"]
    text = kernel.asm["amdgcn"]

    def figure(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    names = Counter(re.findall(r"^\s+([a-z]\w+)\s", text, re.MULTILINE))
    loads = {n: c for n, c in names.items() if n.startswith(("global_load_", "buffer_load_"))}
    assert loads, "the listing has no loads: its format has changed"
    scratch = sum(n for name, n in names.items() if name.startswith("scratch_"))
    spilled = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    return Figures(
        figure("vgpr_count"),
        kernel.metadata.shared,
        spilled + figure("private_segment_fixed_size") + scratch,
        sum(n for name, n in loads.items() if name.endswith("_dwordx4")),
        sum(n for name, n in loads.items() if re.search(r"_(u|s)?(byte|short)", name)),
        names["s_barrier"],
    )
