"""What runs in the engine process: prepare the model, load it, serve the connection."""

import logging
from multiprocessing.connection import Connection
from pathlib import Path

from engine.config import ConfigError
from engine.engine import Engine
from engine.process import EngineRefused, run_engine
from server.config import EngineSettings
from weights.checkpoint import load_model
from weights.convert import convert
from weights.default_model import DEFAULT_MODEL, model_source
from weights.errors import CheckpointError


def main(connection: Connection, settings: EngineSettings) -> None:
    """Build an engine and run it, or say why there is none."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s")
    try:
        engine = build_engine(settings)
    except (CheckpointError, ConfigError) as error:
        connection.send(EngineRefused(str(error)))
        return
    run_engine(engine, connection)


def build_engine(settings: EngineSettings) -> Engine:
    """An engine with its model loaded; the default model is prepared first where it is not yet.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: settings and model do not fit together; the message names the field.
    """
    if settings.model == DEFAULT_MODEL:
        _prepare(settings.folder)
    model, config = load_model(settings.folder, settings.dtype)
    return Engine(model, settings.engine, config.eos_ids)


def _prepare(folder: Path) -> None:
    if folder.exists():
        return
    try:
        convert(model_source(), folder)
    except OSError:
        # another process was faster: its folder is as good as ours
        if not folder.exists():
            raise
