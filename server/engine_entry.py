"""What runs in the engine process: prepare the model, load it, serve the connection."""

import gc
import logging
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from engine.allocator import keep_freed_memory
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.config import ModelConfig
from engine.model.transformer import Transformer
from engine.process import EngineRefused, run_engine
from server.config import EngineSettings, ModelOptions
from weights.checkpoints.checkpoint import load_model, model_bytes
from weights.checkpoints.config_json import CheckpointConfig, read_config
from weights.checkpoints.table_tier import TierChoice
from weights.errors import CheckpointError
from weights.models.prepare import prepared_folder

logger = logging.getLogger(__name__)


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
    return served_engine(load_served(settings.model, folder, settings.engine), settings.engine)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, and how it is to be served.

    Attributes:
        model: with its tables attached.
        config: of its checkpoint.
        kv_bytes: memory for its KV blocks.
        lookahead: how rows are predicted for its tables, if they are.
    """

    model: Transformer
    config: CheckpointConfig
    kv_bytes: int
    lookahead: LookaheadConfig | None


def served_engine(loaded: LoadedModel, engine: EngineConfig) -> Engine:
    """An engine for a loaded model, which may be forgotten if it only serves.

    Raises:
        ConfigError: settings and model do not fit together; the message names the field.
    """
    sized = replace(engine, kv_cache_gib=loaded.kv_bytes / 2**30)
    executor = make_executor(loaded.model, sized, loaded.lookahead)
    return Engine(executor, sized, loaded.config.eos_ids)


def load_served(options: ModelOptions, folder: Path, engine: EngineConfig | None) -> LoadedModel:
    """A folder's model, its tables where ``options`` want them beside the engine's KV blocks.

    Without an engine there are none.

    Raises:
        CheckpointError: as ``load_model``.
        ConfigError: as ``load_model``; or the model cannot look ahead so.
    """
    # what can be refused at once is, before minutes are spent on tables
    described = read_config(folder).model
    lookahead = _lookahead(options, described) if options.table_lookahead else None
    sizes = model_bytes(folder, options.dtype, options.table_dtype)
    kv_bytes = engine.kv_bytes(sizes.kv_per_token, described.max_positions) if engine else 0
    asked = options.table_cache_bytes if options.table_cache is not None else None
    choice = TierChoice(
        *(kv_bytes, asked, options.table_cache_bytes, options.table_tier),
        is_kv_requested=engine is not None and engine.kv_cache_gib is not None,
    )
    shares = choice.shares(sizes.tables, sizes.weights)
    model, config = load_model(
        folder,
        options.dtype,
        shares.cache_bytes,
        table_dtype=options.table_dtype,
        verify_tables=options.verify_tables,
    )
    tables = model.tables.values()
    if lookahead is not None and all(table.fetched_capacity is None for table in tables):
        logger.warning("tables are held in memory: --table-lookahead is not used")
        lookahead = None
    return LoadedModel(model, config, shares.kv_bytes, lookahead)


def _lookahead(options: ModelOptions, model: ModelConfig) -> LookaheadConfig:
    """What ``options`` ask for, where the model has so much; of the rows one at least."""
    if model.memory is None:
        raise ConfigError("table_lookahead: this model has no memory layers")
    most = model.memory_layers[-1] + 1
    if options.table_lookahead > most:
        raise ConfigError(
            f"table_lookahead: {options.table_lookahead} is more than the {most} layers up to the"
            " last with a memory"
        )
    top_k, num_subkeys = model.memory.top_k, model.memory.num_subkeys
    candidates = max(1, round(options.lookahead_share * top_k))
    if candidates > num_subkeys:
        raise ConfigError(
            f"table_lookahead_share: {options.lookahead_share} of {top_k} rows are {candidates},"
            f" more than the {num_subkeys} subkeys that choose them"
        )
    return LookaheadConfig(options.table_lookahead, candidates)
