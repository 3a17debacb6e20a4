"""Starts programs and waits until a line of their log says that they are ready."""

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def started(
    command: Sequence[str], pattern: str, *, new_group: bool = False
) -> Iterator[tuple[subprocess.Popen[str], re.Match[str]]]:
    """Run a program until the block ends; yield it and what ``pattern`` finds in its stderr.

    AssertionError with its output if it ends before a line has the pattern.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stderr=pipe, text=True, start_new_session=new_group) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(pattern, line):
                    break
            else:
                raise AssertionError("".join(lines))
            yield process, found
        finally:
            process.terminate()
            process.communicate(timeout=60)
