"""Runs ``memplus`` with ranks of GPUs on CPUs: gloo, fake devices, interpreted kernels."""

import os
import sys

if __name__ == "__main__":
    # triton reads it when it is imported, here and in the processes of the ranks
    os.environ["TRITON_INTERPRET"] = "1"

from functools import partial

import torch

from engine.executors.cuda import rank_sizing
from server import engine_entry, parallel_gpu, served_model
from server.cli.main import main
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.prompt_device import PromptDevice
from tests.engine.executors.parallel.test_device_group import gloo_group


class Memory:
    """A GPU of 8 GiB; a step allocates nothing."""

    def total(self) -> int:
        return 2**33

    def in_use(self) -> int:
        return 0

    def peak(self, work) -> int:
        work()
        return 0


def use_cpus(make_device) -> None:
    """Let this process take CPUs for the GPUs of ranks."""
    parallel_gpu.gpu_of = lambda first, rank: torch.device("cpu")
    parallel_gpu.check_memory = lambda *sizes, **more: None
    parallel_gpu.DeviceGroup = partial(parallel_gpu.DeviceGroup, make=gloo_group)
    rank_sizing.CudaDevice = lambda device: make_device()
    rank_sizing.GpuMemory = lambda device: Memory()


def engine(connection, settings) -> None:
    """Entry function of the engine process, rank 0."""
    use_cpus(FakeDevice)
    engine_entry.chosen_device = lambda *options, **more: torch.device("cuda", 0)
    parallel_gpu.RANK_ENTRY = "tests.server.gpu_ranks_serve:rank"
    engine_entry.main(connection, settings)


def rank(connection, settings) -> None:
    """Entry function of another rank."""
    use_cpus(PromptDevice)
    parallel_gpu.main(connection, settings)


if __name__ == "__main__":
    served_model.ENGINE_ENTRY = "tests.server.gpu_ranks_serve:engine"
    sys.exit(main())
