"""Ranks on several nodes, as processes: tokens of one process, refusals, ends of nodes."""

import contextlib
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.request import PatchRef
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from server.node import _connected
from server.node_options import NodeSettings
from tests.engine.executors.parallel.test_executor import ALL_KINDS, PATCHED_KINDS, answers
from tests.engine.patches import patch_of
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from tests.programs import started
from tests.server.node_processes import KEY, MASTER, free_port, keyed, node, node_options
from tests.server.running import serve_command
from tests.server.test_serve import children, ends
from weights.models.named_models import ModelFolder

pytestmark = pytest.mark.slow
SERVING = r"serving .* at (http[^;]+);"


def saved(kinds, folder):
    """A saved model that 2, 3 and 4 ranks can share, and the model."""
    torch.manual_seed(3)
    changes = feed_forward_changes(*kinds, value_dim=48, share_values=False)
    config = tiny_config(hidden_size=48, num_heads=4, num_kv_heads=4, **changes)
    model = random_model(config)
    return save_model(model, folder), model


@contextlib.contextmanager
def several(folder, count, tmp_path, ranks, **options):
    """An engine in this process whose other ranks run on ``count`` nodes with this one."""
    port, words = free_port(), []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    threads = str(ranks // count * torch.get_num_threads())
    common = [*node_options(count, ranks, port, tmp_path / "key"), "--speculate", "ngram", *words]
    # the last one counts
    common += ["--threads", threads, "--max-patches", "64", "--patch-dir", str(tmp_path)]
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(node(folder, i, *common)) for i in range(1, count)]
        nodes = NodeSettings(count, 0, ranks // count, MASTER, port, KEY.encode())
        engine = engine_of(folder, nodes, tensor_parallel=ranks, **options)
        running = [rank for process in others for rank in children(process.pid)]
        assert len(running) == ranks - ranks // count
        with contextlib.closing(engine):
            yield engine
        assert all(map(ends, running))
        for process in others:
            assert process.wait(60) == 1
            assert "node 0 has ended, restarts its engine, or" in process.stderr.read()


def engine_of(folder, nodes=None, **options):
    model = ModelOptions(model=str(folder), device="cpu", **options)
    config = EngineConfig(kv_cache_gib=0.01, speculate="ngram")
    return build_engine(EngineSettings(model, ModelFolder(folder), config, nodes=nodes))


@pytest.mark.parametrize(
    ("kinds", "count", "ranks", "options"),
    [
        (PATCHED_KINDS, 2, 2, {}),
        (ALL_KINDS, 3, 3, {"table_sharding": "rows"}),
        (PATCHED_KINDS, 2, 4, {"table_sharding": "rows", "table_dtype": "int8"}),
    ],
    ids=["columns", "rows", "two-ranks-each"],
)
def test_the_tokens_are_those_of_one_process(kinds, count, ranks, options, tmp_path):
    folder, model = saved(kinds, tmp_path / "model")
    one = engine_of(folder, table_dtype=options.get("table_dtype", "auto"))
    with several(folder, count, tmp_path, ranks, **options) as engine:
        uses = ()
        if kinds == PATCHED_KINDS:
            patch = patch_of(model, 1)
            one.patches.put(patch)
            engine.patches.put(engine._executor.share_patch(patch))
            uses = (PatchRef(patch.content_hash, 0.5),)
        expected = answers(one, uses)
        assert answers(engine, uses) == expected
        if uses:
            assert answers(engine) == answers(one) != expected


def finished(process):
    """The exit code of a process and what it wrote."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def wait_for(process, pattern):
    """Read the lines of a process up to one with this pattern; its match."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(lines))


def kill_in_a_stream(pid, url):
    """Kill a process while the server sends an answer, which then ends with an error."""
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGKILL)
        assert any('"error"' in line for line in lines)


@contextlib.contextmanager
def waiting_server(folder, options):
    """A server that waits for node 1."""
    command = serve_command(folder, *options)
    with started(command, r"waiting for node 1 at 127\.0\.0\.2 port") as (process, _):
        yield process


