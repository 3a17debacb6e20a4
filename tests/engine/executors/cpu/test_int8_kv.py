"""Keys and values in int8, in every runnable build against fp64; sizes, answers and refusals."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors import executor
from engine.executors.batch import prompt_batch
from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.executor import make_executor
from engine.model.attention import attend as attend_by_torch
from engine.model.config import KV_SCALE_BYTES
from engine.model.rotary import rotate
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.conftest import TOLERANCE
from tests.engine.executors.cpu.test_kernels import (
    SEQUENCES,
    native_attention,
    paged_batch,
    random_qkv,
    single_queries,
)
from tests.engine.test_company import prompts, step_all
from tests.models import engine_of, feed_forward_changes, greedy, random_model, tiny_config
from weights.models.named_models import find_model

each_build = pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CONFIG = EngineConfig(kv_cache_gib=0.001, block_size=16, kv_dtype="int8")


def rounded(rows_E):
    """Rows as a KV block holds them: E integers, then the bytes of an fp32 scale."""
    most_1 = rows_E.float().abs().amax(dim=-1, keepdim=True)
    integers_E = (rows_E.float() * (127 / most_1).nan_to_num(posinf=0.0)).round().to(torch.int8)
    return torch.cat([integers_E, (most_1 / 127).view(torch.int8)], dim=-1)


def exact(rows):
    """The fp64 values of rows of a KV block."""
    integers, scales = rows[..., :-KV_SCALE_BYTES], rows[..., -KV_SCALE_BYTES:]
    return integers.double() * scales.contiguous().view(torch.float32).double()


def spread(rows_E):
    """Rows times a Hadamard matrix of their largest block of a power of two; and its size."""
    size = rows_E.shape[-1]
    block = size & -size
    matrix = torch.ones(1, 1, dtype=rows_E.dtype)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=rows_E.dtype), matrix)
    return (rows_E.unflatten(-1, (-1, block)) @ matrix).flatten(-2), block


def attention_by_torch(qkv, num_heads, num_kv_heads, angles, layout, kv_blocks):
    """Attention in fp64 on the rows that the blocks hold."""
    heads = qkv.double().unflatten(1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    q, block = spread(rotate(q, angles))
    return attend_by_torch(q / block, k, v, layout, exact(kv_blocks)).flatten(1)


def int8_batch(sequences, num_kv_heads, head_dim, block_size):
    """``paged_batch`` in int8: scales are NaN except at tokens."""
    kv_blocks, layout = paged_batch(sequences, num_kv_heads, head_dim, block_size, torch.float32)
    is_token = ~kv_blocks.isnan().any(dim=-1, keepdim=True)
    poison = torch.tensor(-1, dtype=torch.int8)
    return torch.where(is_token, rounded(kv_blocks.nan_to_num()), poison), layout


def attend(build, qkv, num_heads, angles, kv_blocks, layout):
    return native_attention(CpuKernels(build), qkv, num_heads, angles, kv_blocks, layout)


@each_build
@each_dtype
@given(
    sequences=SEQUENCES,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 8, 30]),
    head_dim=st.sampled_from([4, 12, 16, 40, 64, 128]),
    block_size=st.sampled_from([4, 12, 16, 32]),
)
def test_attention_equals_plain_torch_on_the_stored_rows(
    build, dtype, sequences, num_kv_heads, group, head_dim, block_size
):
    kv_blocks, layout = int8_batch(sequences, num_kv_heads, head_dim, block_size)
    before, num_heads = kv_blocks.clone(), num_kv_heads * group
    qkv, angles = random_qkv(layout, num_heads, num_kv_heads, head_dim, dtype)
    found = attend(build, qkv, num_heads, angles, kv_blocks, layout)
    _, k, v = qkv.view(len(qkv), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], 1)

    # the new rows are rounded keys and values; all others stay as they are
    place = layout.paged.kv_index_T
    at = place // block_size, slice(None), slice(None), place % block_size
    written = exact(kv_blocks[at])
    wanted = torch.stack([spread(rotate(k.double(), angles))[0], v.double()], dim=1)
    steps = wanted.abs().amax(dim=-1, keepdim=True) / 127
    assert ((written - wanted).abs() <= steps * 0.5001).all()
    before[at] = kv_blocks[at]
    assert torch.equal(kv_blocks, before)

    out = attention_by_torch(qkv, num_heads, num_kv_heads, angles, layout, kv_blocks)
    # queries are rounded to 15 bits of their largest value, weights to 16
    torch.testing.assert_close(found.double(), out, rtol=TOLERANCE[dtype][0], atol=1e-3)


@each_build
@each_dtype
@pytest.mark.parametrize(("head_dim", "block_size"), [(40, 16), (64, 16), (64, 12)])
def test_bits_do_not_depend_on_batch_or_chunks(build, dtype, head_dim, block_size):
    kv_blocks, layout = int8_batch(
        [(30, 77), (1, 300), (5, 5), (1, 33), (3, 130)], 2, head_dim, block_size
    )
    qkv, angles = random_qkv(layout, 6, 2, head_dim, dtype)
    before = kv_blocks.clone()
    out = attend(build, qkv, 6, angles, kv_blocks, layout)
    # each query writes its own row and reads the earlier ones
    for at, one, turns, single in single_queries(qkv, angles, layout):
        assert torch.equal(attend(build, one, 6, turns, before, single)[0], out[at])
    assert torch.equal(before, kv_blocks)


@each_build
def test_nan_reaches_only_the_queries_that_see_it(build):
    kv_blocks, layout = int8_batch([(1, 200), (1, 200), (1, 200)], 1, 16, 16)
    qkv, angles = random_qkv(layout, 2, 1, 16, torch.float32)
    wanted = attend(build, qkv, 2, angles, kv_blocks, layout)
    qkv[1, 32 + 3] = torch.nan  # a key
    found = attend(build, qkv, 2, angles, kv_blocks, layout)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], wanted[[0, 2]])
    qkv[1, 32 + 3], qkv[2, 48 + 5] = 0.0, torch.inf  # a value
    found = attend(build, qkv, 2, angles, kv_blocks, layout)
    assert found[1].isfinite().all() and not found[2].isfinite().any()
    assert torch.equal(found[0], wanted[0])


@each_build
def test_zero_rows_and_huge_scores(build):
    kv_blocks, layout = int8_batch([(4, 40)], 1, 16, 16)
    for size in (0.0, 1e4):
        qkv, angles = random_qkv(layout, 2, 1, 16, torch.float32)
        qkv[:, :48] *= size
        found = attend(build, qkv, 2, angles, kv_blocks, layout)
        out = attention_by_torch(qkv, 2, 1, angles, layout, kv_blocks)
        torch.testing.assert_close(found.double(), out, rtol=1e-3, atol=1e-3)


def logits(made):
    return made.logits(prompt_batch(range(60), CONFIG.block_size)).double()


@each_dtype
def test_logits_are_near_those_of_keys_and_values_in_full(dtype):
    model = random_model(tiny_config(head_dim=64), dtype)
    plain = logits(make_executor(model, EngineConfig(kv_cache_gib=0.001)))
    found = logits(make_executor(model, CONFIG))
    # these random layers amplify every error
    assert 0 < (found - plain).norm() < 0.06 * plain.norm()


@pytest.mark.parametrize("kind", ["dense", "memory_plus"])
def test_answers_are_the_same_in_any_company_and_any_chunks(kind):
    changes = feed_forward_changes("dense", kind, **({} if kind == "dense" else {"value_dim": 40}))
    model = random_model(tiny_config(**changes))
    shared = prompts(40)[7] * 3
    given = [*prompts(8), shared[:50], [*shared[:40], 1, 2, 3]]
    requests = [
        greedy(str(i), ids, 12, logprobs=1, prompt_logprobs=1) for i, ids in enumerate(given)
    ]

    def answers(some, tokens=4096, **limits):
        kv_bytes = tokens * model.config.kv_bytes_per_token(4, "int8")
        config = EngineConfig(kv_cache_gib=kv_bytes / 2**30, kv_dtype="int8", **limits)
        engine = engine_of(model, config)
        for request in some:
            engine.add(request)
        outputs = step_all(engine)
        assert not any(output.error for found in outputs.values() for output in found)
        # log-probabilities are equal only if all bits are
        found = {
            name: [
                [one for output in found for one in output.prompt_logprobs],
                [one for output in found for one in output.logprobs],
            ]
            for name, found in outputs.items()
        }
        return found, engine.statistics()

    alone = {name: found for one in requests for name, found in answers([one])[0].items()}
    assert {len(answer) for _, answer in alone.values()} == {12}
    assert answers(requests)[0] == alone
    assert answers(requests, max_batched_tokens=11, max_num_seqs=5)[0] == alone
    crowded, statistics = answers(requests, tokens=96, block_size=4, max_model_len=80)
    assert crowded == alone and statistics.preemptions > 2


def test_an_answer_after_a_shared_prefix_equals_the_first():
    model = random_model(tiny_config())
    engine, ids = engine_of(model, CONFIG), prompts(40)[7] * 2
    found = {}
    for name in ("first", "again"):
        engine.add(greedy(name, ids, 12, logprobs=1))
        found |= step_all(engine)
    assert engine.statistics().prefix_hits > 0
    first, again = ([one for out in found[name] for one in out.logprobs] for name in found)
    assert first == again


def test_more_blocks_fit_in_the_same_memory():
    model = random_model(tiny_config(head_dim=64), torch.bfloat16)
    per_token = model.config.kv_bytes_per_token(2)
    assert per_token == 2 * 2 * 2 * 64 * 2
    assert model.config.kv_bytes_per_token(2, "int8") == 2 * 2 * 2 * (64 + KV_SCALE_BYTES)
    plain = engine_of(model, EngineConfig(kv_cache_gib=0.001)).statistics().kv_blocks_total
    small = engine_of(model, CONFIG).statistics().kv_blocks_total
    assert small == math.floor(0.001 * 2**30 / (8 * 68 * 16)) and small > 1.85 * plain


def test_a_served_model_with_memories_answers_alike(memory_plus_folder: Path, tmp_path):
    answers = []
    for kv_dtype in ("auto", "int8"):
        config = EngineConfig(kv_cache_gib=0.01, kv_dtype=kv_dtype)
        found = find_model(str(memory_plus_folder), tmp_path)
        settings = EngineSettings(ModelOptions(str(memory_plus_folder)), found, config)
        engine = build_engine(settings, torch.device("cpu"))
        engine.add(greedy("a", list(range(40)), 1, logprobs=1))
        answers.append(step_all(engine)["a"][0].logprobs[0].logprob)
    assert 0 < abs(answers[0] - answers[1]) < 0.05


def test_what_cannot_read_int8_refuses_it(monkeypatch):
    message = "^kv_dtype: int8 needs heads whose size is a multiple of 4, not 6"
    with pytest.raises(ConfigError, match=message):
        make_executor(random_model(tiny_config(head_dim=6)), CONFIG)
    model = random_model(tiny_config())
    monkeypatch.setattr(executor, "cpu_kernels", lambda device, dtype: None)
    with pytest.raises(ConfigError, match="^kv_dtype: int8 needs memplus's native library"):
        make_executor(model, CONFIG)
    weight = SimpleNamespace(is_cuda=True)
    on_gpu = SimpleNamespace(
        model=SimpleNamespace(norm=SimpleNamespace(weight=weight)), dtype=torch.bfloat16
    )
    with pytest.raises(ConfigError, match="^kv_dtype: int8 needs a CPU"):
        make_executor(on_gpu, CONFIG)
