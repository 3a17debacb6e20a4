"""Tables on disk under the CUDA executor, interpreted: tokens, graphs in pieces, errors."""

from collections.abc import Callable
from functools import partial

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.lookahead import LookaheadConfig
from engine.request import Request
from engine.sampling.params import SamplingParams
from memory_ops.native import disk_rows
from memory_ops.native.disk_rows import ReadFault
from memory_ops.tables.device import DeviceTable
from memory_ops.tables.gpu_disk import GpuDiskTable
from memory_ops.tables.host_calls import HostCalls
from memory_ops.tables.table_statistics import TableStatistics
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.interpreted import test_patches
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.engine.executors.test_memory_recorder import check_reads, reads_of
from tests.engine.test_company import step_all, tokens
from tests.memory_ops.interpreted.test_gpu_disk import gpu_disk
from tests.memory_ops.late_stream import PromptStream
from tests.memory_ops.table_kinds import KINDS, table_of
from tests.models import (
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    tiny_config,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler"),
]

PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9, 10], "c": [11]}
CONFIG = EngineConfig(
    kv_cache_gib=0.001, max_num_seqs=3, max_batched_tokens=16, block_size=4, max_model_len=64
)
COUNT = 4
# a token of the tiny model reads six rows, of tables of 64
CACHES = {"slots": 9, "cached": 8, "overflow": 64}


def on_disk(folder, **options) -> Callable[..., GpuDiskTable]:
    """Makes tables of one model, which share the host's calls."""
    calls = HostCalls()
    return partial(gpu_disk, folder, stream=PromptStream(), calls=calls, **CACHES | options)


def served_from_disk(model, folder, device=None, lookahead=None, *, warm=False, **options):
    """An engine whose tables are in files, behind caches of 8 and 9 rows."""
    make = on_disk(folder, num_layers=model.config.num_layers, **options)
    model.attach_tables({name: make(table.rows) for name, table in model.tables.items()})
    return Engine(cuda_on_cpu(model, CONFIG, device, lookahead, warm=warm), CONFIG)


def check(
    model, folder, lookahead=None, *, warm=False, count=COUNT, names="abc"
) -> tuple[FakeDevice, TableStatistics]:
    """Compare tokens with those of a plain loop on tables in memory; returns the tables' counts."""
    prompts = {name: PROMPTS[name] for name in names}
    expected = {name: plain_greedy(model, ids, count) for name, ids in prompts.items()}
    device = FakeDevice()
    served = served_from_disk(model, folder, device, lookahead, warm=warm)
    found = run(served, {0: [greedy(name, ids, count) for name, ids in prompts.items()]})
    assert found == expected
    counted = [counts for t in model.tables.values() for counts in t.statistics().values()]
    assert all(counts.hits and counts.misses > 9 for counts in counted)
    return device, TableStatistics.sum(counted)


def test_tokens_while_both_caches_evict(tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    _, counts = check(model, tmp_path, count=2, names="a")
    assert not counts.prefetched


@pytest.mark.parametrize(
    ("kinds", "memory"),
    [
        (("pkm", "dense", "pkm"), {"share_values": False}),
        (("dense", "peer"), {}),
        (("memory_plus", "pkm"), {"placement": "beside"}),
    ],
)
def test_tokens_of_every_kind_of_memory(kinds, memory, tmp_path):
    model = random_model(tiny_config(**feed_forward_changes(*kinds, **memory)))
    _, counts = check(model, tmp_path)
    # PEER hints the rows of its second table itself
    assert bool(counts.prefetched) == ("peer" in kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_format(kind, tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    tables = {name: table_of(kind, table.rows) for name, table in model.tables.items()}
    model.attach_tables({name: DeviceTable(table) for name, table in tables.items()})
    assert check(model, tmp_path)


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(2, 3)])
def test_steps_are_graphs_between_memory_layers(lookahead, tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus", "dense", "memory_plus")))
    device, counts = check(model, tmp_path, lookahead, warm=True)
    assert device.num_replays == COUNT - 1
    # a lookup cuts a graph where its rows are known and where they are needed, a hint once
    cuts = 2 * 2 + (2 if lookahead else 0)
    assert device.num_cuts == device.num_replays * cuts
    assert bool(counts.prefetched) == (lookahead is not None)


def test_rows_of_traced_tokens(tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    kept = dict(model.tables)
    request = greedy("a", PROMPTS["a"], COUNT, memory_trace=True)
    reads = reads_of(served_from_disk(model, tmp_path, warm=True), [request])
    assert len(reads["a"]) == COUNT
    model.attach_tables(kept)
    check_reads(model, PROMPTS["a"], reads["a"])


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(1, 2)])
def test_row_patches(lookahead, tmp_path):
    kinds = ("memory_plus", "dense", "memory_plus")
    make = on_disk(tmp_path, num_layers=len(kinds))
    assert test_patches.check(kinds, table_of=make, lookahead=lookahead).num_replays


def test_a_read_error_ends_the_requests_that_need_the_row(tmp_path):
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    expected = {name: plain_greedy(model, ids, 2) for name, ids in PROMPTS.items()}
    device = FakeDevice()
    # a later read of the row succeeds
    fault = ReadFault(every=10, result=-5)
    served = served_from_disk(model, tmp_path, device, slots=64, cached=64, fault=fault)
    # a real device runs the work of a step when it is launched
    device.is_ahead = True
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    found, errors = {}, []
    for attempt in range(3):
        for name, ids in PROMPTS.items():
            served.add(Request(f"{name}{attempt}", tuple(ids), params))
        for request_id, outputs in step_all(served).items():
            if outputs[-1].error is not None:
                errors.append(outputs[-1].error)
            else:
                found[request_id] = tokens(outputs)
    assert errors and set(errors) == {"TableReadError in the engine"}
    assert found and all(ids == expected[name[0]] for name, ids in found.items())