def test_strange_nodes_are_refused_and_the_death_of_a_rank_is_reported(
    memory_plus_folder, tmp_path
):
    options = node_options(2, 2, free_port(), tmp_path / "key")
    other_key, (other_model, _) = tmp_path / "other", saved(("dense",), tmp_path / "model")
    other_key.write_text("another secret of 16 bytes")
    refused = [
        (memory_plus_folder, keyed(other_key), "port .* not accepted: it refused the node key"),
        (other_model, [], r"node 0 refuses node 1: config \w+: "),
        (memory_plus_folder, ["--max-num-seqs", "3"], "--max-num-seqs: 3 there, 64 on node 0"),
    ]
    with waiting_server(memory_plus_folder, options) as server, contextlib.ExitStack() as stack:
        wrong = [stack.enter_context(node(one, 1, *options, *more)) for one, more, _ in refused]
        for process, (_, _, reason) in zip(wrong, refused, strict=True):
            code, errors = finished(process)
            assert code == 2 and re.search(reason, errors), errors
        right = stack.enter_context(node(memory_plus_folder, 1, *options))
        url = f"{wait_for(server, SERVING)[1]}/v1/completions"
        (rank,) = children(right.pid)
        kill_in_a_stream(rank, url)
        assert server.wait(60) == 1
        died = rf"rank 1 \(process {rank} of node 1 at 127\.0\.0\.\d\) died \(exit -9\)"
        assert re.search(f"tensor-parallel {died}", server.stderr.read())
        code, errors = finished(right)
        assert code == 1 and "memplus: tensor-parallel rank 1 died (exit -9)" in errors


def test_a_node_that_dies_in_a_step_can_join_the_restarted_engine(memory_plus_folder, tmp_path):
    options = node_options(2, 2, free_port(), tmp_path / "key")
    waiting = waiting_server(memory_plus_folder, [*options, "--engine-restarts", "1"])
    with waiting as server, contextlib.ExitStack() as stack:
        dying = stack.enter_context(node(memory_plus_folder, 1, *options))
        url = f"{wait_for(server, SERVING)[1]}/v1/completions"
        (rank,) = children(dying.pid)
        kill_in_a_stream(dying.pid, url)
        assert ends(rank)
        wait_for(server, r"node 1 at 127\.0\.0\.\d has ended or cannot be reached: ")
        again = stack.enter_context(node(memory_plus_folder, 1, *options))
        wait_for(server, "the engine was restarted; 0 restarts are left")
        answer = httpx.post(
            url, json={"prompt": "x", "max_tokens": 8, "ignore_eos": True}, timeout=60
        )
        assert answer.json()["usage"]["completion_tokens"] == 8
        server.terminate()
        assert server.wait(60) == 0 and again.wait(60) == 1
        assert "node 0 has ended, restarts its engine, or" in again.stderr.read()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "master_addr: .* it does not run this version of memplus"),
        (b"memplus nodes 1\n" + bytes(64), "node_key_file: .* it refused the node key"),
    ],
)
def test_the_option_that_must_change_is_named(sent, reason):
    with socket.create_server((MASTER, 0)) as other, ThreadPoolExecutor(1) as threads:
        nodes = NodeSettings(2, 1, 1, MASTER, other.getsockname()[1], KEY.encode())
        found = threads.submit(_connected, nodes, 100)
        connection, _ = other.accept()
        with connection:
            connection.sendall(sent)
            with pytest.raises(ConfigError, match=f"^{reason}"):
                found.result()


def test_sigterm_ends_a_node_that_waits(memory_plus_folder, tmp_path):
    options = node_options(2, 2, free_port(), tmp_path / "key")
    with node(memory_plus_folder, 1, *options) as process:
        wait_for(process, r"waiting for node 0 at 127\.0\.0\.2 port \d+: .*refused")
        process.terminate()
        assert process.wait(60) == 0
