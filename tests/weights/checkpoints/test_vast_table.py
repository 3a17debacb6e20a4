"""A table of 16 GiB is served with a row cache of 512 MiB and 2 GiB of memory in total."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory_ops.native import disk_rows
from tests.models import (
    feed_forward_changes,
    random_weights,
    save_with_sparse_tables,
    tiny_config,
)
from weights.checkpoints.tensor_files import list_tensors

ROOT = Path(__file__).parents[3]
FEW, MANY, WIDTH = 512, 2048, 1024
ROW_BYTES = 4 * WIDTH
# subkeys of the large table (both halves) that the small one has too, the last one included
LIVE = torch.arange(FEW) * (MANY // FEW) + MANY // FEW - 1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler"),
]

RUN = """
import json, sys
from pathlib import Path
import torch
from engine.config import EngineConfig
from memory_ops.tables.table_statistics import TableStatistics
from server.model_options import ModelOptions
from server.engine_entry import served_engine
from server.model_loading import load_served
from tests.models import greedy, run
from weights.checkpoints.summary import summarize

def read_number(file, name):
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

folder, tier, cache = sys.argv[1:]
before = read_number("/proc/self/io", "rchar")
summary = summarize(Path(folder))
options = ModelOptions(folder, table_tier=tier, table_cache=cache or None)
config = EngineConfig(kv_cache_gib=0.05, max_num_seqs=4)
served = load_served(options, Path(folder), config, torch.device("cpu"))
model = served.model
engine = served_engine(served, config)
loaded = read_number("/proc/self/io", "rchar") - before
requests = [
    greedy(str(i), [(j * (2 * i + 3) + j * j // 7) % 256 for j in range(480)], 16)
    for i in range(12)
]
tokens = run(engine, {0: requests})
table = model.tables["memory.table"] if tier == "disk" else None
print(json.dumps({
    "tokens": tokens,
    "table_bytes": summary.table.num_bytes,
    "bytes_read_to_load": loaded,
    "most_resident": read_number("/proc/self/status", "VmHWM") * 1024,
    "slots": table.num_slots if table else 0,
    "misses": TableStatistics.sum(table.statistics().values()).misses if table else 0,
}))
"""


def models(folder):
    """Two models that read the same values; the second has a table 16 times as large."""
    memory = {"num_heads": 4, "top_k": 32, "query_dim": 16, "value_dim": WIDTH}
    kinds = "memory_plus", "dense", "memory_plus"
    few, many = (
        random_weights(tiny_config(**feed_forward_changes(*kinds, **memory, num_subkeys=number)))
        for number in (FEW, MANY)
    )
    weights = few.state_dict()
    for name in [name for name in weights if name.endswith("memory.subkeys")]:
        # all other subkeys are zeros, whose scores are lower than the chosen ones
        spread = torch.zeros_like(many.state_dict()[name])
        spread[:, :, LIVE] = weights[name]
        weights[name] = spread
    many.load_state_dict(weights)
    folders = [
        save_with_sparse_tables(model, folder / name) for model, name in ((few, "a"), (many, "b"))
    ]
    # some rows are nonzero, among them the last one
    rows = torch.arange(FEW * FEW).flip(0)[::17]
    vast_rows = LIVE[rows // FEW] * MANY + LIVE[rows % FEW]
    values = torch.randn(len(rows), WIDTH)
    for own, places in zip(folders, (rows, vast_rows), strict=True):
        stored = list_tensors(own)["memory.table"]
        with open(stored.file, "r+b") as file:
            for row, place in zip(values.numpy(), places.tolist(), strict=True):
                os.pwrite(file.fileno(), row.tobytes(), stored.offset + place * ROW_BYTES)
    return folders


def outcome(folder, tier, cache=""):
    arguments = [sys.executable, "-c", RUN, str(folder), tier, cache]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_large_table_gives_the_tokens_of_a_small_one_within_its_memory_limit(tmp_path):
    few, many = models(tmp_path)
    wanted = outcome(few, "device")
    found = outcome(many, "disk", "512MiB")
    assert found["table_bytes"] == 2**34
    assert found["tokens"] == wanted["tokens"]
    assert found["bytes_read_to_load"] < 2**24
    # the cache was full and evicted rows
    assert found["misses"] > found["slots"] > 2**29 // ROW_BYTES * 0.98
    assert 2**29 < found["most_resident"] < 2**31
