"""The engine: runs requests step by step and returns their tokens; no text, no processes."""

import logging
import secrets
from collections import deque
from collections.abc import Callable
from pathlib import Path

from engine.compiling_requests import CompilingRequests
from engine.config import EngineConfig
from engine.errors import ConfigError, PatchRefusedError, RequestError
from engine.executors.batch import DeviceLostError, LaunchedStep
from engine.executors.executor import Executor
from engine.loaded_patches import LoadedPatches, PatchSource
from engine.model.row_patches import PatchSet
from engine.progress import Progress
from engine.request import (
    EngineStatistics,
    PatchSummary,
    Request,
    RequestLimits,
    StepOutput,
    TableReport,
    TokenOutput,
    refused_output,
)
from engine.sampling.masks import Grammars, TokenMask
from engine.sampling.step_bitmasks import SampledRows, StepBitmasks
from engine.scheduling.batching import Batcher, results_by_request
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import DRAFTERS, Speculation
from engine.scheduling.step_plan import Drafter, StepPlan
from engine.table_counts import TableCounter
from engine.table_report import table_report

# seconds that a step waits if it has nothing to run but grammars are being compiled
_COMPILING_S = 0.005
# at most the executor's ``balance_rows`` if rows of value tables are fetched: each token fetches
# rows for itself, which takes a good part of a step
_FETCHING_BALANCE_ROWS = 2
logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one executor.

    One thread calls it, except ``load_patch`` and ``unload_patch``, which one other thread may
    call, and ``memory_report``.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        eos_ids: frozenset[int] = frozenset(),
        make_drafter: Callable[[], Drafter] | None = None,
        grammars: Grammars | None = None,
        patch_source: PatchSource | None = None,
    ) -> None:
        """Schedule for an executor that was made with ``config``.

        A sequence ends on any of ``eos_ids``. ``make_drafter`` makes each sequence's drafter, by
        default the one that ``config.speculate`` names. ``grammars`` compiles the grammars of
        requests, and ``patch_source`` reads row patches. ConfigError if ``max_model_len`` exceeds
        the model's positions or the KV memory.
        """
        model, num_blocks = executor.config, executor.num_blocks
        max_model_len = _max_model_len(config, model.max_positions, num_blocks * config.block_size)
        has_memory = bool(model.memory_layers)
        self.limits = RequestLimits(model.vocab_size, max_model_len, eos_ids, has_memory)
        self._executor = executor
        self._table_counter = TableCounter(executor.tables)
        grammars = grammars or Grammars()
        self._compiling = CompilingRequests(grammars)
        self._bitmasks = StepBitmasks(model.vocab_size, grammars)
        self._max_patches = config.max_patches
        self.patches = LoadedPatches(config, patch_source, executor.device)
        self._batcher = Batcher(config.block_size, eos_ids)
        self._pool = BlockPool(num_blocks, config.block_size)
        self._debug_checks = config.debug_checks
        self._speculation = _speculation(executor, config, make_drafter)
        self._scheduler = Scheduler(config, self._pool, eos_ids, self._speculation)
        self._in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()  # oldest first

    @property
    def progress(self) -> Progress:
        """The executor's progress, marked by every piece of work."""
        return self._executor.progress

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or a step in flight."""
        return self._can_step or bool(self._compiling)

    def add(self, request: Request, mask: TokenMask | None = None) -> None:
        """Queue a request for later steps; RequestError if it exceeds the model's limits.

        ``mask`` is by default made from the request's grammar, in the background.
        """
        self.limits.check(request.prompt_ids, request.sampling)
        if request.patches and (reason := self._patches_refused()):
            raise RequestError("memory_patches", reason)
        patches = self.patches.lease(request.patches)
        if request.grammar is not None and mask is None:
            self._compiling.add(request, patches)
        else:
            self._schedule(request, mask, patches)

    def abort(self, request_id: str) -> None:
        """Cancel a request and free its blocks; do nothing if it has ended already."""
        self._compiling.abort(request_id)
        self._scheduler.abort(request_id)

    def load_patch(self, folder: Path, content_hash: str | None = None) -> PatchSummary:
        """As ``LoadedPatches.load``. One other thread may call it while steps run."""
        if reason := self._patches_refused():
            raise PatchRefusedError(reason)
        return self.patches.load(folder, content_hash)

    def unload_patch(self, content_hash: str) -> None:
        """Refuse a patch to new requests. Another thread may call it while steps run."""
        self.patches.remove(content_hash)

    def step(self) -> StepOutput:
        """Launch one step, and settle the oldest in flight if no more may be; see ``Executor``.

        A request that fails ends with an error; the others continue.

        Raises:
            DeviceLostError: the device failed, and with it this engine.
        """
        settled = self._schedule_compiled()
        plan = self._scheduler.plan()
        self._scheduler.begin(plan)
        settled += self._launch(plan) if plan.chunks else []
        ahead = self._executor.steps_ahead if plan.chunks else 0
        while len(self._in_flight) > ahead:
            settled += self._settle_oldest()
        new_tokens = sum(len(output.token_ids) for output in settled)
        return StepOutput(tuple(settled), self.statistics(plan.num_tokens, new_tokens))

    def warm_up(self) -> None:
        """Let the executor do the extra work of a first step, before any request."""
        self._executor.warm_up()

    def close(self) -> None:
        """End processes that the executor started, if any; call nothing afterwards."""
        self._executor.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is lost or held by a request that ended."""
        self._scheduler.check_integrity()

    def check_idle(self) -> None:
        """Raise AssertionError if an engine without work holds KV blocks.

        It only counts them, unless ``debug_checks`` is set: then it checks every block.
        """
        assert not self.has_work
        if self._debug_checks:
            self.check_integrity()
        assert self._pool.num_available == self._pool.num_blocks, "KV blocks were lost"

    def memory_report(self) -> tuple[TableReport, ...]:
        """The value tables and the reads of their rows. Another thread may call it."""
        executor = self._executor
        return tuple(
            table_report(name, table, executor.config, executor.recorder.usage.get(name))
            for name, table in executor.tables.items()
        )

    def statistics(self, step_tokens: int = 0, new_tokens: int = 0) -> EngineStatistics:
        """The current gauges, after a step that ran and generated these numbers of tokens."""
        speculation = self._speculation
        tables = self._table_counter.take(is_idle=not self.has_work)
        return EngineStatistics(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._compiling),
            kv_blocks_used=self._pool.num_blocks - self._pool.num_available,
            kv_blocks_total=self._pool.num_blocks,
            step_tokens=step_tokens,
            new_tokens=new_tokens,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            preemptions=self._scheduler.preemptions,
            drafts=speculation.drafts if speculation else 0,
            draft_tokens=speculation.draft_tokens if speculation else 0,
            accepted_tokens=speculation.accepted_tokens if speculation else 0,
            tables=tables,
            patches=() if tables is None else self.patches.take_counts(),
            lost_tables=self._table_counter.faults(),
        )

    def _patches_refused(self) -> str | None:
        """The reason why no row patches can be used; None if they can."""
        if not self._max_patches:
            return "row patches are disabled (--max-patches 0)"
        return self._executor.config.patch_refusal

    @property
    def _can_step(self) -> bool:
        """Whether any request is scheduled, or a step in flight."""
        return self._scheduler.has_work or bool(self._in_flight)

    def _schedule(self, request: Request, mask: TokenMask | None, patches: PatchSet) -> None:
        seed = request.sampling.seed
        seed = secrets.randbits(63) if seed is None else seed
        self._scheduler.add(request, seed, mask, patches)

    def _schedule_compiled(self) -> list[TokenOutput]:
        """Schedule the requests whose grammars are compiled; returns the outputs of the others."""
        refused = []
        timeout_s = 0.0 if self._can_step else _COMPILING_S
        for request, patches, result in self._compiling.take(timeout_s):
            if isinstance(result, RequestError):
                refused.append(refused_output(request.request_id, result))
            else:
                self._schedule(request, result, patches)
        return refused

    def _launch(self, plan: StepPlan) -> list[TokenOutput]:
        """Launch a plan; if that fails, run its chunks one by one, so that only the failing one
        ends. Returns the outputs of steps that had to be settled for this."""
        try:
            batch = self._batcher.batch(plan, self._bitmasks.start(self._sampled_rows(plan)))
            launched = self._executor.launch(batch)
            self._in_flight.append((plan, launched))
            return []
        except DeviceLostError:
            raise
        except Exception as error:
            if len(plan.chunks) == 1:
                (chunk,) = plan.chunks
                logger.exception("a step of %s failed", chunk.request_id)
                return [self._scheduler.end(chunk, f"{type(error).__name__} in the engine")]
            logger.warning("a step failed; its requests run one by one", exc_info=True)
        outputs: list[TokenOutput] = []
        for chunk in plan.chunks:
            while self._in_flight:
                outputs += self._settle_oldest()
            # rewriting the same keys and values does no harm
            settled = self._scheduler.settled(chunk)
            if settled is not None:
                outputs += self._launch(StepPlan((settled,)))
        return outputs

    def _sampled_rows(self, plan: StepPlan) -> list[SampledRows]:
        """The rows of a plan that runs next, with the masks that apply to them."""
        parts = []
        for chunk in plan.chunks:
            sequence = self._scheduler.running(chunk)
            mask = sequence.mask if sequence is not None and chunk.samples else None
            parts.append(SampledRows(chunk.num_sampled, mask, chunk.drafts))
        return parts

    def _settle_oldest(self) -> list[TokenOutput]:
        """Wait for the oldest step in flight and commit its results."""
        plan, launched = self._in_flight.popleft()
        outputs = self._scheduler.commit(plan, results_by_request(plan, launched.wait()))
        if self._speculation is not None:
            self._speculation.count(outputs)
        return outputs


def _speculation(
    executor: Executor, config: EngineConfig, make_drafter: Callable[[], Drafter] | None
) -> Speculation | None:
    make_drafter = make_drafter or DRAFTERS[config.speculate]
    if make_drafter is None:
        return None
    balance_rows = executor.balance_rows
    if any(table.fetched_capacity is not None for table in executor.tables.values()):
        balance_rows = min(balance_rows, _FETCHING_BALANCE_ROWS)
    return Speculation(make_drafter, config.num_drafts, balance_rows, executor.config.vocab_size)


def _max_model_len(config: EngineConfig, max_positions: int, kv_tokens: int) -> int:
    asked = config.max_model_len
    if asked is None:
        return min(max_positions, kv_tokens)
    if asked > max_positions:
        most = f"{max_positions} positions (max_position_embeddings, or a smaller sliding_window)"
        raise ConfigError(f"max_model_len: {asked} exceeds the model's {most}")
    if asked > kv_tokens:
        message = f"max_model_len: {asked} exceeds the {kv_tokens} tokens of the KV blocks"
        raise ConfigError(f"{message}; raise kv_cache_gib")
    return asked
