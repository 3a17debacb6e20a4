"""Milliseconds of an engine step outside the model: plan, batch, sample, commit, messages."""

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from engine.allocator import keep_freed_memory
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.config import ModelConfig
from engine.model.transformer import ForwardOutput, Transformer
from engine.ops.layout import TokenLayout
from engine.request import Request
from engine.sampling_params import MAX_LISTED_IDS, SamplingParams

# SmolLM2's shapes where they matter here: the vocabulary, and one layer's blocks
CONFIG = ModelConfig(
    vocab_size=49_152,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    max_positions=8192,
    tie_embeddings=True,
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


class InstantModel(Transformer):
    """Gives logits that were drawn beforehand, so that nothing but the engine takes time."""

    def __init__(self, config: ModelConfig, num_logits: int) -> None:
        super().__init__(config)
        self.to(torch.bfloat16)
        self._logits_LV = torch.randn(num_logits, config.vocab_size).to(torch.bfloat16)

    def forward(
        self,
        ids_T: Tensor,
        layout: TokenLayout,
        logits_at_L: Tensor,
        kv_blocks: Tensor | None = None,
        with_hidden: bool = False,
        with_trace: bool = False,
        on_layers: Callable[[], None] | None = None,
    ) -> ForwardOutput:
        count = len(logits_at_L)
        return ForwardOutput(self._logits_LV[:count], None, {}, ())


def measure(batch_sizes: Sequence[int], steps: int, context: int) -> None:
    """Print the median of ``steps`` decode steps for each number of sequences.

    One of the sequences begins with a context of ``context`` tokens, the others with 128.
    """
    keep_freed_memory()
    print(f"{'sequences':>14}" + "".join(f"{size:>11}" for size in batch_sizes))
    for kind, choice in KINDS.items():
        params = SamplingParams(max_tokens=8000, ignore_eos=True, **choice)
        times = [_step_ms(size, params, steps, context) for size in batch_sizes]
        print(f"{kind:>14}" + "".join(f"{ms:>8.3f} ms" for ms in times))


def _step_ms(size: int, params: SamplingParams, steps: int, context: int) -> float:
    config = replace(CONFIG, max_positions=CONFIG.max_positions + context)
    engine = Engine(InstantModel(config, size), EngineConfig(max_num_seqs=size, kv_cache_gib=0.5))
    drawn = random.Random(0)
    for index in range(size):
        length = 128 if index else context
        ids = tuple(drawn.randrange(CONFIG.vocab_size) for _ in range(length))
        engine.add(Request(str(index), ids, params))
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
