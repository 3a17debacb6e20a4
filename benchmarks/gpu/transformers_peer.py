"""Part transformers: Hugging Face's compiled ``generate`` on the same drawn weights."""

import importlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.decode import MODELS
from benchmarks.gpu.drawn_engine import warm_rounds
from benchmarks.gpu.drawn_models import GPU, drawn_model
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.part import PartSetup, Skipped, Task
from benchmarks.gpu.roofline import measured_rate
from engine.model.config import ModelConfig

_BATCHES, _STEPS = (1, 32), 64
_WAYS = ("memplus", "transformers", "memplus / transformers")


def tasks(setup: PartSetup) -> Iterator[Task]:
    """A task per model, Llama-3-8B's shape first."""
    for name, config, context in reversed(MODELS):
        names = [f"{name} decode {batch} {way}" for batch in _BATCHES for way in _WAYS]
        yield Task(tuple(names), partial(_measured, name, config, context))


def _measured(
    name: str, config: ModelConfig, context: int, wanted: Sequence[str]
) -> Iterator[Figure]:
    """All figures of a model.

    Raises:
        Skipped: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    model = drawn_model(config, torch.bfloat16)
    theirs = _theirs(config)
    theirs.load_state_dict(model.state_dict(), strict=not config.tie_embeddings)
    peers = {batch: _peer_rate(theirs, config.vocab_size, batch, context) for batch in _BATCHES}
    del theirs
    torch.cuda.empty_cache()
    rounds = warm_rounds(model)
    for batch in _BATCHES:
        rate = measured_rate(rounds.decode(batch, context, _STEPS))
        rates = (rate, peers[batch], rate / peers[batch])
        for way, value in zip(_WAYS, rates, strict=True):
            unit = "ratio" if "/" in way else "tokens/s"
            yield Figure(f"{name} decode {batch} {way}", value, unit)


def _theirs(config: ModelConfig) -> Any:
    """Their model of this shape, in bf16 on the GPU."""
    library = importlib.import_module("transformers")
    shape = library.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
    )
    with GPU:
        return library.LlamaForCausalLM(shape).to(torch.bfloat16).eval()


def _peer_rate(model: Any, vocab_size: int, batch: int, context: int) -> float:
    """Decoded tokens per second: the time of a long answer less that of one token."""
    ids = torch.randint(vocab_size, (batch, context), device=GPU)

    def seconds(num_tokens: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        # a static cache makes it compile its decode step
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    # the length of the cache is part of what is compiled
    for num_tokens in (1, _STEPS + 1):
        seconds(num_tokens)
    return batch * _STEPS / (seconds(_STEPS + 1) - seconds(1))
