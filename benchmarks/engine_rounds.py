"""Runs prefill and decode rounds on an in-process engine and times each step."""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.offline_load import OfflineLoad
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.step_work import Chunk
from engine.request import Request, StepOutput
from engine.sampling.params import SamplingParams


@dataclass(frozen=True)
class TimedStep:
    """One engine step: its seconds, the tokens that it ran, the number of logits rows."""

    seconds: float
    chunks: tuple[Chunk, ...]
    num_logits: int


class EngineRounds:
    """Runs an idle engine on random prompts, so that no prefix is cached."""

    def __init__(self, engine: Engine, config: EngineConfig, seed: int = 0) -> None:
        """``config`` is the engine's own configuration."""
        self._engine = engine
        self._config = config
        self._rng = random.Random(seed)
        self._names = (f"round-{number}" for number in itertools.count())

    def check(self, load: OfflineLoad) -> None:
        """Check that the engine can run the whole load.

        Raises:
            ConfigError: the load exceeds a limit of the engine.
        """
        most = self._engine.limits.max_model_len
        for length in load.prompt_lengths:
            if length >= most:
                raise ConfigError(f"prompt_lengths: {length} is not below max_model_len {most}")
        for batch in load.batches:
            if batch > self._config.max_num_seqs:
                most_batch = self._config.max_num_seqs
                raise ConfigError(f"batches: {batch} is more than max_num_seqs {most_batch}")
            length = load.input_len + load.output_len + self._untimed_steps(batch, load.input_len)
            if length > most:
                raise ConfigError(
                    f"output_len: a batch of {batch} takes up to {length} tokens per sequence, more"
                    f" than max_model_len {most}"
                )
            blocks = batch * -(-length // self._config.block_size)
            total = self._engine.statistics().kv_blocks_total
            if blocks > total:
                raise ConfigError(
                    f"kv_cache_gib: a batch of {batch} takes up to {blocks} KV blocks, more than"
                    f" the {total} available"
                )

    def warm_prefill(self, length: int) -> list[TimedStep]:
        """``prefill`` after an untimed prompt of up to one block, as ``decode`` has untimed steps.

        What ran since the last round may have emptied the caches.
        """
        self._add(min(length, self._config.block_size), 1)
        while self._engine.has_work:
            self._step()
        return self.prefill(length)

    def prefill(self, length: int) -> list[TimedStep]:
        """Run one prompt until its first token; returns all its steps."""
        self._add(length, 1)
        steps: list[TimedStep] = []
        done = 0
        while self._engine.has_work:
            seconds, output = self._step()
            chunk = Chunk(done, output.statistics.step_tokens)
            if not chunk.count:  # it only waited for the step in flight
                steps[-1] = replace(steps[-1], seconds=steps[-1].seconds + seconds)
                continue
            done = chunk.end
            steps.append(TimedStep(seconds, (chunk,), int(done == length)))
        assert done == length
        return steps

    def decode(
        self,
        batch: int,
        input_len: int,
        output_len: int,
        before_step: Callable[[], object] = lambda: None,
    ) -> list[TimedStep]:
        """Run ``batch`` prompts untimed, then ``output_len`` timed steps of one token each.

        ``before_step`` is called before each timed step; its time does not count.
        """
        # more tokens than will be generated, so that no sequence ends
        most = self._engine.limits.max_model_len - input_len
        names = [self._add(input_len, most) for _ in range(batch)]
        lengths, launched = dict.fromkeys(names, input_len), 0

        def step() -> float:
            nonlocal launched
            seconds, output = self._step()
            launched += output.statistics.step_tokens
            _add_output_lengths(output, lengths)
            return seconds

        try:
            while min(lengths.values()) == input_len:
                step()
            step()  # the first decode-only step is a warm-up
            steps = []
            for _ in range(output_len):
                before_step()
                # a step runs the newest token of each sequence, which may be in flight
                in_flight = (launched - sum(lengths.values())) // batch + 1
                starts = [length - 1 + in_flight for length in lengths.values()]
                before, seconds = launched, step()
                assert launched == before + batch
                chunks = tuple(Chunk(start, 1) for start in starts)
                steps.append(TimedStep(seconds, chunks, batch))
            return steps
        finally:
            for name in names:
                self._engine.abort(name)
            while self._engine.has_work:  # a step in flight
                self._engine.step()

    def _untimed_steps(self, batch: int, input_len: int) -> int:
        """Upper bound of the untimed steps, each of which gives a sequence one token."""
        # some sequences may decode while other prompts are computed
        least = self._config.max_batched_tokens - batch + 1
        return -(-batch * input_len // least) + 1

    def _add(self, length: int, max_tokens: int) -> str:
        name = next(self._names)
        vocab_size = self._engine.limits.vocab_size
        ids = tuple(self._rng.randrange(vocab_size) for _ in range(length))
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self._engine.add(Request(name, ids, params))
        return name

    def _step(self) -> tuple[float, StepOutput]:
        start = time.perf_counter()
        output = self._engine.step()
        seconds = time.perf_counter() - start
        for ended in output.outputs:
            if ended.finish_reason == "error":
                raise RuntimeError(ended.error)
        return seconds, output


def _add_output_lengths(output: StepOutput, lengths: dict[str, int]) -> None:
    for one in output.outputs:
        lengths[one.request_id] += len(one.token_ids)
