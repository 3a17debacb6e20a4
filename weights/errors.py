"""Errors of model folders, data files and training."""

from engine.errors import PatchFailedError, PatchRefusedError


class CheckpointError(Exception):
    """A model cannot be served or converted; the message names file and tensor."""


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
