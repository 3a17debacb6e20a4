"""Traced tokens name the rows that a plain forward reads, and reads of rows are counted."""

from collections import Counter

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.executors.executor import make_executor
from engine.executors.memory_recorder import MAX_TRACED_ROWS
from engine.executors.row_usage import RowUsage
from engine.model.layout import TokenLayout
from tests.engine.delayed_executor import delayed
from tests.models import (
    eager,
    engine_of,
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    tiny_config,
)

CONFIG = EngineConfig(max_num_seqs=4, max_batched_tokens=8, block_size=4, kv_cache_gib=0.01)
PROMPTS = {"a": [1, 2, 3], "b": list(range(20, 31)), "c": [7]}
COUNT = 6


def memory_model(*kinds, **memory):
    torch.manual_seed(5)
    return random_model(tiny_config(**feed_forward_changes(*kinds, **memory)))


def plain_reads(model, ids):
    """Weights by row that each memory layer reads at the last of these tokens."""
    ids_T = torch.tensor(ids)
    layout = TokenLayout(torch.arange(len(ids)), (0, len(ids)))
    traces = model(ids_T, layout, ids_T[:0], with_trace=True).memory
    found = {}
    for layer, (rows_THK, weights_THK) in traces.items():
        found[layer] = Counter()
        for row, weight in zip(rows_THK[-1].flatten(), weights_THK[-1].flatten(), strict=True):
            found[layer][int(row)] += float(weight)
    return found


def check_reads(model, prompt, reads):
    """Compare the reads of a greedy answer, one tuple per token, with those of a plain loop."""
    tokens = plain_greedy(model, prompt, len(reads))
    for count, layers in enumerate(reads):
        wanted = plain_reads(model, prompt + tokens[:count])
        assert [read.layer for read in layers] == list(wanted)
        for read in layers:
            row_weights = wanted[read.layer]
            assert len(read.rows) == len(set(read.rows)) == min(MAX_TRACED_ROWS, len(row_weights))
            assert list(read.weights) == sorted(read.weights, reverse=True)
            assert read.weights == pytest.approx([row_weights[row] for row in read.rows], abs=1e-5)
            left = [weight for row, weight in row_weights.items() if row not in read.rows]
            assert max(left, default=0) <= read.weights[-1] + 1e-5


def reads_of(engine, requests):
    """Run requests to their ends; the reads of each, one tuple per token."""
    for request in requests:
        engine.add(request)
    reads = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            reads[output.request_id] += output.memory_reads
    return reads


@pytest.mark.parametrize("make", [eager, make_executor, delayed])
@pytest.mark.parametrize(
    "kinds", [("memory_plus", "dense", "memory_plus"), ("pkm",), ("peer", "moe")], ids="-".join
)
def test_reads_are_those_of_a_plain_forward(make, kinds):
    model = memory_model(*kinds)
    requests = [greedy(name, ids, COUNT, memory_trace=name != "c") for name, ids in PROMPTS.items()]
    reads = reads_of(engine_of(model, CONFIG, make=make), requests)
    assert reads["c"] == []
    for name in ("a", "b"):
        assert len(reads[name]) == COUNT
        check_reads(model, PROMPTS[name], reads[name])


def test_heads_that_read_the_same_row_are_summed():
    model = memory_model("memory_plus", num_heads=4, num_subkeys=2, top_k=2)
    (reads,) = reads_of(
        engine_of(model, CONFIG), [greedy("a", [1, 2], COUNT, memory_trace=True)]
    ).values()
    check_reads(model, [1, 2], reads)
    assert all(len(read.rows) <= 4 for layers in reads for read in layers)


def test_a_model_without_memory_layers_refuses_traces():
    with pytest.raises(RequestError, match="memory_trace: this model has no memory layers"):
        engine_of(random_model(tiny_config()), CONFIG).add(greedy("a", [1], 1, memory_trace=True))


def test_one_step_of_16_is_counted():
    model = memory_model("memory_plus", "memory_plus", "peer")
    engine = engine_of(model, CONFIG)
    reads_of(engine, [greedy("a", [1, 2, 3], 40)])
    values, down = engine.memory_report()
    assert values.usage is not None and down.usage is None
    assert values.layers == (0, 1, 2) and down.layers == (2,)
    assert (values.tier, values.num_rows, values.value_dim) == ("device", 64, 32)
    # three tokens of the prompt, then one at steps 16 and 32; three layers, two heads, three rows
    assert values.usage.num_reads == (3 + 1 + 1) * 3 * 2 * 3
    assert sum(rows for _, rows in values.usage.histogram) <= 64


def test_usage_summarises_counts():
    usage = RowUsage(1000, torch.device("cpu"))
    assert usage.summary() == (0, (), ())
    usage.add(torch.tensor([[3, 3], [3, 999]]))
    usage.add(torch.tensor([5, 999]))
    assert usage.summary() == (6, ((3, 3), (999, 2), (5, 1)), ((1, 1), (2, 2)))


def test_counts_are_halved_before_they_overflow(monkeypatch):
    monkeypatch.setattr("engine.executors.row_usage._MOST_READS", 8)
    usage = RowUsage(4, torch.device("cpu"))
    usage.add(torch.tensor([1] * 6 + [2] * 2))
    assert usage.summary() == (4, ((1, 3), (2, 1)), ((1, 1), (2, 1)))
