"""Tensor-parallel ranks as threads of one process, over gloo."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from engine.executors.parallel.group import RankGroup

Result = TypeVar("Result")


def run_ranks(size: int, work: Callable[[RankGroup], Result]) -> list[Result]:
    """Call ``work`` with each rank's group, at the same time; the results in the order of ranks."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(size) as threads:

        def run(rank: int) -> Result:
            group = RankGroup(rank, size)
            group.meet(Path(folder) / "store")
            return work(group)

        return list(threads.map(run, range(size)))
