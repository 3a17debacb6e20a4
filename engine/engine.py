"""The engine: requests in, tokens out, one step at a time. It knows no text and no processes."""

import logging
import secrets

from engine.config import ConfigError, EngineConfig
from engine.kv_blocks import BlockPool
from engine.model.transformer import Transformer
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput
from engine.runner import Runner
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls it."""

    def __init__(
        self, model: Transformer, config: EngineConfig, eos_ids: frozenset[int] = frozenset()
    ) -> None:
        """Reserve KV blocks for the model; a sequence ends on any of ``eos_ids``.

        Raises:
            ConfigError: ``max_model_len`` exceeds what the model or the KV memory takes.
        """
        model_config = model.config
        itemsize = model.model.embed_tokens.weight.dtype.itemsize
        num_blocks = config.num_kv_blocks(model_config.kv_bytes_per_token(itemsize))
        self.limits = RequestLimits(
            vocab_size=model_config.vocab_size,
            max_model_len=_max_model_len(
                config, model_config.max_positions, num_blocks * config.block_size
            ),
        )
        try:
            self._runner = Runner(model, num_blocks, config.block_size)
        except (OSError, OverflowError):
            message = f"kv_cache_gib: this machine has not {config.kv_cache_gib} GiB to give"
            raise ConfigError(message) from None
        self._pool = BlockPool(num_blocks, config.block_size)
        self._scheduler = Scheduler(config, self._pool, eos_ids)

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; its tokens come out of later steps.

        Raises:
            RequestError: the model could not run it.
        """
        self.limits.check(request.prompt_ids, request.sampling)
        seed = request.sampling.seed
        self._scheduler.add(request, secrets.randbits(63) if seed is None else seed)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; nothing happens if it has ended already."""
        self._scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """Run one step. A step that fails ends the requests in it, not the engine."""
        plan = self._scheduler.plan()
        if not plan.chunks:
            return StepOutput((), self.statistics())
        try:
            sampled = self._runner.run(plan)
        except Exception as error:
            failed = [chunk.request_id for chunk in plan.chunks]
            logger.exception("a step failed; its requests end: %s", ", ".join(failed))
            outputs = self._scheduler.fail(plan, f"{type(error).__name__} in the engine")
        else:
            outputs = self._scheduler.commit(plan, sampled)
        return StepOutput(tuple(outputs), self.statistics(plan.num_tokens))

    def check_integrity(self) -> None:
        """Check that no block is lost or held by a request that ended (AssertionError)."""
        self._scheduler.check_integrity()

    def statistics(self, step_tokens: int = 0) -> EngineStatistics:
        """The gauges as they stand now."""
        return EngineStatistics(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_blocks_used=self._pool.num_blocks - self._pool.num_free,
            kv_blocks_total=self._pool.num_blocks,
            step_tokens=step_tokens,
        )


def _max_model_len(config: EngineConfig, max_positions: int, kv_tokens: int) -> int:
    asked = config.max_model_len
    if asked is None:
        return min(max_positions, kv_tokens)
    if asked > max_positions:
        raise ConfigError(f"max_model_len: {asked} exceeds the model's {max_positions} positions")
    if asked > kv_tokens:
        raise ConfigError(
            f"max_model_len: {asked} exceeds the {kv_tokens} tokens that kv_cache_gib"
            f" {config.kv_cache_gib} holds"
        )
    return asked
