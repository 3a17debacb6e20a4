"""The errors of model folders and files."""


class CheckpointError(Exception):
    """A model that cannot be served or converted as it is; the message names file and tensor."""


class ModelNotFoundError(CheckpointError):
    """There is no such model; the message says how to get one."""


class DataError(Exception):
    """Texts that cannot be trained on; the message names file and line."""


class TrainingError(Exception):
    """Training cannot go on; the message names the step where there is one."""
