"""Errors that callers cause: wrong settings and wrong requests."""


class ConfigError(ValueError):
    """A wrong setting; the message begins with its name."""


class RequestError(ValueError):
    """A wrong request; ``param`` names the wrong field, ``reason`` tells what is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param, self.reason = param, message
