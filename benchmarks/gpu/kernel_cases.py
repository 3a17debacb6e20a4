"""Kernels of the CUDA executor and of memory lookups, with inputs of a model's shapes."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.drawn_models import GPU
from benchmarks.gpu.kernel_inputs import KernelCase, KernelInputs, tensors
from engine.model.config import ModelConfig
from engine.model.grouped_weights import group_weights
from engine.model.rotary import rope_angles, rope_frequencies

NUM_EXPERTS, TOP_EXPERTS = 8, 2
_BLOCK_SIZE, _MOST_SPLITS, _MIXED_SPLITS = 16, 32, 4


def layer_cases(
    config: ModelConfig, num_tokens: int, dtype: torch.dtype, context: int
) -> Iterator[KernelCase]:
    """The products, norms and other kernels of a decode step of one dense model.

    ``context`` is the number of tokens of each sequence; it must be a multiple of 16.
    """
    from engine.executors.cuda.kernels import embed, linear, rms_norm, rotate_and_store, silu_gate

    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_heads * config.head_dim
    qkv = queries + 2 * config.num_kv_heads * config.head_dim
    products = {
        "norm qkv": (width, qkv, {"norm": True}),
        "out residual": (queries, width, {"residual": True}),
        "norm gate up": (width, 2 * inner, {"norm": True, "gated": True}),
        "down residual": (inner, width, {"residual": True}),
        "norm head": (width, vocab, {"norm": True}),
    }
    for name, (inputs, outputs, kinds) in products.items():
        make = partial(_product, num_tokens, inputs, outputs, dtype, **kinds)
        yield KernelCase(name, linear.linear, linear.linear_reference, make)
    for name, bits in {
        "norm qkv": 8,
        "norm gate up": 4,
        "down residual": 4,
        "norm head": 8,
    }.items():
        inputs, outputs, kinds = products[name]
        make = partial(_product, num_tokens, inputs, outputs, dtype, **kinds, bits=bits)
        yield KernelCase(f"{name} int{bits}", linear.linear, linear.linear_reference, make)
    x = partial(_random, num_tokens, width, dtype=dtype)
    yield KernelCase(
        "rms norm",
        rms_norm.rms_norm,
        rms_norm.rms_norm_reference,
        lambda: _plain(x(), _random(width, dtype=dtype), 1e-5, passes=2),
    )
    gate = partial(_random, num_tokens, inner, dtype=dtype)
    yield KernelCase(
        "silu gate",
        silu_gate.silu_gate,
        silu_gate.silu_gate_reference,
        lambda: _plain(gate(), gate(), passes=1.5),
    )
    yield KernelCase(
        "embed", embed.embed, embed.embed_reference, partial(_embedding, config, num_tokens, dtype)
    )
    for name, has_norm in (("rotate and store", False), ("norm, rotate and store", True)):
        yield KernelCase(
            name,
            rotate_and_store.rotate_and_store,
            rotate_and_store.rotate_and_store_reference,
            partial(_rotation, config, num_tokens, dtype, has_norm=has_norm),
        )
    yield from attention_cases(config, [1] * num_tokens, dtype, context)


def attention_cases(
    config: ModelConfig, query_counts: list[int], dtype: torch.dtype, context: int
) -> Iterator[KernelCase]:
    """Attention of sequences with these numbers of queries; contexts of the same length."""
    from engine.executors.cuda.kernels import paged_attention

    yield KernelCase(
        f"attention context {context}",
        paged_attention.paged_attention,
        paged_attention.paged_attention_reference,
        partial(_attention, config, query_counts, dtype, context),
    )


def sampling_cases(vocab_size: int, num_tokens: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Token choice, biases, and updates of the block table."""
    from engine.executors.cuda.kernels import add_biases, block_table, choose_tokens

    for name, choice in (("greedy", (0, 0, 1, 0)), ("top-k top-p", (0.8, 50, 0.9, 0.01))):
        yield KernelCase(
            f"choose tokens {name}",
            choose_tokens.choose_tokens,
            choose_tokens.choose_tokens_reference,
            partial(_choice, vocab_size, num_tokens, dtype, choice),
        )
    yield KernelCase(
        "add biases",
        add_biases.add_biases,
        add_biases.add_biases_reference,
        lambda: KernelInputs(
            (
                _random(num_tokens, vocab_size, dtype=dtype),
                torch.arange(0, 16 * 7, 7, device=GPU),
                _random(16),
                torch.tensor([11], device=GPU),
            ),
            outputs=(0,),
        ),
    )
    yield KernelCase(
        "update block table",
        block_table.update_block_table,
        block_table.update_block_table_reference,
        lambda: KernelInputs(
            (
                torch.zeros(4, 5, dtype=torch.int32, device=GPU),
                torch.tensor([[0, 1, 5], [2, 3, 7], [3, 0, 9]], device=GPU),
                torch.tensor([2], device=GPU),
            ),
            outputs=(0,),
        ),
    )


