"""Checks of whole models: their logits and tokens on a GPU, eager and in graphs, and on the CPU."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.drawn_models import GPU, copied, drawn_model
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.part import Skipped
from benchmarks.model_shapes import SMOLLM2_SHAPE
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.batch import prompt_batch
from engine.executors.executor import Executor, make_executor
from engine.model.config import ModelConfig
from engine.model.row_patches import RowPatch
from engine.model.transformer import Transformer
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams
from memory_ops.patches.patched_rows import PatchedRows
from server.config import cache_folder
from weights.models.named_models import WORDNET, find_model

MODELS = (WORDNET, "smollm2 shape")
_CPU = torch.device("cpu")
_ENGINE = EngineConfig(max_num_seqs=4, max_batched_tokens=256, max_model_len=256, kv_cache_gib=0.1)
_PROMPT_LENGTHS, _NEW_TOKENS = (5, 33, 90), 40
# what passes: errors in standard deviations of the logits, divergence in nats, share of positions
_MAX_ERROR, _MAX_KL, _MIN_TOP1 = 1e-3, 0.02, 0.8
_ERROR, _KL, _TOP1 = "fp32 logits max error", "bf16 logits KL", "bf16 logits top-1 agreement"
_EAGER, _GRAPH = "fp32 tokens eager = CPU", "fp32 tokens graph = eager"
_IN_FLIGHT = "fp32 tokens one step in flight = eager"
_PATCHED = "fp32 tokens with row patches = CPU"

Tokens = Mapping[str, Sequence[int]]


def model_names(model: str) -> tuple[str, ...]:
    """Names of the figures of one of ``MODELS``."""
    names = [_ERROR, _KL, _TOP1, _EAGER, _GRAPH, _IN_FLIGHT]
    # the other model has no memory layers
    names += [_PATCHED] if model == WORDNET else []
    return tuple(f"{model} {name}" for name in names)


def model_figures(model: str, wanted: Sequence[str]) -> Iterator[Figure]:
    """All figures of one of ``MODELS``. Its weights are bf16 numbers, in fp32 where that is said.

    Raises:
        Skipped: safetensors is missing.
    """
    on_cpu = _wordnet() if model == WORDNET else _drawn()
    cpu_executor = make_executor(on_cpu, _ENGINE)
    cpu_tokens = _tokens(cpu_executor)
    # as a model is served: a prompt, and the tokens that follow it
    longest = max(_PROMPT_LENGTHS)
    ids = [*_prompt(on_cpu.config, longest), *cpu_tokens[f"greedy {longest}"]]
    exact_LV = _logits(cpu_executor, ids)
    executor = make_executor(copied(on_cpu, GPU, torch.float32), _ENGINE)
    error = float((_logits(executor, ids) - exact_LV).abs().max() / exact_LV.std())
    yield Figure(f"{model} {_ERROR}", error, "std", _MAX_ERROR, not error <= _MAX_ERROR)
    yield from _narrow_figures(model, on_cpu, ids, exact_LV)
    # as an attribute of this executor alone
    executor.steps_ahead = 0
    eager_tokens = _tokens(executor)
    yield _agreement(f"{model} {_EAGER}", eager_tokens, cpu_tokens)
    executor.warm_up()
    yield _agreement(f"{model} {_GRAPH}", _tokens(executor), eager_tokens)
    executor.steps_ahead = 1
    yield _agreement(f"{model} {_IN_FLIGHT}", _tokens(executor), eager_tokens)
    if model == WORDNET:
        patches = [_patch(on_cpu, first) for first in range(2)]
        patched_tokens = _tokens(cpu_executor, patches)
        found = _tokens(executor, [patch.to(GPU) for patch in patches])
        yield _agreement(f"{model} {_PATCHED}", found, patched_tokens)


def _narrow_figures(
    model: str, on_cpu: Transformer, ids: Sequence[int], exact_LV: Tensor
) -> Iterator[Figure]:
    """Figures of bf16 logits against fp32 ones."""
    executor = make_executor(copied(on_cpu, GPU, torch.bfloat16), _ENGINE)
    found_LV = _logits(executor, ids)
    exact, found = exact_LV.log_softmax(1), found_LV.log_softmax(1)
    divergence = float((exact.exp() * (exact - found)).sum(1).mean())
    yield Figure(f"{model} {_KL}", divergence, "nats", _MAX_KL, not divergence <= _MAX_KL)
    agreement = float((exact.argmax(1) == found.argmax(1)).double().mean())
    yield Figure(f"{model} {_TOP1}", agreement, "of tokens", _MIN_TOP1, agreement < _MIN_TOP1)


def _wordnet() -> Transformer:
    if importlib.util.find_spec("safetensors") is None:
        raise Skipped(f"reading {WORDNET} needs safetensors")
    from weights.checkpoints.checkpoint import load_model

    return load_model(find_model(WORDNET, cache_folder()).folder, "float32")[0]


def _drawn() -> Transformer:
    return copied(drawn_model(SMOLLM2_SHAPE, torch.bfloat16), _CPU, torch.float32)


def _prompt(config: ModelConfig, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
    return ids


def _logits(executor: Executor, ids: Sequence[int]) -> Tensor:
    """fp32 logits on the CPU at every position of one sequence, computed in one step."""
    return executor.logits(prompt_batch(ids, _ENGINE.block_size)).to(_CPU, torch.float32)


def _patch(model: Transformer, first: int) -> RowPatch:
    """A patch of every third row from ``first`` on, which adds to each the row after it."""
    rows_of = {}
    for name, table in model.tables.items():
        rows_P = torch.arange(first, table.num_rows - 1, 3)
        ones_P11 = torch.ones(len(rows_P), 1, 1)
        deltas_PV = table.start((rows_P + 1).view(-1, 1, 1), ones_P11).finish()
        rows_of[name] = PatchedRows(rows_P, deltas_PV)
    config = model.config
    layers = {i: rows_of[config.layer_tables(i).values] for i in config.memory_layers}
    return RowPatch(str(first), layers)


def _tokens(executor: Executor, patches: Sequence[RowPatch] = ()) -> Tokens:
    """Tokens of greedy and of seeded requests that run together, with 0, 1, ... patches."""
    engine = Engine(executor, _ENGINE)
    for patch in patches:
        engine.patches.put(patch)
    refs = [PatchRef(patch.content_hash, 0.5) for patch in patches]
    params = partial(SamplingParams, max_tokens=_NEW_TOKENS, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for number, length in enumerate(_PROMPT_LENGTHS):
        ids = _prompt(executor.config, length)
        name, used = f"greedy {length}", tuple(refs[:number])
        found[name] = []
        engine.add(Request(name, tuple(ids), params(temperature=0), patches=used))
    found["seeded"] = []
    sampling = params(temperature=0.8, top_p=0.95, seed=7)
    engine.add(Request("seeded", tuple(ids), sampling, patches=tuple(refs)))
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            found[output.request_id] += output.token_ids
    return found


def _agreement(name: str, found: Tokens, expected: Tokens) -> Figure:
    pairs = [pair for key in expected for pair in zip(found[key], expected[key], strict=True)]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    return Figure(name, equal, "of tokens", 1.0, is_wrong=equal < 1)
