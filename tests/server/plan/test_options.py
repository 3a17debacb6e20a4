"""Options of a plan that are out of range, by name."""

import pytest

from engine.errors import ConfigError
from server.plan.options import PlanOptions, size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "h1000"}, "gpu: 'h1000' is not one of h100"),
        ({"gpu": "h100"}, "host_memory: must be given with --gpu"),
        ({"tensor_parallel": 65}, r"tensor_parallel: 65 is outside \[1, 64\]"),
        ({"table_sharding": "rows"}, "table_sharding: needs --tensor-parallel above 1"),
        (
            {"tensor_parallel": 2, "weight_dtype": "int8"},
            "weight_dtype: int8 cannot be combined with --tensor-parallel",
        ),
        ({"link_us": 5.0}, "link_us: needs --tensor-parallel above 1"),
        ({"link_gb_per_s": 5.0}, "link_gb_per_s: needs --tensor-parallel above 1"),
        ({"tensor_parallel": 2, "link_us": 0.0}, "link_us: must be above 0"),
        ({"replicas": 0}, r"replicas: 0 is outside \[1, 1024\]"),
        ({"gpu_memory": "80GiB"}, "gpu_memory: needs --gpu"),
        ({"host_memory": "80GB"}, "host_memory: must be a number with MiB, GiB or TiB"),
        ({"host_memory": "0GiB"}, "host_memory: must be a number"),
        ({"batches": (1, 0)}, r"batches: 0 is outside \[1, 4096\]"),
        ({"context_len": 0}, r"context_len: 0 is outside"),
        ({"cache_share": 0.2}, "hit_share: must be given"),
        ({"kv_dtype": "fp8"}, "kv_dtype: fp8 is not supported on a CPU"),
        ({"dtype": "float16"}, "dtype: float16 is not supported on a CPU"),
        (
            {"gpu": "h100", "host_memory": "1GiB", "weight_dtype": "int4"},
            "weight_dtype: int4 is not supported on a GPU",
        ),
        ({"hit_share": 1.5}, r"hit_share: 1.5 is outside \[0, 1\]"),
        ({"efficiency": 0.0}, r"efficiency: 0.0 is outside \(0, 1\]"),
        ({"gb_per_s": 50.0}, "gb_per_s, tflops: give both or none without --gpu"),
        ({"tflops": -1.0}, "tflops: must be above 0"),
        ({"disk_reads": float("nan")}, "disk_reads: must be above 0"),
    ],
)
def test_a_value_out_of_range_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        PlanOptions(**changes)


def test_a_cache_of_all_rows_or_of_none_needs_no_share_of_hits():
    shares = [PlanOptions(cache_share=share).hits for share in (0, 0.1, 1)]
    assert shares == [0, 0.7, 1]
    assert PlanOptions(cache_share=0.2, hit_share=0.9).hits == 0.9


def test_a_load_is_at_most_what_the_model_takes():
    assert PlanOptions().load(8192) == (1024, (1, 8, 64), 512)
    assert PlanOptions(batches=(2,)).load(100) == (100, (2,), 100)
    with pytest.raises(ConfigError, match="^context_len: the model has only 8,192 positions"):
        PlanOptions(context_len=8193).load(8192)


def test_sizes_have_binary_units():
    assert size("host_memory", "3MiB") == 3 * 2**20
    assert size("host_memory", "2TiB") == 2 * 2**40


def test_a_link_has_the_limits_given_or_those_of_its_device():
    gpu = {"gpu": "h100", "tensor_parallel": 2}
    assert PlanOptions(**gpu).link(450) == (450, 2e-5, "assumed")
    assert PlanOptions(tensor_parallel=2).link(15) == (15, 8e-5, "assumed")
    assert PlanOptions(**gpu, link_us=7).link(450) == (450, 7e-6, "partly given, partly assumed")
    assert PlanOptions(**gpu, link_us=7, link_gb_per_s=9).link(450) == (9, 7e-6, "given")
