"""Compiles a Triton kernel for an H100, and the code that launches kernels, without a GPU."""

import subprocess
import sysconfig
from pathlib import Path

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_one(numbers):
    tl.store(numbers, tl.load(numbers) + 1)


source = ASTSource(add_one, {"numbers": "*fp32"})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
# Triton does the same at the first launch, but links it with the driver, which is missing here
backend = Path(triton.backends.nvidia.__file__).parent
headers = (backend / "include", sysconfig.get_paths("posix_prefix")["include"])
command = ["gcc", "-fsyntax-only", *(f"-I{folder}" for folder in headers), backend / "driver.c"]
subprocess.run(command, check=True)
print(f"{len(kernel.asm['cubin'])} bytes of machine code")
