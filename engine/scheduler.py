"""Which tokens run next, under one token budget: pure Python over ints, no tensors."""

from collections import deque
from collections.abc import Mapping

from engine.config import EngineConfig
from engine.kv_blocks import BlockPool
from engine.request import FinishReason, Request, TokenOutput
from engine.sequence import Sequence
from engine.step_plan import SequenceChunk, StepPlan


class Scheduler:
    """First come, first served. A sequence waits, then runs until it ends or is aborted.

    Running sequences come first in a plan, decodes before prompts; what is left of the budget goes
    to waiting ones. A sequence is admitted with blocks for its prompt and longest answer, so one
    that runs never lacks a block.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, eos_ids: frozenset[int]) -> None:
        self._config = config
        self._pool = pool
        self._eos_ids = eos_ids
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request, seed: int) -> None:
        """Queue a request whose prompt and longest answer fit in the pool (the caller checked)."""
        self._waiting.append(Sequence(request, seed))

    def abort(self, request_id: str) -> None:
        """Forget a request, waiting or running; nothing happens where there is none of this id."""
        if request_id in self._running:
            self._release(request_id)
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)

    def plan(self) -> StepPlan:
        """Choose the next step's chunks, at most ``max_batched_tokens`` tokens together."""
        budget = self._config.max_batched_tokens
        chunks: list[SequenceChunk] = []
        running = sorted(self._running.values(), key=lambda sequence: sequence.num_uncomputed > 1)
        for sequence in running:
            if budget == 0:
                break
            chunks.append(self._next_chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        while budget and self._waiting and self.num_running < self._config.max_num_seqs:
            sequence = self._waiting[0]
            block_ids = self._pool.allocate(self._pool.blocks_for(sequence.max_length))
            if block_ids is None:
                break
            self._waiting.popleft()
            sequence.block_ids = block_ids
            self._running[sequence.request.request_id] = sequence
            chunks.append(self._next_chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        return StepPlan(tuple(chunks))

    def commit(self, plan: StepPlan, sampled: Mapping[str, int]) -> list[TokenOutput]:
        """Record that ``plan`` ran and that ``sampled`` follows; ended sequences are released."""
        outputs = []
        for chunk in plan.chunks:
            sequence = self._running[chunk.request_id]
            sequence.num_computed = chunk.end
            if chunk.sampling is None:
                continue
            token_id = sampled[chunk.request_id]
            sequence.token_ids.append(token_id)
            reason, stop_token_id = self._finish_reason(sequence, token_id)
            outputs.append(TokenOutput(chunk.request_id, (token_id,), reason, stop_token_id))
            if reason is not None:
                self._release(chunk.request_id)
        return outputs

    def fail(self, plan: StepPlan, error: str) -> list[TokenOutput]:
        """End every sequence of a plan that could not be run."""
        for chunk in plan.chunks:
            self._release(chunk.request_id)
        return [
            TokenOutput(chunk.request_id, finish_reason="error", error=error)
            for chunk in plan.chunks
        ]

    def check_integrity(self) -> None:
        """Check that blocks are held by running sequences alone (AssertionError otherwise)."""
        self._pool.check_integrity(
            block for sequence in self._running.values() for block in sequence.block_ids
        )

    def _finish_reason(
        self, sequence: Sequence, token_id: int
    ) -> tuple[FinishReason | None, int | None]:
        sampling = sequence.request.sampling
        is_eos = token_id in self._eos_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return "stop", token_id
        return ("length" if sequence.num_generated == sampling.max_tokens else None), None

    def _release(self, request_id: str) -> None:
        self._pool.release(self._running.pop(request_id).block_ids)

    def _next_chunk(self, sequence: Sequence, budget: int) -> SequenceChunk:
        start = sequence.num_computed
        end = start + min(sequence.num_uncomputed, budget)
        request = sequence.request
        return SequenceChunk(
            request_id=request.request_id,
            token_ids=tuple(sequence.token_ids[start:end]),
            start=start,
            block_ids=tuple(sequence.block_ids[: self._pool.blocks_for(end)]),
            sampling=request.sampling if end == len(sequence.token_ids) else None,
            seed=sequence.seed,
        )
