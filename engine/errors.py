"""Mistakes of callers: settings and requests that cannot be taken. Needs no torch."""


class ConfigError(ValueError):
    """A setting that is out of range or fits nothing; the message begins with its name."""


class RequestError(ValueError):
    """The caller's mistake in a request. ``param`` names the field that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
