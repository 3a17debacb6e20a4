"""``memplus bench step``: milliseconds of an engine step outside the model."""

import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.drawn_tokenizer import EOS_ID, DrawnTokenizer
from benchmarks.grammars import GRAMMARS
from benchmarks.model_shapes import SMOLLM2_SHAPE
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.batch import Batch, FinishedStep, sample_batch, warm_up_batch
from engine.executors.block_tables import HostBlockTable
from engine.executors.cpu.kernels import cpu_kernels
from engine.executors.memory_recorder import MemoryRecorder
from engine.progress import Progress
from engine.request import Request
from engine.sampling.grammar import Grammar
from engine.sampling.params import MAX_LISTED_IDS, SamplingParams
from engine.sampling.sampler import Sampler
from memory_ops.tables.value_table import ValueTable
from server.allocator import keep_freed_memory
from weights.grammars.compiler import GrammarCompiler

# one small layer, since the model does not run
CONFIG = replace(
    SMOLLM2_SHAPE,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    feed_forward=(),
)

LISTED = range(0, 40 * MAX_LISTED_IDS, 40)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
    "penalties": {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "1024 biases": {"temperature": 0, "logit_bias": tuple((i, 1.0) for i in LISTED)},
    "1024 allowed": {"temperature": 0, "allowed_token_ids": frozenset(LISTED)},
    "100 bad words": {"temperature": 0, "bad_words": tuple((i, i + 1) for i in LISTED[:100])},
    "5 logprobs": {"temperature": 0, "logprobs": 5},
}


class InstantExecutor:
    """Returns precomputed random logits, so that only the engine takes time.

    It keeps a block table, which is a step's work outside the model too.
    """

    steps_ahead = 0
    balance_rows = 8

    def __init__(self, max_logits: int, engine: EngineConfig, context: int) -> None:
        self.config = replace(CONFIG, max_positions=CONFIG.max_positions + context)
        itemsize = torch.bfloat16.itemsize
        self.num_blocks = engine.num_kv_blocks(
            CONFIG.kv_bytes_per_token(itemsize), self.config.max_positions
        )
        self.tables: Mapping[str, ValueTable] = {}
        self.device = torch.device("cpu")
        self.recorder = MemoryRecorder(self.config, self.device)
        self.progress = Progress()
        self._block_table = HostBlockTable()
        self._logits_LV = torch.randn(max_logits, CONFIG.vocab_size).to(torch.bfloat16)
        kernels = cpu_kernels(self._logits_LV.device, self._logits_LV.dtype)
        self._sampler = (
            Sampler()
            if kernels is None
            else Sampler(kernels.sample, kernels.log_probabilities, kernels.mask)
        )

    def logits(self, batch: Batch) -> Tensor:
        self._block_table.update(batch.block_ids)
        return self._logits_LV[: len(batch.logits_at_L)]

    def launch(self, batch: Batch) -> FinishedStep:
        logits_LV = self.logits(batch)
        return FinishedStep(sample_batch(logits_LV, batch, self._sampler, self.progress, {}))

    def warm_up(self) -> None:
        self.launch(warm_up_batch())

    def close(self) -> None:
        """Does nothing: it starts no process."""


def measure(batch_sizes: Sequence[int], steps: int, context: int) -> None:
    """Print the median of ``steps`` decode steps for each number of sequences.

    One of the sequences begins with a context of ``context`` tokens, the others with 128.
    """
    keep_freed_memory()
    print(f"{'sequences':>14}" + "".join(f"{size:>11}" for size in batch_sizes))
    kinds: list[tuple[str, dict[str, Any], Grammar | None]] = [
        *((kind, choice, None) for kind, choice in KINDS.items()),
        *((kind, {}, grammar) for kind, grammar in GRAMMARS.items()),
    ]
    for kind, choice, grammar in kinds:
        params = SamplingParams(max_tokens=8000, ignore_eos=True, **choice)
        times = [_step_ms(size, params, grammar, steps, context) for size in batch_sizes]
        print(f"{kind:>14}" + "".join(f"{ms:>8.3f} ms" for ms in times))


def _step_ms(
    size: int, params: SamplingParams, grammar: Grammar | None, steps: int, context: int
) -> float:
    config = EngineConfig(max_num_seqs=size, kv_cache_gib=0.5)
    eos_ids = frozenset({EOS_ID})
    vocab_size = CONFIG.vocab_size
    grammars = GrammarCompiler(lambda: DrawnTokenizer(vocab_size), vocab_size, eos_ids)
    engine = Engine(InstantExecutor(size, config, context), config, eos_ids, grammars=grammars)
    drawn = random.Random(0)
    for index in range(size):
        length = 128 if index else context
        ids = tuple(drawn.randrange(CONFIG.vocab_size) for _ in range(length))
        engine.add(Request(str(index), ids, params, grammar=grammar))
    while engine.statistics().num_running < size:
        engine.step()
    engine.step()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        sender.send(engine.step())
        receiver.recv()
        times.append(time.perf_counter() - start)
    return median(times) * 1e3
