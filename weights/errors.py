"""The errors of model folders and files."""


class CheckpointError(Exception):
    """A model that cannot be served or converted as it is; the message names file and tensor."""


class ModelNotFoundError(CheckpointError):
    """There is no such model; the message says how to get one."""
