"""Errors of model folders, data files and training."""

from engine.errors import PatchFailedError, PatchRefusedError

_MOST_CHARACTERS = 1000


class CheckpointError(Exception):
    """A model cannot be served or converted; the message names file and tensor.

    The message is one line of bounded length: names and values from files enter it, and must not
    look like another line or control a terminal.
    """

    def __init__(self, message: str) -> None:
        # escape only what is not printable, such as line breaks
        shown = "".join(
            c if c.isprintable() else ascii(c)[1:-1] for c in message[: _MOST_CHARACTERS + 1]
        )
        if len(shown) > _MOST_CHARACTERS:
            shown = f"{shown[: _MOST_CHARACTERS - 3]}..."
        super().__init__(shown)


class ModelNotFoundError(CheckpointError):
    """The model does not exist; the message says how to get it."""


class PatchError(PatchRefusedError):
    """A row patch cannot be used; the message names file, table and field."""


class PatchNotFoundError(PatchError):
    """No patch folder has this name."""


class PatchReadError(PatchFailedError):
    """Files of a row patch or of its model cannot be read now, or memory for them is missing."""


class DataError(Exception):
    """Texts cannot be used for training; the message names file and line."""


class TrainingError(Exception):
    """Training cannot continue; the message names the step if there is one."""


class ChatTemplateError(Exception):
    """A chat template is not valid, or does not accept the messages."""
