"""The engine on a GPU gives the CPU's tokens: every kind of model, eager, in graphs, in flight."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.drawn_models import copied
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.model.transformer import converted
from engine.request import Request
from engine.sampling.params import SamplingParams
from tests.engine.patches import patch_of
from tests.engine.test_patched_requests import asks, changed_model, model_of
from tests.grouped_models import in_groups
from tests.models import (
    engine_of,
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    tiny_config,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
CONFIG = EngineConfig(
    max_num_seqs=4, max_batched_tokens=64, block_size=4, max_model_len=64, kv_cache_gib=0.001
)
PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9, 10], "c": [11]}
COUNT = 12
KINDS = [
    ("dense", "dense"),
    ("memory_plus", "dense", "memory_plus"),
    ("pkm", "pkm"),
    ("peer",),
    ("moe", "dense"),
]
WITH_TABLES = [kinds for kinds in KINDS if set(kinds) & {"memory_plus", "pkm", "peer"}]


@pytest.fixture(scope="module", autouse=True)
def _triton():
    pytest.importorskip("triton")


def requests():
    return {0: [greedy(name, ids, COUNT) for name, ids in PROMPTS.items()]}


def check(executor, expected, asked=None, patches=()):
    """Eager steps, graphs, and graphs with one step in flight give these tokens."""

    def found():
        served = Engine(executor, CONFIG)
        for patch in patches:
            served.patches.put(patch)
        return run(served, asked or requests())

    executor.steps_ahead = 0
    assert found() == expected
    executor.warm_up()
    assert found() == expected
    executor.steps_ahead = 1
    assert found() == expected


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_tables_in_device_memory(kinds):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    check(make_executor(copied(model, GPU, torch.float32), CONFIG), expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_in_groups(dtype):
    model = random_model(tiny_config(**feed_forward_changes("dense", "moe", "memory_plus")))
    grouped = in_groups(model, dtype)
    dense = converted(grouped, torch.float32)
    expected = {name: plain_greedy(dense, ids, COUNT) for name, ids in PROMPTS.items()}
    on_gpu = grouped.to(GPU)
    on_gpu.attach_tables(copied(model, GPU, torch.float32).tables)
    check(make_executor(on_gpu, CONFIG), expected)


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(1, 2)], ids=["", "lookahead"])
@pytest.mark.parametrize("kinds", WITH_TABLES, ids="-".join)
def test_tables_in_host_memory_behind_a_cache_that_evicts(kinds, lookahead):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    on_gpu = copied(model, GPU, torch.float32)
    with host_tables(model) as tables:
        on_gpu.attach_tables(tables)
        check(make_executor(on_gpu, CONFIG, lookahead), expected)
        torch.cuda.synchronize()
        counted = [one for table in tables.values() for one in table.statistics().values()]
        assert any(counts.hits and counts.misses > 16 for counts in counted)


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(1, 2)])
@pytest.mark.parametrize("kinds", WITH_TABLES, ids="-".join)
def test_tables_on_disk_behind_caches_that_evict(kinds, lookahead, tmp_path):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    moved = copied(model, GPU, torch.float32)
    with disk_tables(model, tmp_path, slots=9) as tables:
        moved.attach_tables(tables)
        executor = make_executor(moved, CONFIG, lookahead)
        executor.warm_up()
        check(executor, expected)
        counted = [counts for t in tables.values() for counts in t.statistics().values()]
        assert all(counts.hits and counts.misses for counts in counted)


@pytest.mark.parametrize("kinds", WITH_TABLES, ids="-".join)
def test_micro_batches_of_tables_on_disk(kinds, tmp_path, monkeypatch):
    from engine.executors.cuda import buckets, step
    from engine.executors.micro_batch_count import SplitRule

    # whatever is fetched; the decode of all prompts, and the prompts, fill their graphs
    monkeypatch.setattr(step, "split_rule", lambda weight_bytes: SplitRule(((4, 2),)))
    monkeypatch.setattr(buckets, "_MIXED_TOKENS", (12,))
    run_layers, sizes = step.run_layers, set[int]()
    monkeypatch.setattr(
        step, "run_layers", lambda *args: sizes.add(len(args[2])) or run_layers(*args)
    )
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    prompts = PROMPTS | {"d": [12]}
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in prompts.items()}
    moved = copied(model, GPU, torch.float32)
    with disk_tables(model, tmp_path, slots=64) as tables:
        moved.attach_tables(tables)
        asked = [greedy(name, ids, COUNT) for name, ids in prompts.items()]
        check(make_executor(moved, CONFIG), expected, {0: asked})
    assert 2 in sizes


@contextmanager
def disk_tables(model, folder, *, slots):
    """The tables of a model in files, with ``slots`` rows in host memory, and few on the GPU."""
    from engine.executors.cuda.micro_batches import HINTS_PER_LAYER
    from memory_ops.tables.disk import DiskTable, row_cache_bytes
    from memory_ops.tables.gpu_disk import gpu_disk_table
    from memory_ops.tables.host_cache_size import host_cache_bytes
    from memory_ops.tables.host_calls import HostCalls

    calls, tables, layers = HostCalls(), {}, model.config.num_layers
    for number, (name, table) in enumerate(model.tables.items()):
        file, rows = folder / str(number), table.rows
        file.write_bytes(rows.numpy().tobytes())
        size = rows.shape[1] * rows.itemsize
        cache_bytes = row_cache_bytes(slots, size, len(rows))
        disk = DiskTable(file, 0, tuple(rows.shape), rows.dtype, cache_bytes)
        on_gpu, num_hints = host_cache_bytes(1, size), layers * HINTS_PER_LAYER
        tables[name] = gpu_disk_table(
            disk, on_gpu, GPU, calls, num_layers=layers, num_hints=num_hints
        )
    try:
        yield tables
    finally:
        for table in tables.values():
            table.close()


@contextmanager
def host_tables(model):
    """The tables of a model in host memory, each behind a small cache."""
    from memory_ops.page_lock import PageLock
    from memory_ops.tables.host import HostTable
    from memory_ops.tables.row_cache import RowCache, rows_memory
    from memory_ops.tables.streams import cuda_streams

    tables, layers = {}, model.config.num_layers
    for name, table in model.tables.items():
        # 16 of the 64 rows, and what one token of two heads reads
        cache_bytes = 64 * 32 * 4 + 16 * (32 * 4 + 16)
        cache = RowCache(table.rows, cache_bytes, GPU, num_layers=layers, num_overflow=64)
        lock = PageLock(rows_memory(table.rows), GPU)
        tables[name] = HostTable(table.rows, cache, cuda_streams(GPU), lock)
    try:
        yield tables
    finally:
        for table in tables.values():
            table.close()


@pytest.mark.parametrize("tier", ["device", "host"])
def test_row_patches(tier):
    kinds = ("memory_plus", "dense", "memory_plus")
    model = model_of(kinds)
    patches = [patch_of(model, seed, count=40) for seed in (1, 2)]
    first, second = patches
    sets = {"a": ((first, 1.0), (second, -0.5)), "b": (), "c": ((second, 1.0),)}
    expected = {
        name: plain_greedy(changed_model(model, *sets[name], kinds=kinds), ids, COUNT)
        for name, ids in PROMPTS.items()
    }
    asked = {0: [asks(name, COUNT, *sets[name], prompt=ids) for name, ids in PROMPTS.items()]}
    moved = [patch.to(GPU) for patch in patches]
    on_gpu = copied(model, GPU, torch.float32)
    with host_tables(model) as tables:
        if tier == "host":
            on_gpu.attach_tables(tables)
        check(make_executor(on_gpu, CONFIG), expected, asked, moved)
    # the same reads on the CPU: nothing of padding, warm-up or captures is counted
    served = engine_of(model, CONFIG)
    for patch in patches:
        served.patches.put(patch)
    assert run(served, asked) == expected
    torch.cuda.synchronize()
    for patch, on_card in zip(patches, moved, strict=True):
        assert on_card.counts() == tuple(3 * count for count in patch.counts())


def test_patches_that_another_thread_loads_while_requests_decode():
    kinds, config = ("memory_plus", "dense", "memory_plus"), replace(CONFIG, max_num_seqs=8)
    model = model_of(kinds)
    patches = [patch_of(model, seed, count=40) for seed in (1, 2, 3)]
    prompts = {str(n): [n + 1, 2 * n + 3, 5] for n in range(8)}
    served = Engine(make_executor(copied(model, GPU, torch.float32), config), config)
    served.warm_up()

    def reload(old, new):
        # requests still use the old one; it dies with them, and a later round loads it again
        served.unload_patch(old.content_hash)
        served.patches.put(new.to(GPU))
        for seed in range(10, 40):
            # memory of all sizes is allocated, written and freed
            other = patch_of(model, seed, count=seed)
            served.patches.put(other.to(GPU))
            served.unload_patch(other.content_hash)

    served.patches.put(patches[0].to(GPU))
    # a thread's stream is the default one, which does not wait for that of the steps
    with ThreadPoolExecutor(1) as loader:
        for number in range(6):
            used, following = patches[number % 3], patches[(number + 1) % 3]
            changed = changed_model(model, (used, 1.0), kinds=kinds)
            expected = {name: plain_greedy(changed, ids, COUNT) for name, ids in prompts.items()}
            for name, ids in prompts.items():
                served.add(asks(name, COUNT, (used, 1.0), prompt=ids))
            loading = loader.submit(reload, used, following)
            assert run(served, {}) == expected
            loading.result()
            served.check_idle()
            assert [one.content_hash for one in served.patches.statistics()] == [
                following.content_hash
            ]


SAMPLING = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0, "logit_bias": ((7, 4.0), (9, -4.0))},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
]


def test_sampled_tokens_in_graphs_and_beside_them():
    model = random_model(tiny_config())
    params = [SamplingParams(max_tokens=COUNT, ignore_eos=True, **one) for one in SAMPLING]
    sampled = {0: [Request(str(n), (1, 2, 3 + n), one) for n, one in enumerate(params)]}
    expected = run(engine_of(model, CONFIG), sampled)
    executor = make_executor(copied(model, GPU, torch.float32), CONFIG)
    executor.warm_up()
    assert run(Engine(executor, CONFIG), sampled) == expected
