"""One line about an allocation that failed: what it needs, and what there is."""

import contextlib
import errno
import re

from weights.available_memory import available_memory
from weights.checkpoints.memory_request import size_text

# torch raises RuntimeError for both; the first also says how many bytes it asked for
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory")
_ASKED = re.compile(r"tried to allocate (\d+) bytes")


def lack_of_memory(error: BaseException) -> str | None:
    """The line, without the sizes that are unknown; None if the error is about something else."""
    text = str(error)
    is_torch = isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (is_torch or is_system or isinstance(error, MemoryError)):
        return None
    if "CUDA" in text or "HIP" in text:  # the first line has the sizes
        return text.partition("\n")[0]
    asked = _ASKED.search(text)
    line = f"out of memory: needs {size_text(int(asked[1]))} more" if asked else "out of memory"
    with contextlib.suppress(OSError, ValueError):
        found = available_memory()
        line += f"; {size_text(found.num_bytes)} is available ({found.bound})"
    return line
