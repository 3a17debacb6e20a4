"""What runs in the engine process: prepare the model, load it, serve the connection."""

import gc
import logging
from multiprocessing.connection import Connection
from pathlib import Path

from engine.allocator import keep_freed_memory
from engine.config import ConfigError
from engine.engine import Engine
from engine.model.lookahead import LookaheadConfig
from engine.model.transformer import Transformer
from engine.process import EngineRefused, run_engine
from server.config import EngineSettings, ModelOptions
from weights.checkpoint import load_model
from weights.config_json import CheckpointConfig
from weights.errors import CheckpointError
from weights.prepare import prepared_folder
from weights.table_tier import TierChoice


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
    folder = prepared_folder(settings.model.model, settings.cache_folder)
    model, config = load_served(settings.model, folder, settings.engine.kv_bytes)
    model.pack()
    return Engine(model, settings.engine, config.eos_ids)


def load_served(
    options: ModelOptions, folder: Path, kv_bytes: int
) -> tuple[Transformer, CheckpointConfig]:
    """A folder's model, its tables where ``options`` want them beside ``kv_bytes`` of KV blocks.

    Raises:
        CheckpointError, ConfigError: as ``load_model``.
    """
    cache: int | TierChoice | None = None
    if options.table_tier == "auto":
        asked = options.table_cache_bytes if options.table_cache is not None else None
        cache = TierChoice(kv_bytes, asked, options.table_cache_bytes)
    elif options.table_tier == "disk":
        cache = options.table_cache_bytes
    model, config = load_model(
        folder,
        options.dtype,
        cache,
        table_dtype=options.table_dtype,
        verify_tables=options.verify_tables,
    )
    if options.table_lookahead:
        memory = config.model.memory
        if memory is None:
            raise ConfigError("table_lookahead: this model has no memory layers")
        candidates = max(1, round(options.table_lookahead_share * memory.top_k))
        model.look_ahead(LookaheadConfig(options.table_lookahead, candidates))
    return model, config
