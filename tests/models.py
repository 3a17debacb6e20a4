"""Tiny random models, a plain forward loop as reference, and a byte tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.batch import prompt_batch
from engine.executors.block_tables import HostBlockTable
from engine.executors.eager import EagerExecutor
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.config import MEMORY_KINDS, MemoryConfig, MixtureConfig, ModelConfig
from engine.model.layout import TokenLayout
from engine.model.transformer import Transformer
from engine.request import Request
from engine.sampling.params import SamplingParams
from engine.scheduling.batching import Batcher
from engine.scheduling.step_plan import SequenceChunk, StepPlan
from memory_ops.tables.device import DeviceTable
from weights.checkpoints import tensor_writer
from weights.checkpoints.checkpoint import save_checkpoint
from weights.checkpoints.config_json import CheckpointConfig
from weights.checkpoints.tensor_files import TensorSource

EOS_ID = 256
VOCAB_SIZE = 260
HERMES_TEMPLATE = """
{%- for tool in tools or [] %}{{ tool | tojson }} as <tool_call>{"name": ...}</tool_call>
{% endfor %}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant', 'tool') %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<' + message.role + '>' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '' if loop.last and not add_generation_prompt else '\\n' }}
{%- endfor %}
{{- '<assistant>' if add_generation_prompt }}"""


def tiny_config(**changes: Any) -> ModelConfig:
    """Two dense layers, 32 wide, two query heads on one KV head."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_positions": 512,
    }
    return ModelConfig(**(values | changes))


def feed_forward_changes(*kinds: str, **memory: Any) -> dict[str, Any]:
    """Arguments of ``tiny_config`` for layers of these kinds; ``memory`` overrides MemoryConfig."""
    changes: dict[str, Any] = {"num_layers": len(kinds), "feed_forward": kinds}
    if "moe" in kinds:
        changes["mixture"] = MixtureConfig(num_experts=5, top_k=2, expert_size=24)
    if set(kinds) & set(MEMORY_KINDS):
        values = {"num_heads": 2, "num_subkeys": 8, "top_k": 3, "query_dim": 8, "value_dim": 32}
        changes["memory"] = MemoryConfig(**(values | memory))
    return changes


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A random model without tables; its logits differ enough for stable greedy choices."""
    model = Transformer(config).to(dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.4)
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A random model with random tables in memory."""
    model = random_weights(config, dtype)
    if config.memory is not None:
        shape = (config.memory.num_rows, config.memory.value_dim)
        names = config.table_names
        model.attach_tables({name: DeviceTable(torch.randn(shape).to(dtype)) for name in names})
    return model


def model_tensors(model: Transformer) -> dict[str, torch.Tensor]:
    """Every tensor of a model under its name in a checkpoint, tables included."""
    tensors = dict(model.state_dict())
    for layer in model.config.memory_layers:
        names, memory = model.config.layer_tables(layer), model.model.layers[layer].memory
        tensors[names.values] = memory.table.rows
        if names.down is not None:
            tensors[names.down] = memory.down_table.rows
    return tensors


def save_model(model: Transformer, folder: Path) -> Path:
    """Save a model with the byte tokenizer as a checkpoint folder."""
    return _save(model, model_tensors(model), folder)


def save_with_sparse_tables(model: Transformer, folder: Path) -> Path:
    """Save a model without tables; its tables are fp32 zeros in sparse files."""
    _save(model, model.state_dict(), folder)
    memory = model.config.memory
    assert memory is not None
    for index, name in enumerate(model.config.table_names):
        shape = memory.num_rows, memory.value_dim
        write_sparse(folder / f"table-{index:05}.safetensors", name, shape)
    return folder


def write_sparse(file: Path, name: str, shape: tuple[int, int]) -> None:
    """Write a sparse file of one fp32 table of zeros; it uses no disk space."""
    source = TensorSource(name, shape, torch.float32, lambda: torch.empty(0))
    header = tensor_writer._header([source], {})
    with open(file, "wb") as out:
        out.write(header)
        out.truncate(len(header) + 4 * shape[0] * shape[1])


def _save(model: Transformer, tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    sources = [
        TensorSource(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    config = CheckpointConfig(model.config, frozenset({EOS_ID}), dtype="float32")
    files = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    save_checkpoint(folder, config, sources, files)
    return folder


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<eos>", "<bos>", "<pad>", "<unused>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def train_sentencepiece(folder: Path, lines: list[str], **options: Any) -> bytes:
    """Train a small sentencepiece model with byte fallback, like that of Llama 2."""
    (folder / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return (folder / "spm.model").read_bytes()


@torch.inference_mode()
def plain_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits at every position of one sequence, in one forward pass without KV blocks."""
    positions = torch.arange(len(ids))
    layout = TokenLayout(positions, (0, len(ids)))
    return model(torch.tensor(ids), layout, positions).logits_LV


@torch.inference_mode()
def served_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits at every position from the serving executor, with KV blocks."""
    config = EngineConfig(block_size=16, kv_cache_gib=0.001)
    executor = make_executor(model, config)
    return executor.logits(prompt_batch(ids, config.block_size))


def ragged_step(
    sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], block_size: int
) -> tuple[torch.Tensor, TokenLayout]:
    """Ids and layout of a step; per sequence its ids, the number before them, and its blocks."""
    params = SamplingParams()
    chunks = [
        SequenceChunk(str(seat), (0, seat), seat, tuple(ids), start, tuple(blocks), params, 0, True)
        for seat, (ids, start, blocks) in enumerate(sequences)
    ]
    batcher = Batcher(block_size, frozenset())
    batch = batcher.batch(StepPlan(tuple(chunks)), {})
    return batch.ids_T, batch.layout(HostBlockTable().update(batch.block_ids))


def plain_greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the plain loop: one full forward pass for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def greedy(request_id: str, prompt: list[int], count: int, **sampling: Any) -> Request:
    """A request for exactly ``count`` greedy tokens."""
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **sampling)
    return Request(request_id, tuple(prompt), params)


def eager(
    model: Transformer, config: EngineConfig, lookahead: LookaheadConfig | None = None
) -> EagerExecutor:
    """An executor that runs a model in plain torch."""
    per_token = model.config.kv_bytes_per_token(itemsize=4)
    num_blocks = config.num_kv_blocks(per_token, model.config.max_positions)
    return EagerExecutor(model, num_blocks, config.block_size, lookahead)


def engine_of(
    model: Transformer,
    config: EngineConfig,
    eos_ids: frozenset[int] = frozenset(),
    make: Any = make_executor,
    **options: Any,
) -> Engine:
    """An engine for a model, by default with the executor that serves it."""
    return Engine(make(model, config), config, eos_ids, **options)


def run(engine: Engine, requests: dict[int, list[Request]]) -> dict[str, list[int]]:
    """Step an engine to the end; ``requests`` maps step to arrivals. Return tokens by request."""
    tokens: dict[str, list[int]] = {}
    step = 0
    while engine.has_work or any(at >= step for at in requests):
        for request in requests.get(step, []):
            engine.add(request)
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
        step += 1
    return tokens
