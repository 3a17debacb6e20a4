"""The benchmark of training: small sizes on the CPU, its results, and refused options."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import training
from benchmarks.training import measure
from benchmarks.training_scale import CPU_SCALE, GPU_SCALE, TrainingScale, memory_twin
from engine.errors import ConfigError
from tests.models import tiny_config

SMALL = TrainingScale(
    device="cpu",
    table_rows=(64, 256),
    distinct_rows=128,
    width=8,
    peer_rows=256,
    peer_width=16,
    tokens=4,
    model=replace(tiny_config(num_layers=3), max_positions=8),
    model_tokens=20,
)


@pytest.mark.slow
def test_every_step_is_timed(tmp_path, capsys):
    results = measure(1, tmp_path / "results.json", scale=SMALL)
    names = [one.name for one in results]
    assert names[:2] == ["sparse", "sparse"] and [one.rows for one in results[:2]] == [64, 256]
    kinds = ["sparse", "sparse_bf16_moments", "sparse_row_wise", "adamw", "torch_sparse_adam"]
    assert names[2:] == [*kinds, "dense model", "memory model"]
    assert [one.distinct_rows for one in results[:3]] == [64, 128, 221]
    assert all(one.ms_per_step > 0 for one in results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [one["name"] for one in written] == names
    assert "torch_sparse_adam" in capsys.readouterr().out


def test_a_group_that_does_not_fit_does_not_end_the_others(monkeypatch, tmp_path):
    def fail(scale):
        raise torch.OutOfMemoryError("no memory")

    timed = dict.fromkeys(("tables of all sizes", "the optimisers"), fail)
    monkeypatch.setattr(training, "_GROUPS", {**timed, "the models": training._models})
    file = tmp_path / "results.json"
    with pytest.raises(ConfigError, match="too small for tables of all sizes and the optimisers"):
        measure(1, file, scale=SMALL)
    assert [one["name"] for one in json.loads(file.read_text())] == ["dense model", "memory model"]


def test_the_gpu_sizes_are_those_of_the_paper():
    assert GPU_SCALE.table_rows[0] == 2**18 and GPU_SCALE.table_rows[-1] == 2**24
    assert (GPU_SCALE.peer_rows, GPU_SCALE.peer_width) == (2**20, 1024)
    twin = memory_twin(GPU_SCALE.model, 1024)
    assert [i for i, kind in enumerate(twin.feed_forward) if kind == "memory_plus"] == [4, 12, 20]
    assert twin.memory.num_rows == 2**20 and twin.memory.value_dim == 1024
    assert CPU_SCALE.model is None


def test_wrong_options_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda needs a CUDA device"):
        measure(1, None, "cuda")
    with pytest.raises(ConfigError, match="rounds: must be at least 1, not 0"):
        measure(0, None)
