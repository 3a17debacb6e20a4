"""The exit status of a verb, and one line on stderr for the error that ended it."""

import signal
from collections.abc import Callable

from engine.errors import ConfigError, PatchNotLoadedError, RequestError
from engine.process import EngineFailedError, EngineLostError, EngineStartError
from server.cli.checked_stdout import StdoutError, checked_stdout
from server.cli.interrupt import interruptible
from weights.errors import ChatTemplateError, CheckpointError, DataError, TrainingError
from weights.lack_of_memory import lack_of_memory

FAILURE, USAGE_ERROR = 1, 2
# as shells report a process that SIGINT or SIGPIPE ended
INTERRUPTED, CLOSED_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
_USER_ERRORS = (
    *(ChatTemplateError, CheckpointError, ConfigError, DataError),
    *(EngineStartError, PatchNotLoadedError, RequestError, TrainingError),
)


def exit_status(
    run: Callable[[], int], report: Callable[[str], None], typed: Callable[[str], str] = str
) -> int:
    """Run a verb and return its exit status.

    The status is 2 for a caller's mistake. It is 1 if the machine fails: an engine that dies, a
    file or stdout that cannot be written, or too little memory. It is 130 after Ctrl+C, and 141 if
    the reader of stdout has gone, about which nothing is said. ``report`` gets one line for any
    other failure; ``typed`` puts the names that the caller typed into a line about a mistake. Other
    errors are memplus's own: they pass with their traceback.
    """
    with interruptible() as interrupt:
        try:
            with checked_stdout():
                return run()
        except BaseException as error:
            if interrupt.has_arrived or isinstance(error, KeyboardInterrupt):
                return INTERRUPTED
            if isinstance(error, StdoutError) and error.is_closed_pipe:
                return CLOSED_PIPE
            line = _line(error)
            if line is None:
                raise
            if isinstance(error, EngineFailedError) or not isinstance(error, _USER_ERRORS):
                report(f"memplus: {line}")
                return FAILURE
            # an error of a run begins with its folder, whose name may be that of a field
            report(f"memplus: {line if isinstance(error, TrainingError) else typed(line)}")
            return USAGE_ERROR


def _line(error: BaseException) -> str | None:
    """The line about an error that needs no traceback; None for others."""
    if isinstance(error, (*_USER_ERRORS, EngineLostError)):
        return str(error)
    if (line := lack_of_memory(error)) is not None or not isinstance(error, OSError):
        return line
    name = "stdout" if isinstance(error, StdoutError) else error.filename
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return reason if name is None else f"{name}: {reason}"
