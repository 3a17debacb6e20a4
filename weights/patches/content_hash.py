"""The content hash of a row patch: BLAKE3 over its tensors, computed by several threads.

BLAKE3 takes a third of the time of SHA-256, which a server lacks for running requests.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from blake3 import blake3
from torch import Tensor

from weights.checkpoints.tensor_files import STORED_DTYPES

# fits into a core's cache, so that a part is read, checked and hashed without a second fetch
PART_BYTES = 2**20
_MAX_THREADS = 4
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}

ReadPart = Callable[[str, int, int], memoryview]


def content_hash(tensors: Mapping[str, Tensor], read_part: ReadPart) -> str:
    """BLAKE3 over names, dtypes, shapes and bytes of tensors, in the order of their names.

    A tensor counts as the BLAKE3 digests of its parts of 1 MiB, so that threads share the work.

    Args:
        tensors: their dtypes and shapes count; they may be on the meta device.
        read_part: gets a tensor's name, an offset and a number of bytes, and returns the bytes
            there. Several threads call it.

    Returns:
        64 hexadecimal digits.
    """
    digest = blake3()
    # more threads than cores would only slow down a server's running requests
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="patch-hash") as pool:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {_CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
            one = partial(_digest, partial(read_part, name), tensor.nbytes)
            for part in pool.map(one, range(0, tensor.nbytes, PART_BYTES)):
                digest.update(part)
    return digest.hexdigest()


def _digest(read_part: Callable[[int, int], memoryview], num_bytes: int, first: int) -> bytes:
    return blake3(read_part(first, min(PART_BYTES, num_bytes - first))).digest()
