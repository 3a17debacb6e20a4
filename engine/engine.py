"""The engine: requests in, tokens out, one step at a time. It knows no text and no processes."""

import logging
import secrets
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from engine.chunk_result import ChunkResult
from engine.config import ConfigError, EngineConfig
from engine.drafter import Drafter
from engine.kv_blocks import BlockPool
from engine.masking import allowed_drafts, chunk_bitmask, plan_bitmask
from engine.model.transformer import Transformer
from engine.progress import Progress
from engine.request import EngineStatistics, Request, RequestLimits, StepOutput, TokenOutput
from engine.runner import Runner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step_plan import SequenceChunk, StepPlan
from engine.table_counts import TableCounter
from engine.token_mask import TokenMask

Bound = dict[str, NDArray[np.uint32]]
logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        eos_ids: frozenset[int] = frozenset(),
        drafter: Drafter | None = None,
        num_drafts: int = 0,
    ) -> None:
        """Reserve KV blocks for the model; a sequence ends on any of ``eos_ids``.

        ``drafter`` guesses up to ``num_drafts`` tokens ahead of each decoding sequence.

        Raises:
            ConfigError: ``max_model_len`` exceeds what the model or the KV memory takes.
        """
        model_config = model.config
        itemsize = model.model.embed_tokens.weight.dtype.itemsize
        kv_bytes_per_token = model_config.kv_bytes_per_token(itemsize)
        num_blocks = config.num_kv_blocks(kv_bytes_per_token, model_config.max_positions)
        kv_gib = num_blocks * config.block_size * kv_bytes_per_token / 2**30
        self.limits = RequestLimits(
            vocab_size=model_config.vocab_size,
            max_model_len=_max_model_len(
                config, model_config.max_positions, num_blocks * config.block_size, kv_gib
            ),
            eos_ids=eos_ids,
        )
        self.progress = Progress()
        self._drafter = drafter
        self._num_drafts = num_drafts
        try:
            self._runner = Runner(model, num_blocks, config.block_size, eos_ids, self.progress)
        except (OSError, OverflowError):
            message = f"kv_cache_gib: this machine has not {kv_gib:.3g} GiB to give"
            raise ConfigError(message) from None
        self._table_counter = TableCounter(model)
        self._pool = BlockPool(num_blocks, config.block_size)
        propose = self._propose if drafter is not None else None
        self._scheduler = Scheduler(config, self._pool, eos_ids, propose)

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
        """Run one token through the model, before any request.

        So whatever the first step takes once, mapped weights to be read above all, is not taken
        for a hanging one.
        """
        greedy = SamplingParams(max_tokens=1, temperature=0)
        self._runner.run(StepPlan((SequenceChunk("", (0,), 0, (0,), greedy, 0, samples=True),)))

    def check_integrity(self) -> None:
        """Check that no block is lost or held by a request that ended (AssertionError)."""
        self._scheduler.check_integrity()

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
        )

    def _bind(self, plan: StepPlan) -> tuple[StepPlan, Bound, list[TokenOutput]]:
        """Ask the masks what may come; a request whose mask allows nothing, or fails, ends here."""
        bound: Bound = {}
        kept: list[SequenceChunk] = []
        ended: list[TokenOutput] = []
        for chunk in plan.chunks:
            mask, message = self._scheduler.sequence(chunk.request_id).mask, None
            if mask is not None and chunk.samples:
                try:
                    bitmask = chunk_bitmask(chunk, mask, self.limits.vocab_size)
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

    def _run(self, plan: StepPlan, bound: Bound) -> tuple[dict[str, ChunkResult], dict[str, str]]:
        """Run a plan; where that fails, its chunks one by one, so that only the culprit ends."""
        if not plan.chunks:
            return {}, {}
        try:
            bitmask = plan_bitmask(plan.chunks, bound, self.limits.vocab_size)
            return self._runner.run(plan, bitmask), {}
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


def _max_model_len(config: EngineConfig, max_positions: int, kv_tokens: int, kv_gib: float) -> int:
    asked = config.max_model_len
    if asked is None:
        return min(max_positions, kv_tokens)
    if asked > max_positions:
        raise ConfigError(f"max_model_len: {asked} exceeds the model's {max_positions} positions")
    if asked > kv_tokens:
        raise ConfigError(
            f"max_model_len: {asked} exceeds the {kv_tokens} tokens that kv_cache_gib"
            f" {kv_gib:.3g} holds"
        )
    return asked
