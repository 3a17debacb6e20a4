"""The models that are compared on facts."""

from dataclasses import replace

from benchmarks.curves.contestants import Contestant, Trunk

SEQUENCE_LENGTH = 64


def contestants(is_reduced: bool) -> list[Contestant]:
    """Dense models of 1, 2 and 4 times the compute, Memory+ of all sizes, a PKM, a mixture.

    Models with a memory, or with two experts per token, need at most 4 % more compute than the
    smallest dense model.
    """
    trunk = Trunk(SEQUENCE_LENGTH)
    dense = [trunk.dense(name) for name in ("dense", "dense 2x", "dense 4x")]
    if is_reduced:
        return [dense[0], trunk.memory("memory_plus", 64), trunk.memory("memory_plus", 256)]
    memories = [trunk.memory("memory_plus", 2**bits) for bits in (6, 7, 8, 9)]
    row_wise = replace(
        memories[2], name=f"{memories[2].name} row-wise", kind="memory_plus row-wise", row_wise=True
    )
    return [*dense, *memories, row_wise, trunk.memory("pkm", 256), trunk.experts()]
