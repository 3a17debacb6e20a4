"""Traits that all nodes must share: what differs is named."""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.executors.parallel.message_codec import encoded
from engine.executors.parallel.messages import NodeJoin
from engine.executors.parallel.shares import RankShare
from server.node_traits import difference, node_traits
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.checkpoints.config_json import read_config


def saved(folder, seed=4, **changes):
    torch.manual_seed(seed)
    config = tiny_config(**feed_forward_changes("dense", "memory_plus"), **changes)
    return save_model(random_model(config), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "model")


def traits(folder, engine=EngineConfig(), size=2, sharding="columns", nodes=2, **types):  # noqa: B008
    share = RankShare(read_config(folder).model, 0, size, sharding)
    types = {"dtype": torch.float32, "table_dtype": "auto"} | types
    return node_traits(folder, share, types["dtype"], types["table_dtype"], engine, nodes)


def test_the_same_model_elsewhere_has_the_same_traits(folder, tmp_path):
    assert difference(traits(folder), traits(saved(tmp_path / "copy"))) is None


def test_traits_fit_into_a_message(folder):
    frame = encoded(NodeJoin(1, traits(folder), 1))
    assert len(frame.header) + frame.num_array_bytes < 2**14


def test_other_weights_and_tables_are_named(folder, tmp_path):
    found = difference(traits(folder), traits(saved(tmp_path / "other", seed=5)))
    assert found.startswith("weights: ") and "; table " in found


def test_another_config_is_named(folder, tmp_path):
    changed = saved(tmp_path / "changed", rope_theta=5000.0)
    found = difference(traits(folder), traits(changed))
    assert found == "config rope_theta: 5000.0 there, 10000.0 on node 0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"engine": EngineConfig(max_num_seqs=7)}, "--max-num-seqs: 7 there, 64 on node 0"),
        ({"engine": EngineConfig(kv_cache_gib=2.0)}, "--kv-cache-gib: 2.0 there, None on node 0"),
        ({"sharding": "rows"}, "--table-sharding: rows there, columns on node 0"),
        ({"nodes": 4}, "--nnodes: 4 there, 2 on node 0"),
        ({"size": 1}, "--tensor-parallel: 1 there, 2 on node 0"),
        ({"table_dtype": "int8"}, "--table-dtype: int8 there, auto on node 0"),
        ({"dtype": torch.bfloat16}, "--dtype: torch.bfloat16 there, torch.float32 on node 0"),
    ],
)
def test_other_settings_are_named(folder, changes, named):
    assert difference(traits(folder), traits(folder, **changes)) == named


def test_what_computes_differently_is_named(folder, monkeypatch):
    own = traits(folder)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "older")
    monkeypatch.setattr("server.node_traits.cpu_kernels", lambda device, dtype: None)
    found = difference(own, traits(folder))
    assert "older there" in found and "kernels: none there" in found
    assert f"threads per rank: {threads + 3} there, {threads} on node 0" in found


@pytest.mark.parametrize(
    ("name", "older"),
    [("flags", "fpu avx2 fma"), ("Features", "fp asimd")],
)
def test_instructions_that_a_processor_lacks_are_named(folder, tmp_path, monkeypatch, name, older):
    """Kernels of a library differ with them, though the library's own level is the same."""
    found = []
    for instructions in (f"{older} avx512_bf16 bf16", older + " unknown"):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor: 0\n{name}\t: {instructions}\n")
        monkeypatch.setattr("server.node_traits._CPU_INFO", file)
        found.append(traits(folder))
    assert difference(*found) == (
        "instructions avx512_bf16: missing there, present on node 0;"
        " instructions bf16: missing there, present on node 0"
    )


def test_a_long_name_from_another_node_is_cut_short():
    found = difference({}, {"x" * 1000: "y" * 1000})
    assert found == f"{'x' * 40}: {'y' * 40} there, missing on node 0"


def test_many_differences_are_cut_short():
    own = {str(number): "same" for number in range(9)}
    assert difference(own, own) is None
    found = difference(own, {})
    assert found.count("missing there") == 4 and found.endswith("; and more")


def test_shares_of_any_rank_have_the_same_traits(folder):
    share = RankShare(read_config(folder).model, 0, 2)
    arguments = torch.float32, "auto", EngineConfig(), 2
    first = node_traits(folder, share, *arguments)
    assert first == node_traits(folder, replace(share, rank=1), *arguments)
