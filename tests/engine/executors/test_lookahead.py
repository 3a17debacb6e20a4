"""Prefetch of predicted rows: rows are in memory early, and tokens stay the same."""

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from engine.executors.lookahead import Lookahead, LookaheadConfig, predicted_memories
from engine.model.layout import TokenLayout
from memory_ops.native import disk_rows
from memory_ops.tables.disk import DiskTable, row_cache_bytes
from memory_ops.tables.table_statistics import TableStatistics
from tests.models import (
    eager,
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    save_model,
    tiny_config,
)
from weights.checkpoints.checkpoint import load_model

KINDS = ("dense", "memory_plus", "dense", "pkm", "dense", "memory_plus")
PROMPTS = [[(7 * i + j) % 250 for j in range(1 + i % 9)] for i in range(6)]


def model_of(kinds=KINDS):
    return random_model(tiny_config(**feed_forward_changes(*kinds)))


def on_disk(folder, rows, kinds):
    """The model of a folder with tables on disk that cache ``rows`` rows each."""
    model, config = load_model(folder)
    tables = {
        name: DiskTable(
            folder / f"table-{i:05}.safetensors",
            4096,
            (64, 32),
            torch.float32,
            row_cache_bytes(rows, 32 * 4, 64),
        )
        for i, name in enumerate(config.model.table_names)
    }
    model.attach_tables(tables)
    return model


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
@pytest.mark.parametrize("kinds", [KINDS, ("dense", "peer", "dense", "pkm")])
@pytest.mark.parametrize("distance", [1, 2, 3, 9])
@pytest.mark.parametrize(("make", "rows"), [(make_executor, 16), (eager, 64), (make_executor, 64)])
def test_tokens_stay_the_same_and_rows_are_prefetched(tmp_path, kinds, distance, make, rows):
    model = model_of(kinds)
    folder = save_model(model, tmp_path / "model")
    ahead = on_disk(folder, rows, kinds)
    config = EngineConfig(max_num_seqs=3, max_batched_tokens=40, kv_cache_gib=0.001)
    requests = {0: [greedy(str(i), prompt, 6) for i, prompt in enumerate(PROMPTS)]}
    lookahead = LookaheadConfig(distance, candidates=4)
    found = run(Engine(make(ahead, config, lookahead), config), requests)
    assert found == {str(i): plain_greedy(model, prompt, 6) for i, prompt in enumerate(PROMPTS)}
    for table in ahead.tables.values():
        counted = TableStatistics.sum(table.statistics().values())
        assert 0 < counted.prefetched_used <= counted.prefetched


def test_the_layers_real_input_predicts_every_row():
    model = model_of(("dense", "memory_plus"))
    (memory,) = predicted_memories(model.layers)
    x = torch.randn(5, 32)
    found = memory.rows(x, 3)
    entered = {}
    norm = model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, inputs, out: entered.update(x=inputs[0]))
    layout = TokenLayout(torch.arange(5), (0, 5))
    read = model(torch.arange(5), layout, torch.tensor([4]), with_trace=True).memory[1].rows_THK
    assert torch.equal(memory.rows(entered["x"], 3), read)
    # more candidates include those of fewer; the number of subkeys limits them
    wider = memory.rows(x, 50)
    assert wider.shape == (5, 2, 8)
    assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(found[0], wider[0], strict=True))


def test_rows_in_memory_are_not_predicted():
    model = model_of()
    memories = predicted_memories(model.layers)
    assert Lookahead(memories, LookaheadConfig(2, 3)).layers == frozenset()
    for table in model.tables.values():
        table.fetched_capacity = 64
    assert Lookahead(memories, LookaheadConfig(3, 3)).layers == {0, 1, 3}
    assert Lookahead(memories, LookaheadConfig(9, 3)).layers == {0}


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="distance: must be 1 or more, not 0"):
        LookaheadConfig(0, 1)
    with pytest.raises(ValueError, match="candidates: must be 1 or more, not 0"):
        LookaheadConfig(1, 0)
