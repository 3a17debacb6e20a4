"""Which tokens run next, under one token budget: pure Python over ints, no tensors."""

import itertools
from bisect import insort
from collections.abc import Callable, Mapping

from engine.config import EngineConfig
from engine.request import Request, TokenOutput
from engine.sampling.masks import TokenMask
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.prefix_hash import PrefixHasher
from engine.scheduling.sequence import Ending, Sequence
from engine.scheduling.step_plan import ChunkResult, SequenceChunk, StepPlan

# a request is overtaken by one of a smaller priority that arrives at most so many steps later for
# each level between them; so nobody starves
PRIORITY_STEPS = 1000


class Scheduler:
    """First come, first served within a priority; a sequence waits, runs, may be preempted.

    Running sequences come first in a plan, decodes before prompts; what is left of the budget goes
    to waiting ones. Blocks are taken as tokens come. When there are none the last in the order of
    service gives up its own and is later computed again: so the first always moves on.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        eos_ids: frozenset[int],
        propose: Callable[[Sequence], list[int]] | None = None,
    ) -> None:
        """``propose`` guesses tokens that follow a sequence; see ``engine.scheduling.drafter``."""
        self._config = config
        self._pool = pool
        self._hasher = PrefixHasher(pool.block_size)
        self._eos_ids = eos_ids
        self._propose = propose
        self._waiting: list[Sequence] = []  # in the order of service
        self._running: dict[str, Sequence] = {}
        self._promised: dict[bytes, Sequence] = {}  # blocks that a running prompt will publish
        self._arrivals = itertools.count()
        self._step = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request, seed: int, mask: TokenMask | None = None) -> None:
        """Queue a request whose prompt and longest answer fit in the pool (the caller checked)."""
        turn = (self._step + request.priority * PRIORITY_STEPS, next(self._arrivals))
        insort(self._waiting, Sequence(request, seed, turn, mask), key=_turn)

    def abort(self, request_id: str) -> None:
        """Forget a request, waiting or running; nothing happens where there is none of this id."""
        if request_id in self._running:
            self._leave(self._running[request_id])
        self._waiting = [s for s in self._waiting if s.request_id != request_id]

    def plan(self) -> StepPlan:
        """Choose the next step's chunks, at most ``max_batched_tokens`` tokens together."""
        self._step += 1
        budget = self._config.max_batched_tokens
        preempted_before = self.preemptions
        chunks: list[SequenceChunk] = []
        running = sorted(self._running.values(), key=lambda s: (s.num_uncomputed > 1, s.turn))
        for sequence in running:
            if not budget or sequence.request_id not in self._running:
                continue
            if self._grow(sequence):
                chunks.append(self._chunk(sequence, budget))
                budget -= len(chunks[-1].token_ids)
        # what was just given up is not for newcomers
        newcomers = list(self._waiting) if self.preemptions == preempted_before else []
        for sequence in newcomers:
            if not budget or self.num_running == self._config.max_num_seqs:
                break
            if self._waits_for_another(sequence):
                continue
            if not self._admit(sequence):
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= len(chunks[-1].token_ids)
        if self._propose is not None:
            for index, chunk in enumerate(chunks):
                chunks[index] = self._with_drafts(chunk, budget)
                budget -= chunks[index].num_drafts
        return StepPlan(tuple(chunks))

    def commit(self, plan: StepPlan, results: Mapping[str, ChunkResult]) -> list[TokenOutput]:
        """Record that ``plan`` ran with these results; ended sequences are released."""
        outputs = []
        for chunk in plan.chunks:
            sequence, result = self._running[chunk.request_id], results[chunk.request_id]
            accepted = _accepted(chunk, result.token_ids)
            sequence.num_computed = chunk.end - chunk.num_drafts + accepted
            is_answer = sequence.num_computed >= len(sequence.token_ids)
            sequence.prompt_scores += result.prompt_logprobs
            ending = sequence.append(result.token_ids[: accepted + 1], self._eos_ids)
            if ending.num_taken:
                # guesses after an end were computed for nothing
                sequence.num_computed = min(sequence.num_computed, len(sequence.token_ids) - 1)
            if is_answer and not sequence.request.sampling.max_tokens:
                ending = Ending(0, "length")  # the prompt was to be scored, no more
            self._settle(sequence)
            ending = _accept(sequence, result.token_ids[: ending.num_taken], ending)
            if is_answer:
                outputs.append(_output(sequence, result, ending))
                sequence.scores_are_due, sequence.prompt_scores = False, []
            if ending.reason is not None:
                self._leave(sequence)
        return outputs

    def end(self, request_id: str, error: str) -> TokenOutput:
        """End a running sequence that cannot go on."""
        self._leave(self._running[request_id])
        return TokenOutput(request_id, finish_reason="error", error=error)

    def sequence(self, request_id: str) -> Sequence:
        """The running sequence of this id."""
        return self._running[request_id]

    def check_integrity(self) -> None:
        """Check that blocks and promises are running sequences' alone (AssertionError)."""
        held = [block for sequence in self._running.values() for block in sequence.block_ids]
        self._pool.check_integrity(held)
        assert not any(sequence.block_ids for sequence in self._waiting)
        promising = {id(sequence) for sequence in self._promised.values()}
        assert promising <= {id(sequence) for sequence in self._running.values()}

    def _with_drafts(self, chunk: SequenceChunk, room: int) -> SequenceChunk:
        """Add guesses to a decode, as far as budget and blocks are left over by everyone."""
        sequence = self._running[chunk.request_id]
        left = chunk.sampling.max_tokens - sequence.num_generated - 1
        room = min(room, left)
        if not chunk.samples or len(chunk.token_ids) > 1 or room < 1:
            return chunk
        assert self._propose is not None
        drafts = self._propose(sequence)[:room]
        missing = self._pool.blocks_for(chunk.end + len(drafts)) - len(sequence.block_ids)
        if missing > 0:
            taken = self._pool.take((), missing)
            if taken is None:
                return chunk
            sequence.block_ids += taken
        return chunk._replace(
            token_ids=(*chunk.token_ids, *drafts),
            block_ids=tuple(sequence.block_ids),
            num_drafts=len(drafts),
        )

    def _grow(self, sequence: Sequence) -> bool:
        """Take blocks for all its tokens; False when the sequence itself had to give way."""
        needed = self._pool.blocks_for(len(sequence.token_ids))
        while (missing := needed - len(sequence.block_ids)) > 0:
            taken = self._pool.take((), missing)
            if taken is not None:
                sequence.block_ids += taken
                break
            last = max(self._running.values(), key=_turn)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        insort(self._waiting, sequence, key=_turn)

    def _waits_for_another(self, sequence: Sequence) -> bool:
        """Whether a running prompt will soon publish the next block that this one needs."""
        hashes = self._usable_hashes(sequence)
        found = len(self._pool.find(hashes))
        return found < len(hashes) and hashes[found] in self._promised

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence among the running, with blocks for all its tokens; or not."""
        hashes = self._usable_hashes(sequence)
        shared = self._pool.find(hashes)
        needed = self._pool.blocks_for(len(sequence.token_ids)) - len(shared)
        taken = self._pool.take(shared, needed)
        if taken is None:
            return False
        self._waiting.remove(sequence)
        self._running[sequence.request_id] = sequence
        sequence.block_ids = shared + taken
        sequence.num_computed = len(shared) * self._pool.block_size
        sequence.num_published = len(shared)
        self._promised |= {h: sequence for h in hashes[len(shared) :] if h not in self._promised}
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.prompt_length
            self.prefix_hits += sequence.num_cached
        return True

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        # the last token must run for its logits, and all of them where all are scored
        if sequence.scores_are_due:
            return []
        self._hasher.extend(sequence.hashes, sequence.token_ids, sequence.request.cache_salt)
        return sequence.hashes[: (len(sequence.token_ids) - 1) // self._pool.block_size]

    def _chunk(self, sequence: Sequence, budget: int) -> SequenceChunk:
        start = sequence.num_computed
        end = start + min(sequence.num_uncomputed, budget)
        request, tokens = sequence.request, sequence.token_ids
        scores = request.prompt_ids[start + 1 : end + 1] if sequence.scores_are_due else ()
        return SequenceChunk(
            request_id=request.request_id,
            token_ids=tuple(tokens[start:end]),
            start=start,
            block_ids=tuple(sequence.block_ids[: self._pool.blocks_for(end)]),
            sampling=request.sampling,
            seed=sequence.seed,
            samples=end == len(tokens) and request.sampling.max_tokens > 0,
            scores=scores,
            history=tokens if request.sampling.needs_history else (),
            prompt_length=sequence.prompt_length,
        )

    def _settle(self, sequence: Sequence) -> None:
        """Publish blocks that are now full, and give back those that only guesses needed."""
        needed = self._pool.blocks_for(len(sequence.token_ids))
        if needed < len(sequence.block_ids):
            self._pool.release(sequence.block_ids[needed:])
            del sequence.block_ids[needed:]
        full = sequence.num_computed // self._pool.block_size
        if full == sequence.num_published:
            return
        self._hasher.extend(sequence.hashes, sequence.token_ids, sequence.request.cache_salt)
        for index in range(sequence.num_published, full):
            self._pool.publish(sequence.block_ids[index], sequence.hashes[index])
            self._break_promise(sequence, sequence.hashes[index])
        sequence.num_published = full

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence from the running; its blocks go back, its tokens stay."""
        del self._running[sequence.request_id]
        for prefix_hash in sequence.hashes[sequence.num_published :]:
            self._break_promise(sequence, prefix_hash)
        self._pool.release(sequence.block_ids)
        sequence.block_ids, sequence.num_computed, sequence.num_published = [], 0, 0
        sequence.prompt_scores = []

    def _break_promise(self, sequence: Sequence, prefix_hash: bytes) -> None:
        if self._promised.get(prefix_hash) is sequence:
            del self._promised[prefix_hash]


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn


def _accepted(chunk: SequenceChunk, chosen: tuple[int, ...]) -> int:
    """How many guesses are what was chosen in their place."""
    if not chunk.num_drafts:
        return 0
    pairs = zip(chunk.drafts, chosen, strict=False)
    return next((i for i, (draft, token) in enumerate(pairs) if draft != token), chunk.num_drafts)


def _accept(sequence: Sequence, token_ids: tuple[int, ...], ending: Ending) -> Ending:
    """Let the sequence's mask follow; one that fails ends its sequence and no other."""
    if sequence.mask is None:
        return ending
    try:
        sequence.mask.accept(token_ids)
    except Exception as error:
        return Ending(ending.num_taken, "error", error=f"{type(error).__name__} in the token mask")
    return ending


def _output(sequence: Sequence, result: ChunkResult, ending: Ending) -> TokenOutput:
    return TokenOutput(
        request_id=sequence.request_id,
        token_ids=result.token_ids[: ending.num_taken],
        finish_reason=ending.reason,
        stop_token_id=ending.stop_token_id,
        error=ending.error,
        logprobs=result.logprobs[: ending.num_taken],
        prompt_logprobs=tuple(sequence.prompt_scores),
        cached_tokens=sequence.num_cached or 0,
    )
