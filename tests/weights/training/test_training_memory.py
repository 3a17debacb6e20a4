"""Memory of training: what torch allocates, and refusals of what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from weights.available_memory import AvailableMemory
from weights.training import run_plan
from weights.training.loss import batch_loss
from weights.training.new_model import model_config, new_model, planned_model
from weights.training.optimizer import Optimizer
from weights.training.token_stream import PackedTokens
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from weights.training.training_memory import training_memory

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
MEMORY = {"num_heads": 4, "num_subkeys": 64, "top_k": 16, "query_dim": 32, "value_dim": 64}
KINDS = {
    "dense": {},
    "wide": {"intermediate_size": 512, "num_key_value_heads": 1},
    "memory": {"memory": MEMORY | {"layers": {"1": "memory_plus"}}},
    "beside": {"memory": MEMORY | {"layers": {"0": "memory_plus"}, "placement": "beside"}},
    "moe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
TOKENS = 512
DATA = DataConfig(("texts",))


def planned(kind, vocab_size=500, processes=1, **settings):
    of_optimizer = {
        name: settings.pop(name) for name in ("row_wise", "moment_dtype") if name in settings
    }
    optimizer = OptimizerConfig(**of_optimizer)
    run = RunConfig(1, tokens_per_step=TOKENS, **settings)
    config = TrainConfig(DATA, run, optimizer, SHAPE | KINDS[kind])
    shape = model_config(config.model, vocab_size)
    return shape, training_memory(planned_model(shape), shape, config, processes)


def test_processes_share_the_tokens_of_a_pass():
    (_, one), (_, four) = planned("memory"), planned("memory", processes=4)
    assert four.activations == one.activations // 4
    assert four.certain == one.certain


def saved_bytes(model, tables, dtype):
    """Bytes of the tensors that a pass saves for its backward pass, without the weights."""
    seen = {}
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    weights |= {table.table_RV.untyped_storage().data_ptr() for table in tables}

    def saved(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    ids = np.arange(TOKENS) % 500
    batch = PackedTokens(ids, ids, np.arange(TOKENS) % 128, tuple(range(0, TOKENS + 1, 128)))
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        loss = batch_loss(model, batch, dtype)
    assert loss.nats > 0
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_near_what_torch_saves(kind, dtype):
    shape, memory = planned(kind, dtype=dtype)
    model, tables = new_model(shape, 0)
    found = saved_bytes(model, tables.values(), getattr(torch, dtype))
    # two more copies of the logits live for a moment
    found += 2 * 4 * 500 * TOKENS
    assert memory.activations == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("options", [{}, {"row_wise": True}, {"moment_dtype": "bfloat16"}], ids=str)
def test_weights_and_moments_are_exact(options):
    shape, memory = planned("memory", **options)
    model, tables = new_model(shape, 0)
    optimizer = Optimizer(model, list(tables.values()), OptimizerConfig(**options))
    weights = list(model.parameters())
    assert memory.weights == memory.gradients == sum(one.nbytes for one in weights)
    moments = [part for one in weights for part in optimizer.moments(one).values()]
    assert memory.moments == sum(one.nbytes for one in moments)
    assert memory.rows == sum(table.table_RV.nbytes for table in tables.values())
    of_rows = [part for one in optimizer.tables.moments for part in one if part is not None]
    assert memory.row_moments == sum(one.nbytes for one in of_rows)


def test_a_table_in_host_memory_is_counted_there():
    _, whole = planned("memory")
    _, apart = planned("memory", device="cuda", table_tier="host")
    assert apart.certain == whole.certain - whole.rows + 4 * 64**2
    assert apart.total == apart.certain + whole.activations
    needed = apart.rows + apart.row_moments
    apart.check_host_fits(AvailableMemory(2 * needed, "MemAvailable"), 2)
    with pytest.raises(ConfigError, match="run.table_tier: host needs .* is available"):
        apart.check_host_fits(AvailableMemory(2 * needed - 1, "MemAvailable"), 2)
    lines = apart.describe(AvailableMemory(2**40, "free on the CUDA device"))
    assert "table rows" not in lines[0] and "places of rows" in lines[0]
    assert lines[1] == "host memory: table rows 1.0 MiB, moments of rows 2.0 MiB"


def test_row_wise_moments_of_a_table_in_host_memory_are_on_the_device():
    _, apart = planned("memory", device="cuda", table_tier="host", row_wise=True)
    _, two = planned("memory", device="cuda", table_tier="host")
    assert apart.certain == two.certain + 4 * 64**2
    apart = replace(apart, weights=0)
    apart.check_host_fits(AvailableMemory(apart.rows, "MemAvailable"), 1)
    apart = replace(apart, is_on_gpu=False)
    with pytest.raises(ConfigError, match=r"run.table_tier: host needs 1.0 MiB \(table rows 1.0"):
        apart.check_host_fits(AvailableMemory(apart.rows - 1, "MemAvailable"), 1)
    lines = apart.describe(AvailableMemory(2**40, "free on the CUDA device"))
    assert "moments of rows" in lines[0] and lines[1] == "host memory: table rows 1.0 MiB"


@pytest.mark.parametrize("tier", ["device", "host"])
def test_host_memory_holds_weights_and_tables_before_a_gpu_does(tier):
    _, memory = planned("memory", device="cuda", table_tier=tier, row_wise=True)
    needed = memory.weights + memory.rows
    memory.check_host_fits(AvailableMemory(2 * needed, "MemAvailable"), 2)
    refused = r"model: weights .* needs 2\.\d+ MiB .*table rows 1\.0 MiB\), but only .* \(MemAvail"
    with pytest.raises(ConfigError, match=refused):
        memory.check_host_fits(AvailableMemory(2 * needed - 1, "MemAvailable"), 2)
    line = memory.describe(None)[1 if tier == "device" else 2]
    assert line.startswith("host memory, at the start: weights") and "rows 1.0 MiB" in line


def test_a_plan_for_a_gpu_checks_host_memory(monkeypatch):
    _, memory = planned("memory", device="cuda")
    card = AvailableMemory(2**40, "a card")
    monkeypatch.setattr(run_plan, "_available", lambda device: card)
    monkeypatch.setattr(run_plan, "available_memory", lambda: AvailableMemory(2**20, "a test"))
    with pytest.raises(ConfigError, match=r"only 1\.00? MiB is available \(a test\)"):
        run_plan._memory_lines(memory, "cuda", 1)
    # the machine of a plan without a GPU is another one
    monkeypatch.setattr(run_plan, "_available", lambda device: None)
    assert "memory was not checked" in run_plan._memory_lines(memory, "cuda", 1)[-1]


def test_more_passes_and_recomputed_layers_take_less():
    _, whole = planned("memory")
    assert planned("memory", passes_per_step=4)[1].activations == whole.activations / 4
    assert planned("memory", checkpoint_activations=True)[1].activations < whole.activations


def test_a_model_that_does_not_fit_is_refused(tmp_path):
    _, memory = planned("memory")
    available = AvailableMemory(memory.certain, "MemAvailable")
    memory.check_fits(available)
    message = r"at least .* table rows 1.0 MiB\), but only .* is available \(MemAvailable\)"
    for little, processes in (
        (replace(available, num_bytes=memory.certain - 1), 1),
        (available, 2),
    ):
        with pytest.raises(ConfigError, match=message):
            memory.check_fits(little, processes)
    assert memory.disk_line(tmp_path / "new" / "run", 2).startswith("disk: checkpoints need")
    with pytest.raises(ConfigError, match=r"checkpoints need .* \(1 of .*\), but only .* is free"):
        replace(memory, rows=2**60).disk_line(tmp_path / "new" / "run", 1)
    assert "may run out" in memory.describe(available)[1]
    lines = memory.describe(AvailableMemory(memory.total * 2, "MemAvailable"), 2)
    assert len(lines) == 1 and "in each of 2 processes" in lines[0]
