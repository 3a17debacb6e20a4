"""``memplus serve --tensor-parallel``: options, and the death of a process."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.device import chosen_device
from server.model_loading import load_served
from server.model_options import ModelOptions
from server.parallel_engine import parallel_executor, planned
from tests.models import (
    feed_forward_changes,
    random_model,
    random_weights,
    save_model,
    save_with_sparse_tables,
    tiny_config,
)
from tests.server.running import running
from tests.server.test_serve import children, ends
from weights.available_memory import AvailableMemory
from weights.checkpoints.table_tier import CpuTierChoice


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    torch.manual_seed(4)
    return save_model(random_model(tiny_config()), tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel: 0 is outside"),
        ({"tensor_parallel": 65}, "tensor_parallel: 65 is outside"),
        ({"table_sharding": "rows"}, "table_sharding: needs --tensor-parallel"),
        ({"tensor_parallel": 2, "table_sharding": "heads"}, "table_sharding: 'heads' is not one"),
        ({"tensor_parallel": 2, "weight_dtype": "int8"}, "weight_dtype: int8 cannot be combined"),
        ({"tensor_parallel": 2, "table_tier": "disk"}, "table_tier: disk cannot be combined"),
        ({"tensor_parallel": 2, "table_cache": "1GiB"}, "table_cache: cannot be combined"),
        ({"tensor_parallel": 2, "table_lookahead": 1}, "table_lookahead: cannot be combined"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        ModelOptions(**options)


def test_what_does_not_fit_the_model_is_refused_before_a_process_starts(dense_folder):
    for options, config, reason in (
        ({}, {"kv_dtype": "int8"}, "kv_dtype: int8 cannot be combined with tensor_parallel"),
        ({"table_sharding": "rows"}, {}, "table_sharding: requires value tables"),
        ({"table_dtype": "int8"}, {}, "table_dtype: requires value tables"),
        ({"verify_tables": True}, {}, "verify_tables: requires value tables"),
        ({"tensor_parallel": 3}, {}, "tensor_parallel: 3 exceeds num_key_value_heads 2"),
    ):
        chosen = ModelOptions(**({"tensor_parallel": 2} | options))
        with pytest.raises(ConfigError, match=reason):
            parallel_executor(chosen, dense_folder, EngineConfig(**config))


@pytest.mark.parametrize("sharding", ["columns", "rows"])
def test_a_machine_needs_memory_for_its_ranks_only(tmp_path, monkeypatch, sharding):
    changes = feed_forward_changes("memory_plus", num_subkeys=1024, value_dim=256)
    model = random_weights(tiny_config(**changes))
    folder = save_with_sparse_tables(model, tmp_path / "model")  # of 1 GiB

    def choice(request, largest_cache):
        return CpuTierChoice(request, lambda: AvailableMemory(800 * 2**20, "a test"), largest_cache)

    monkeypatch.setattr("server.model_loading.CpuTierChoice", choice)
    options = ModelOptions(tensor_parallel=2, table_sharding=sharding, table_tier="device")
    engine = EngineConfig(kv_cache_gib=0.01, max_patches=0)
    with pytest.raises(ConfigError, match=r"table_tier: device needs 1\.00 GiB, but the weights"):
        planned(options, folder, engine, "text", range(2))
    blocks = {
        planned(options, folder, engine, "text", ranks)[1].num_blocks
        for ranks in (range(1), range(1, 2))
    }
    per_token = model.config.kv_bytes_per_token(4)
    assert blocks == {engine.num_kv_blocks(per_token, model.config.max_positions)}
    with pytest.raises(ConfigError, match="needs memory for its ranks' part of the value tables"):
        planned(replace(options, table_tier="auto"), folder, engine, "text", range(1))


def test_commands_with_one_process_refuse_the_option(dense_folder):
    options = ModelOptions(tensor_parallel=2)
    assert chosen_device(options).type == "cpu"
    with pytest.raises(ConfigError, match="tensor_parallel: this command"):
        load_served(options, dense_folder, None, torch.device("cpu"))


def engine_and_rank(server):
    """The process ids of a server's engine and of rank 1."""
    ((engine, rank),) = (
        (child, grandchild)
        for child in children(server.process.pid)
        for grandchild in children(child)
        if b"parallel.ranks" in Path(f"/proc/{grandchild}/cmdline").read_bytes()
    )
    return engine, rank


@pytest.mark.slow
def test_a_stopped_rank_ends_with_a_killed_engine(dense_folder):
    with running(dense_folder, "--tensor-parallel", "2") as server:
        engine, rank = engine_and_rank(server)
        os.kill(rank, signal.SIGSTOP)
        os.kill(engine, signal.SIGKILL)
        assert ends(rank)
        assert server.process.wait(60) == 1


BODY = {"prompt": "to be", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def check_death(server):
    """Kill rank 1 while a request runs: the server says so, and ends with status 1.

    Returns the answer to an earlier request, ``BODY``.
    """
    first = server.complete(**BODY)
    assert first.status_code == 200 and first.json()["usage"]["completion_tokens"] == 12
    _, rank = engine_and_rank(server)
    lines = []
    endless = BODY | {"max_tokens": 480, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=endless) as response:
        for line in response.iter_lines():
            if not lines:
                os.kill(rank, signal.SIGKILL)
            lines.append(line)
    last = [json.loads(one[6:]) for one in lines if one.startswith("data: {")][-1]
    assert "the engine process has died" in last["error"]["message"]
    assert server.process.wait(60) == 1
    errors = server.process.stderr.read()
    assert f"tensor-parallel rank 1 (process {rank}) died (exit -9)" in errors
    assert "the engine process has died" in errors
    return first.json()["choices"]


@pytest.mark.slow
def test_a_server_whose_rank_is_killed_says_so_and_ends(memory_plus_folder):
    with running(memory_plus_folder, "--tensor-parallel", "2") as server:
        assert check_death(server)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_with_its_engine(memory_plus_folder):
    with running(memory_plus_folder, "--tensor-parallel", "2", "--engine-restarts", "1") as server:
        answer = server.complete(**BODY).json()["choices"]
        old = engine_and_rank(server)
        os.kill(old[1], signal.SIGKILL)
        while (again := server.complete(**BODY)).status_code != 200:
            assert again.status_code in (500, 503)
        assert again.json()["choices"] == answer
        assert not set(old) & set(engine_and_rank(server))
        assert all(ends(pid) for pid in old)
