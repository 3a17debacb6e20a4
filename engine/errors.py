"""Errors that callers cause: wrong settings and wrong requests."""


class ConfigError(ValueError):
    """A wrong setting; the message begins with its name."""


class RequestError(ValueError):
    """A wrong request; ``param`` names the wrong field, ``reason`` tells what is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param, self.reason = param, message


class PatchNotLoadedError(Exception):
    """A row patch that is not loaded; the message says why."""


class PatchRefusedError(PatchNotLoadedError):
    """The patch is not valid, not made for the model, or exceeds a limit; the message names the
    limit, or file, table and field."""


class PatchFailedError(PatchNotLoadedError):
    """The patch is not loaded because of the machine, not the patch; a retry may succeed."""


class PatchBusyError(PatchFailedError):
    """Requests still use removed row patches, and this patch needs their memory; a retry may
    succeed when they have ended."""


class ContextLengthError(RequestError):
    """A prompt, or a prompt with its answer, that is longer than the model takes."""

    def __init__(self, param: str, length: str, limit: int) -> None:
        # clients recognise the error by these words of OpenAI's server
        super().__init__(param, f"{length}; this model's maximum context length is {limit} tokens")
