"""The engine: requests in, tokens out, one step at a time. It knows no text and no processes."""

import logging
import secrets
from itertools import takewhile

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.executor import Executor
from engine.progress import Progress
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput, TokenOutput
from engine.sampling.masks import Bitmask, TokenMask, allowed_drafts, row_bitmasks
from engine.scheduling.batching import Batcher, chunk_results
from engine.scheduling.drafter import Drafter
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import ChunkResult, SequenceChunk, StepPlan
from engine.table_counts import TableCounter

Bitmasks = dict[str, Bitmask]
logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one executor. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        eos_ids: frozenset[int] = frozenset(),
        drafter: Drafter | None = None,
        num_drafts: int = 0,
    ) -> None:
        """Schedule for an executor that was made with ``config``.

        A sequence ends on any of ``eos_ids``; ``drafter`` proposes up to ``num_drafts`` tokens
        ahead of each decoding sequence.

        Raises:
            ConfigError: ``max_model_len`` exceeds what the model or the KV memory takes.
        """
        model, num_blocks = executor.config, executor.num_blocks
        max_model_len = _max_model_len(config, model.max_positions, num_blocks * config.block_size)
        self.limits = RequestLimits(model.vocab_size, max_model_len, eos_ids)
        self._executor = executor
        self._drafter = drafter
        self._num_drafts = num_drafts
        self._table_counter = TableCounter(executor.tables)
        self._batcher = Batcher(config.block_size, model.vocab_size, eos_ids)
        self._pool = BlockPool(num_blocks, config.block_size)
        propose = self._propose if drafter is not None else None
        self._debug_checks = config.debug_checks
        self._scheduler = Scheduler(config, self._pool, eos_ids, propose)

    @property
    def progress(self) -> Progress:
        """Marked by every piece of work."""
        return self._executor.progress

    @property
    def has_work(self) -> bool:
        """Whether a step would have something to do."""
        return self._scheduler.has_work

    def add(self, request: Request, mask: TokenMask | None = None) -> None:
        """Queue a request; its tokens come out of later steps.

        Raises:
            RequestError: the model could not run it.
        """
        self.limits.check(request.prompt_ids, request.sampling)
        seed = request.sampling.seed
        self._scheduler.add(request, secrets.randbits(63) if seed is None else seed, mask)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; nothing happens if it has ended already."""
        self._scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """Run one step. A request that cannot be run ends, and neither its neighbours nor we do."""
        plan, bound, outputs = self._bind(self._scheduler.plan())
        results, errors = self._run(plan, bound)
        outputs += [self._scheduler.end(name, error) for name, error in errors.items()]
        done = StepPlan(tuple(c for c in plan.chunks if c.request_id not in errors))
        outputs += self._scheduler.commit(done, results)
        new_tokens = sum(len(output.token_ids) for output in outputs)
        return StepOutput(tuple(outputs), self.statistics(plan.num_tokens, new_tokens))

    def warm_up(self) -> None:
        """Have the executor do everything that only the first step takes, before any request."""
        self._executor.warm_up()

    def check_integrity(self) -> None:
        """Check that no block is lost or held by a request that ended (AssertionError)."""
        self._scheduler.check_integrity()

    def check_idle(self) -> None:
        """Check that an engine without work holds no KV blocks (AssertionError).

        It counts them, in constant time; with ``debug_checks`` it checks every block.
        """
        assert not self.has_work
        if self._debug_checks:
            self.check_integrity()
        assert self._pool.num_available == self._pool.num_blocks, "KV blocks were lost"

    def statistics(self, step_tokens: int = 0, new_tokens: int = 0) -> EngineStatistics:
        """The gauges as they stand now, after a step of so many tokens."""
        return EngineStatistics(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_blocks_used=self._pool.num_blocks - self._pool.num_available,
            kv_blocks_total=self._pool.num_blocks,
            step_tokens=step_tokens,
            new_tokens=new_tokens,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            preemptions=self._scheduler.preemptions,
            tables=self._table_counter.take(is_idle=not self.has_work),
            lost_tables=self._table_counter.faults(),
        )

    def _bind(self, plan: StepPlan) -> tuple[StepPlan, Bitmasks, list[TokenOutput]]:
        """Ask the masks what may come; a request whose mask allows nothing, or fails, ends here."""
        bound: Bitmasks = {}
        kept: list[SequenceChunk] = []
        ended: list[TokenOutput] = []
        for chunk in plan.chunks:
            mask, message = self._scheduler.sequence(chunk.request_id).mask, None
            if mask is not None and chunk.samples:
                try:
                    bitmask = row_bitmasks(mask, chunk.drafts, self.limits.vocab_size)
                    if not bitmask[0].any():
                        message = "the token mask allows nothing"
                    bound[chunk.request_id] = bitmask
                except Exception as error:
                    logger.exception("the token mask of %s failed", chunk.request_id)
                    message = f"{type(error).__name__} in the token mask"
            if message is None:
                kept.append(chunk)
            else:
                ended.append(self._scheduler.end(chunk.request_id, message))
        return StepPlan(tuple(kept)), bound, ended

    def _run(
        self, plan: StepPlan, bound: Bitmasks
    ) -> tuple[dict[str, ChunkResult], dict[str, str]]:
        """Run a plan; where that fails, its chunks one by one, so that only the culprit ends."""
        if not plan.chunks:
            return {}, {}
        try:
            result = self._executor.run(self._batcher.batch(plan, bound))
            return chunk_results(plan, result), {}
        except Exception as error:
            if len(plan.chunks) == 1:
                logger.exception("a step of %s failed", plan.chunks[0].request_id)
                return {}, {plan.chunks[0].request_id: f"{type(error).__name__} in the engine"}
            logger.warning("a step failed; its requests run one by one", exc_info=True)
        results: dict[str, ChunkResult] = {}
        errors: dict[str, str] = {}
        for chunk in plan.chunks:
            # keys and values are written again where they were written before
            more, failed = self._run(StepPlan((chunk,)), bound)
            results |= more
            errors |= failed
        return results, errors

    def _propose(self, sequence: Sequence) -> list[int]:
        assert self._drafter is not None
        try:
            drafts = self._drafter.draft(sequence.token_ids, self._num_drafts)
            drafts = [*takewhile(lambda draft: 0 <= draft < self.limits.vocab_size, drafts)]
            drafts = drafts[: self._num_drafts]
            if sequence.mask is not None and drafts:
                drafts = allowed_drafts(sequence.mask, drafts, self.limits.vocab_size)
        except Exception:
            logger.exception("guessing for %s failed; it goes on without", sequence.request_id)
            return []
        return drafts


def _max_model_len(config: EngineConfig, max_positions: int, kv_tokens: int) -> int:
    asked = config.max_model_len
    if asked is None:
        return min(max_positions, kv_tokens)
    if asked > max_positions:
        raise ConfigError(f"max_model_len: {asked} exceeds the model's {max_positions} positions")
    if asked > kv_tokens:
        raise ConfigError(
            f"max_model_len: {asked} exceeds the {kv_tokens} tokens that the KV blocks hold;"
            " raise kv_cache_gib"
        )
    return asked
