"""Tensor-parallel ranks on GPUs: what is refused before they load, their tokens, their death."""

import os
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.parallel.messages import MeetOthers
from engine.executors.parallel.shares import RankShare
from server.config import EngineSettings, keep_nccl_local
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.models import (
    feed_forward_changes,
    greedy,
    random_model,
    run,
    save_model,
    tiny_config,
)
from tests.server.running import running
from tests.server.test_parallel_engine import BODY, check_death
from weights.checkpoints.gpu_tier import GpuTierChoice
from weights.models.named_models import ModelFolder

pytest.importorskip("triton")

from engine.executors.cuda.rank_sizing import StepTooLargeError
from server import parallel_gpu

GIB = 2**30


@pytest.fixture
def check(monkeypatch):
    """``check_memory`` of one of two ranks on a GPU of 10 GiB, all of which may be used."""

    def choice(*arguments):
        return GpuTierChoice(*arguments, lambda device: (10 * GIB, 10 * GIB))

    monkeypatch.setattr(parallel_gpu, "GpuTierChoice", choice)
    config = tiny_config(**feed_forward_changes("memory_plus"))

    def call(weights, rows, **engine):
        values = {"gpu_memory_utilization": 1.0, "patch_memory_gib": 2.0}
        parallel_gpu.check_memory(
            RankShare(config, 1, 2),
            EngineConfig(**(values | engine)),
            torch.device("cuda", 1),
            weight_bytes=int(weights * GIB),
            row_bytes=int(rows * GIB),
            itemsize=2,
        )

    return call


def test_the_share_of_each_rank_must_fit_on_its_gpu(check):
    # half of the patches' 2 GiB, and of the KV pool, belong to each rank
    check(4, 5)
    check(4, 3, kv_cache_gib=4.0)
    with pytest.raises(ConfigError, match=r"^device: the weights take 10.50 GiB.* cuda:1"):
        check(10.5, 0)
    with pytest.raises(ConfigError, match=r"^table_tier: device needs 5.10 GiB.* leave 5.00 GiB"):
        check(4, 5.1)
    with pytest.raises(ConfigError, match=r"^kv_cache_gib: 2.05 GiB does not fit: .*2.00 GiB"):
        check(4, 3, kv_cache_gib=4.1)
    with pytest.raises(ConfigError, match=r"^patch_memory_gib: 7.00 GiB does not fit"):
        check(4, 3, patch_memory_gib=14.0)


def test_settings_are_refused_before_a_rank_starts(memory_plus_folder, monkeypatch):
    monkeypatch.setattr(parallel_gpu, "Ranks", None)
    options, first = ModelOptions(tensor_parallel=2), torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="kv_dtype: fp8 cannot be combined with tensor_parallel"):
        parallel_gpu.gpu_parallel_executor(
            options, memory_plus_folder, EngineConfig(kv_dtype="fp8"), first
        )


def test_nccl_listens_on_the_loopback_interface_unless_the_user_names_another(monkeypatch):
    # the environment is that of the whole test process
    monkeypatch.setattr(os, "environ", {})
    keep_nccl_local()
    assert os.environ == {"NCCL_SOCKET_IFNAME": "lo"}
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "eth0"})
    keep_nccl_local()
    assert os.environ == {"NCCL_SOCKET_IFNAME": "eth0"}


def test_the_death_of_a_rank_ends_the_process(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "_exit", lambda status: calls.append(status))
    ranks = SimpleNamespace(delete_store=lambda: calls.append("store"))
    parallel_gpu._end(ranks, lambda: calls.append("told"))
    assert calls == ["store", "told", 1]


def test_a_rank_whose_gpu_cannot_hold_a_step_does_not_wait_for_rank_0(monkeypatch, caplog):
    def fail(*arguments):
        raise StepTooLargeError("max_batched_tokens: too large")

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(parallel_gpu, "sized_rank", fail)
    monkeypatch.setattr(os, "_exit", end)
    # rank 0 sends no second message: it waits for this rank in a collective
    received = iter([MeetOthers()])
    connection = SimpleNamespace(send=lambda message: None, recv=lambda: next(received))
    rank = SimpleNamespace(group=SimpleNamespace(meet=lambda *arguments: None))
    settings = SimpleNamespace(rank=1, store=None)
    with pytest.raises(SystemExit, match="1"):
        parallel_gpu._run(connection, settings, EngineConfig(), SimpleNamespace(device=None), rank)
    assert "rank 1 ends: max_batched_tokens: too large" in caplog.text


@pytest.mark.slow
def test_a_server_of_interpreted_ranks_gives_the_tokens_of_the_cpu_and_ends(tmp_path):
    # interpreted kernels are slow, so the model has one layer
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    folder = save_model(model, tmp_path / "model")
    with running(folder, "--device", "cpu") as server:
        wanted = server.complete(**BODY).json()["choices"]
    sizes = "--max-num-seqs", "1", "--max-batched-tokens", "16", "--stall-timeout-s", "60"
    options = "--device", "cuda", "--tensor-parallel", "2", *sizes
    with running(folder, *options, program="tests.server.gpu_ranks_serve") as server:
        assert check_death(server) == wanted


two_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("sharding", ["columns", "rows"])
def test_two_gpus_give_the_tokens_of_the_cpu(memory_plus_folder, sharding):
    def answers(**options):
        options = ModelOptions(model=str(memory_plus_folder), **options)
        folder = ModelFolder(memory_plus_folder)
        config = EngineConfig(max_num_seqs=4, max_model_len=64, kv_cache_gib=0.01)
        with closing(build_engine(EngineSettings(options, folder, config))) as engine:
            engine.warm_up()
            return run(engine, {0: [greedy("a", [1, 2, 3], 12), greedy("b", [4] * 9, 12)]})

    ranks = {"device": "cuda", "tensor_parallel": 2, "table_sharding": sharding}
    assert answers(**ranks) == answers(device="cpu")


@pytest.mark.gpu
@two_gpus
def test_the_server_of_a_killed_gpu_rank_ends(memory_plus_folder):
    options = "--device", "cuda", "--tensor-parallel", "2", "--stall-timeout-s", "60"
    with running(memory_plus_folder, *options) as server:
        assert check_death(server)
