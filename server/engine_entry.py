"""What runs in the engine process: prepare the model, load it, serve the connection."""

import gc
import logging
from multiprocessing.connection import Connection

from engine.allocator import keep_freed_memory
from engine.config import ConfigError
from engine.engine import Engine
from engine.process import EngineRefused, run_engine
from server.config import EngineSettings
from weights.checkpoint import load_model
from weights.errors import CheckpointError
from weights.prepare import prepared_folder


def main(connection: Connection, settings: EngineSettings) -> None:
    """Build an engine and run it, or say why there is none."""
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s")
    try:
        engine = build_engine(settings)
    except (CheckpointError, ConfigError) as error:
        connection.send(EngineRefused(str(error)))
        return
    engine.warm_up()
    # what is there now stays: the collector need not look at it during every few steps
    gc.collect()
    gc.freeze()
    run_engine(engine, connection)


def build_engine(settings: EngineSettings) -> Engine:
    """An engine with its model loaded, which is prepared first where it is not yet.

    Raises:
        CheckpointError: the model cannot be served.
        ConfigError: settings and model do not fit together; the message names the field.
    """
    options = settings.model
    folder = prepared_folder(options.model, settings.cache_folder)
    model, config = load_model(folder, options.dtype, options.table_cache_bytes)
    model.pack()
    return Engine(model, settings.engine, config.eos_ids)
