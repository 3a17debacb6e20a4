"""The benchmark of the memory layer's operations: what it reports, not how fast."""

import itertools
import json

import pytest

from benchmarks.kernels import DTYPES, GRADIENT_TABLES, TOKENS, Shapes, measure
from engine.config import ConfigError
from memory_ops.native.library import MEMORY_LIBRARY


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
def test_every_operation_backend_and_dtype_is_reported(tmp_path, capsys):
    measure(Shapes(num_subkeys=64, width=16, top_k=8), rounds=1, json_file=tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 2
    by_backend = {
        backend: {
            (result["op"], result["tokens"], result["dtype"], result["rows"])
            for result in results
            if result["backend"] == backend
        }
        for backend in ("native", "torch")
    }
    wanted = {("topk", tokens, "fp32", 4096) for tokens in TOKENS}
    wanted |= {("lookup", tokens, "bf16", 4096) for tokens in TOKENS}
    wanted |= {("backward", 1024, "fp32", rows) for rows in GRADIENT_TABLES}
    gathers = {
        ("gather", tokens, dtype, 4096) for tokens, dtype in itertools.product(TOKENS, DTYPES)
    }
    assert by_backend["native"] == wanted | gathers
    # torch has no e4m3 bag
    assert by_backend["torch"] == wanted | {case for case in gathers if case[2] != "fp8"}
    for result in results:
        assert result["width"] == 16
        assert min(result[x] for x in ("us_per_token", "gb_per_s", "limit_gb_per_s")) > 0


@pytest.mark.parametrize(
    ("name", "value"), [("width", 0), ("num_subkeys", -1), ("top_k", 129), ("top_k", 1025)]
)
def test_shapes_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}: must be"):
        Shapes(**{name: value})
