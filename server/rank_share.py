"""Rank 0's share of a tensor-parallel model, after the checks that need no weights."""

from engine.config import TABLE_SHARDINGS
from engine.errors import ConfigError
from engine.executors.parallel.shares import RankShare
from engine.model.config import ModelConfig
from server.model_options import ModelOptions


def first_share(options: ModelOptions, kv_dtype: str, config: ModelConfig) -> RankShare:
    """Rank 0's share; ``kv_dtype`` is that of ``EngineConfig``.

    Raises:
        ConfigError: a setting does not fit the model or the number of ranks.
    """
    if kv_dtype != "auto":
        raise ConfigError(
            f"kv_dtype: {kv_dtype} cannot be combined with tensor_parallel, whose ranks keep"
            " keys and values in the dtype of the weights"
        )
    if options.table_sharding is not None and config.memory is None:
        raise ConfigError("table_sharding: requires value tables, but this model has none")
    sharding = options.table_sharding or TABLE_SHARDINGS[0]
    return RankShare(config, 0, options.tensor_parallel, sharding)
