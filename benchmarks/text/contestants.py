"""The models that are compared on text."""

from benchmarks.curves.contestants import Contestant, Trunk

SEQUENCE_LENGTH = 128


def contestants(is_reduced: bool) -> list[Contestant]:
    """A dense model, Memory+ with tables of all sizes, and a dense model of twice the compute.

    Models with a memory need at most 3 % more compute than the smaller dense model.
    """
    trunk = Trunk(SEQUENCE_LENGTH)
    sizes = (6, 8) if is_reduced else (5, 6, 7, 8, 9)
    memories = [trunk.memory("memory_plus", 2**bits) for bits in sizes]
    wider = [] if is_reduced else [trunk.dense("dense 2x")]
    return [trunk.dense("dense"), *memories, *wider]