def mixture_case(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> KernelCase:
    """A mixture of experts, each of the width of the model's feed-forward."""
    from engine.executors.cuda.kernels import mixture

    def inputs() -> KernelInputs:
        width, inner = config.hidden_size, config.intermediate_size
        x_TD = _random(num_tokens, width, dtype=dtype)
        logits_TE = _random(num_tokens, NUM_EXPERTS)
        gate_up = _random(NUM_EXPERTS, 2 * inner, width, dtype=dtype, std=width**-0.5)
        down = _random(NUM_EXPERTS, width, inner, dtype=dtype, std=inner**-0.5)
        chosen = min(NUM_EXPERTS, num_tokens * TOP_EXPERTS)
        expert_bytes = (gate_up.nbytes + down.nbytes) // NUM_EXPERTS
        flops = 6 * width * inner * num_tokens * TOP_EXPERTS
        num_bytes = chosen * expert_bytes + 3 * x_TD.nbytes
        residual_TD = _random(num_tokens, width, dtype=dtype)
        arguments = residual_TD, x_TD, logits_TE, gate_up, down, TOP_EXPERTS
        return KernelInputs(arguments, num_bytes=num_bytes, flops=flops)

    return KernelCase("mixture", mixture.mixture, mixture.mixture_reference, inputs)


def _random(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return torch.randn(shape, device=GPU).mul_(std).to(dtype)


def _plain(*arguments: Any, passes: float) -> KernelInputs:
    """Inputs of a kernel whose work is this many passes over the tensors."""
    found = KernelInputs(arguments)
    return replace(found, num_bytes=round(passes * found.size))


def _product(
    num_tokens: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    residual: bool = False,
    gated: bool = False,
    bits: int | None = None,
) -> KernelInputs:
    from engine.executors.cuda.kernels.linear_operands import LinearOperands

    x_MK = _random(num_tokens, inputs, dtype=dtype)
    weight_NK = _random(outputs, inputs, dtype=dtype, std=inputs**-0.5)
    weight = weight_NK if bits is None else group_weights(weight_NK, bits)
    columns = outputs // 2 if gated else outputs
    operands = LinearOperands(
        x_MK,
        weight,
        norm=(_random(inputs, dtype=dtype), 1e-5) if norm else None,
        residual_MO=_random(num_tokens, columns, dtype=dtype) if residual else None,
        is_gated=gated,
    )
    moved = num_tokens * columns * dtype.itemsize * (2 if residual else 1)
    return KernelInputs(
        (operands,),
        num_bytes=x_MK.nbytes + sum(one.nbytes for one in tensors(weight)) + moved,
        flops=2 * num_tokens * weight_NK.numel(),
    )


def _embedding(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> KernelInputs:
    embedding_VD = _random(config.vocab_size, config.hidden_size, dtype=dtype)
    ids_T = torch.randint(config.vocab_size, (num_tokens,), device=GPU)
    ids_T[-1] = -1  # the token that seat 0 got last
    last_token_P = torch.randint(config.vocab_size, (num_tokens,), device=GPU)
    num_bytes = 2 * num_tokens * embedding_VD[0].nbytes
    return KernelInputs((ids_T, last_token_P, embedding_VD), num_bytes=num_bytes)


def _rotation(
    config: ModelConfig, num_tokens: int, dtype: torch.dtype, *, has_norm: bool = False
) -> KernelInputs:
    groups, head_dim = config.num_kv_heads, config.head_dim
    qkv_TF = _random(num_tokens, (config.num_heads + 2 * groups) * head_dim, dtype=dtype)
    frequencies = rope_frequencies(head_dim, config.rope_theta, None).to(GPU)
    positions_T = torch.arange(num_tokens, device=GPU) * 3
    angles = rope_angles(torch.arange(3 * num_tokens, device=GPU), frequencies)
    kv_blocks = torch.zeros(num_tokens, 2, groups, _BLOCK_SIZE, head_dim, dtype=dtype, device=GPU)
    kv_slots_T = torch.randperm(num_tokens * _BLOCK_SIZE, device=GPU)[:num_tokens]
    norm = (torch.ones(2, head_dim, dtype=dtype, device=GPU), 1e-5) if has_norm else None
    return KernelInputs(
        (qkv_TF, positions_T, angles, kv_slots_T, kv_blocks, config.num_heads, norm),
        num_bytes=2 * qkv_TF.nbytes,
        outputs=(4,),
    )


def _attention(
    config: ModelConfig, query_counts: list[int], dtype: torch.dtype, context: int
) -> KernelInputs:
    from engine.executors.cuda.kernels.paged_step import PagedStep, most_query_tiles, query_tiles

    sequences, blocks, groups = len(query_counts), context // _BLOCK_SIZE, config.num_kv_heads
    kv_blocks = _random(sequences * blocks, 2, groups, _BLOCK_SIZE, config.head_dim, dtype=dtype)
    q_THE = _random(sum(query_counts), config.num_heads, config.head_dim, dtype=dtype)
    counts_S = torch.tensor(query_counts, device=GPU)
    num_tiles = most_query_tiles(sum(query_counts), sequences)
    group = config.num_heads // groups
    tiles = torch.from_numpy(query_tiles(query_counts, group, num_tiles)).to(GPU)
    step = PagedStep(
        torch.cat((counts_S.new_zeros(1), counts_S.cumsum(0))),
        torch.full((sequences,), context, device=GPU),
        torch.arange(sequences, device=GPU),
        torch.randperm(sequences * blocks, device=GPU).int().view(sequences, blocks),
        tiles if max(query_counts) > 1 else None,
    )
    processors = torch.cuda.get_device_properties(GPU).multi_processor_count
    splits = min(_MOST_SPLITS, -(-2 * processors // (sequences * groups)))
    splits = splits if step.tiles_I2 is None else _MIXED_SPLITS
    # a query attends to itself and everything before it
    pairs = sum(count * context - count * (count - 1) // 2 for count in query_counts)
    return KernelInputs(
        (q_THE, kv_blocks, step),
        {"num_splits": splits, "out_THE": torch.zeros_like(q_THE)},
        num_bytes=kv_blocks.nbytes + 2 * q_THE.nbytes,
        flops=4 * pairs * config.num_heads * config.head_dim,
    )


def _choice(
    vocab_size: int, num_tokens: int, dtype: torch.dtype, choice: tuple[float, ...]
) -> KernelInputs:
    logits_LV = _random(num_tokens, vocab_size, dtype=dtype, std=3.0)
    choices_L5 = torch.tensor([choice], dtype=torch.float64, device=GPU).repeat(num_tokens, 1)
    uniform_L1 = torch.rand(num_tokens, 1, dtype=torch.float64, device=GPU)
    seats_L = torch.arange(num_tokens, device=GPU)
    return KernelInputs(
        (
            logits_LV,
            torch.cat((choices_L5, uniform_L1), dim=1),
            seats_L,
            torch.zeros_like(seats_L),
            torch.zeros_like(seats_L),
        ),
        num_bytes=logits_LV.nbytes,
        outputs=(3, 4),
    )
