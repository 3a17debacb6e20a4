"""Schedules the tokens of each step under one token budget; pure Python, no tensors."""

import itertools
from collections.abc import Mapping

from engine.config import EngineConfig
from engine.model.row_patches import PatchSet
from engine.request import Request, TokenOutput
from engine.sampling.masks import TokenMask
from engine.scheduling.chunk_results import output, take_result
from engine.scheduling.kv_blocks import BlockPool, PrefixHasher
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculation import Speculation
from engine.scheduling.step_plan import PENDING, ChunkResult, SequenceChunk, StepPlan
from engine.scheduling.waiting_queue import WaitingQueue

# per level of priority, a request overtakes those that arrived at most this many steps before it,
# so no request starves
PRIORITY_STEPS = 1000


class Scheduler:
    """First come, first served within a priority; running sequences may be preempted.

    A plan has running sequences first, decodes before prompts; waiting ones get the rest of the
    budget. Sequences take blocks as they grow. If no block is left, the sequence that is last in
    the order of service is preempted and recomputed later, so the first always advances.

    Steps may overlap: ``begin`` advances the sequences of a plan, so that the next plan continues
    after it, and ``commit`` settles it when its results are known. Blocks and seats of a sequence
    that ends are free at once, even if a later step in flight still writes to them, because the
    device runs steps in order.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        eos_ids: frozenset[int],
        speculation: Speculation | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._hasher = PrefixHasher(pool.block_size)
        self._eos_ids = eos_ids
        self._speculation = speculation
        self._waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}
        self._promised: dict[bytes, Sequence] = {}  # blocks that a running prompt will publish
        self._free_seats = list(reversed(range(config.max_num_seqs)))
        self._arrivals = itertools.count()
        self._step = 0
        self.prefix_queries = self.prefix_hits = self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(len(self._waiting) or self._running)

    def add(
        self, request: Request, seed: int, mask: TokenMask | None = None, patches: PatchSet = ()
    ) -> None:
        """Queue a request; the caller has checked that prompt and longest answer fit the pool.

        ``patches`` are those of the request; it keeps them until it ends.
        """
        turn = (self._step + request.priority * PRIORITY_STEPS, next(self._arrivals))
        self._waiting.add(Sequence(request, seed, turn, mask, patches))

    def abort(self, request_id: str) -> None:
        """Cancel a waiting or running request; do nothing if none has this id."""
        if request_id in self._running:
            self._leave(self._running[request_id])
        self._waiting.remove(request_id)

    def plan(self) -> StepPlan:
        """Choose the next step's chunks, at most ``max_batched_tokens`` tokens in total.

        It is empty if nothing can run before the steps in flight are settled.
        """
        self._step += 1
        budget = self._config.max_batched_tokens
        preempted_before = self.preemptions
        chunks: list[SequenceChunk] = []
        running = sorted(self._running.values(), key=lambda s: (s.num_uncomputed > 1, s.turn))
        for sequence in running:
            is_preempted = sequence.request_id not in self._running
            if not budget or is_preempted or not self._can_run(sequence):
                continue
            if self._grow(sequence):
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
            elif sequence.request_id in self._running:
                return StepPlan(())
        # blocks of preempted sequences are for the running ones
        for sequence in self._waiting if self.preemptions == preempted_before else ():
            if not budget or self.num_running == self._config.max_num_seqs:
                break
            if self._waits_for_another(sequence):
                continue
            if not self._admit(sequence):
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        if self._speculation is not None:
            self._speculation.weigh(chunks)
            for index, chunk in enumerate(chunks):
                chunks[index] = self._with_drafts(chunk, budget)
                budget -= chunks[index].num_drafts
        return StepPlan(tuple(chunks))

    def begin(self, plan: StepPlan) -> None:
        """Record that ``plan`` is in flight: the next plan continues after it."""
        for chunk in plan.chunks:
            sequence = self._running[chunk.request_id]
            sequence.num_in_flight += 1
            sequence.num_computed = chunk.end - chunk.num_drafts
            sequence.num_pending += chunk.samples
            sequence.has_drafts_in_flight = chunk.num_drafts > 0

    def commit(self, plan: StepPlan, results: Mapping[str, ChunkResult]) -> list[TokenOutput]:
        """Settle a plan that has run, the oldest in flight; ended sequences are released."""
        outputs = []
        for chunk in plan.chunks:
            sequence = self.running(chunk)
            if sequence is None:
                continue  # an earlier step or an abort ended it while this step was in flight
            result = results[chunk.request_id]
            ending = take_result(sequence, chunk, result, self._eos_ids)
            self._settle(sequence, chunk.end)
            if chunk.samples or chunk.is_scored or ending.reason is not None:
                outputs.append(output(sequence, chunk, result, ending))
                sequence.scores_are_due, sequence.prompt_scores = False, []
            if ending.reason is not None:
                self._leave(sequence)
        return outputs

    def end(self, chunk: SequenceChunk, error: str) -> TokenOutput:
        """End a chunk's sequence, which runs, with an error."""
        self._leave(self._running[chunk.request_id])
        return TokenOutput(chunk.request_id, finish_reason="error", error=error)

    def running(self, chunk: SequenceChunk) -> Sequence | None:
        """A chunk's sequence; None if it has ended since, even if a new request reuses its id."""
        sequence = self._running.get(chunk.request_id)
        return sequence if sequence is not None and sequence.turn == chunk.turn else None

    def settled(self, chunk: SequenceChunk) -> SequenceChunk | None:
        """The chunk without pending tokens, after all steps before it; None if it has ended."""
        sequence = self.running(chunk)
        if sequence is None:
            return None
        known = tuple(sequence.token_ids[chunk.start : chunk.end - chunk.num_drafts])
        return chunk._replace(token_ids=known + chunk.drafts)

    def check_integrity(self) -> None:
        """Raise AssertionError unless only running sequences hold blocks and promises."""
        held = [block for sequence in self._running.values() for block in sequence.block_ids]
        self._pool.check_integrity(held)
        assert not any(sequence.block_ids for sequence in self._waiting)
        promising = {id(sequence) for sequence in self._promised.values()}
        assert promising <= {id(sequence) for sequence in self._running.values()}

    def _with_drafts(self, chunk: SequenceChunk, budget: int) -> SequenceChunk:
        """Add drafts to a decode of a known token, within the budget and the free blocks."""
        sequence = self._running[chunk.request_id]
        if not chunk.samples or len(chunk.token_ids) > 1 or sequence.num_pending:
            return chunk
        most = min(budget, chunk.sampling.max_tokens - sequence.num_generated - 1)
        assert self._speculation is not None
        drafts = self._speculation.propose(sequence, most)
        if not drafts or not self._take_blocks(sequence, chunk.end + len(drafts)):
            return chunk
        ids, blocks = (*chunk.token_ids, *drafts), sequence.block_ids
        return chunk._replace(token_ids=ids, block_ids=blocks, num_drafts=len(drafts))

    def _can_run(self, sequence: Sequence) -> bool:
        speculation = self._speculation
        return sequence.can_run and not (speculation and speculation.must_wait(sequence))

    def _grow(self, sequence: Sequence) -> bool:
        """Take blocks for all its tokens; return whether there are enough.

        If not, the sequence itself was preempted, or the one to preempt has a step in flight.
        """
        while not self._take_blocks(sequence, sequence.length):
            last = max(self._running.values(), key=lambda one: one.turn)
            if last.num_in_flight:
                return False
            self.preemptions += 1
            self._leave(last)
            self._waiting.add(last)
            if last is sequence:
                return False
        return True

    def _take_blocks(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take the blocks that it lacks for this many tokens; False if the pool has too few."""
        missing = self._pool.blocks_for(num_tokens) - len(sequence.block_ids)
        if missing <= 0:
            return True
        taken = self._pool.take((), missing)
        sequence.block_ids += tuple(taken or ())
        return taken is not None

    def _waits_for_another(self, sequence: Sequence) -> bool:
        """Whether a running prompt will publish the next block that this sequence needs."""
        hashes = self._usable_hashes(sequence)
        found = len(self._pool.find(hashes))
        return found < len(hashes) and hashes[found] in self._promised

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence if there are blocks for all its tokens; return whether."""
        hashes = self._usable_hashes(sequence)
        shared = self._pool.find(hashes)
        needed = self._pool.blocks_for(len(sequence.token_ids)) - len(shared)
        taken = self._pool.take(shared, needed)
        if taken is None:
            return False
        self._waiting.remove(sequence.request_id)
        self._running[sequence.request_id] = sequence
        sequence.seat = self._free_seats.pop()
        sequence.block_ids = (*shared, *taken)
        sequence.num_computed = len(shared) * self._pool.block_size
        sequence.num_published = len(shared)
        self._promised |= {h: sequence for h in hashes[len(shared) :] if h not in self._promised}
        if sequence.num_cached is None:
            sequence.start()
            self.prefix_queries += sequence.prompt_length
            self.prefix_hits += sequence.num_computed
        return True

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        # the last token must run for its logits; all tokens must if the prompt is scored
        if sequence.scores_are_due:
            return []
        self._hasher.extend(sequence.hashes, sequence.token_ids, sequence.request.prefix_salt)
        return sequence.hashes[: (len(sequence.token_ids) - 1) // self._pool.block_size]

    def _chunk(self, sequence: Sequence, budget: int) -> SequenceChunk:
        request, tokens, start = sequence.request, sequence.token_ids, sequence.num_computed
        end = start + min(sequence.num_uncomputed, budget)
        known = tuple(tokens[start:end])
        return SequenceChunk(
            request_id=request.request_id,
            turn=sequence.turn,
            seat=sequence.seat,
            token_ids=known + (PENDING,) * (end - start - len(known)),
            start=start,
            block_ids=sequence.block_ids[: self._pool.blocks_for(end)],
            sampling=request.sampling,
            seed=sequence.seed,
            samples=end == sequence.length and request.sampling.max_tokens > 0,
            scores=request.prompt_ids[start + 1 : end + 1] if sequence.scores_are_due else (),
            history=tokens if request.sampling.needs_history else (),
            prompt_length=sequence.prompt_length,
            patches=sequence.patches,
        )

    def _settle(self, sequence: Sequence, num_run: int) -> None:
        """Publish the blocks that are now full, and release those that only drafts needed.

        Steps in flight may compute more than the first ``num_run`` tokens, and drafts; or fail.
        """
        needed = self._pool.blocks_for(sequence.length)
        if needed < len(sequence.block_ids) and not sequence.has_drafts_in_flight:
            self._pool.release(sequence.block_ids[needed:])
            sequence.block_ids = sequence.block_ids[:needed]
        num_known = min(sequence.num_computed, len(sequence.token_ids), num_run)
        full = num_known // self._pool.block_size
        if full == sequence.num_published:
            return
        self._hasher.extend(sequence.hashes, sequence.token_ids, sequence.request.prefix_salt)
        for index in range(sequence.num_published, full):
            self._pool.publish(sequence.block_ids[index], sequence.hashes[index])
            self._break_promise(sequence, sequence.hashes[index])
        sequence.num_published = full

    def _leave(self, sequence: Sequence) -> None:
        """Remove a sequence from the running ones and release its blocks; it keeps its tokens."""
        del self._running[sequence.request_id]
        for prefix_hash in sequence.hashes[sequence.num_published :]:
            self._break_promise(sequence, prefix_hash)
        self._pool.release(sequence.block_ids)
        self._free_seats.append(sequence.seat)
        sequence.seat, sequence.num_in_flight, sequence.num_pending = -1, 0, 0
        sequence.has_drafts_in_flight, sequence.drafter = False, None
        sequence.block_ids, sequence.num_computed, sequence.num_published = (), 0, 0
        sequence.prompt_scores = []

    def _break_promise(self, sequence: Sequence, prefix_hash: bytes) -> None:
        if self._promised.get(prefix_hash) is sequence:
            del self._promised[prefix_hash]
