"""``memplus bench kernels``: the contents of its report; no assertion on speed."""

import itertools
import json

import pytest

from benchmarks import kernels
from benchmarks.drawn_tables import DTYPES
from benchmarks.kernel_shapes import Shapes
from benchmarks.kernels import measure
from engine.errors import ConfigError
from memory_ops.native.library import MEMORY_LIBRARY
from server.cli.main import main


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
# rows of 10 values do not fill whole cache lines
@pytest.mark.parametrize("width", [16, 10])
def test_every_operation_backend_and_dtype_is_reported(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setattr(kernels, "TOKENS", (1, 3))
    monkeypatch.setattr(kernels, "GRADIENT_TABLES", (2**14, 2**16))
    monkeypatch.setattr(kernels, "_num_calls", lambda tokens: 4)
    file = tmp_path / "out.json"
    options = ["--num-subkeys", "64", "--width", str(width), "--top-k", "8", "--rounds", "1"]
    assert main(["bench", "kernels", *options, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(results) + 2
    by_backend = {
        backend: {
            (result["op"], result["tokens"], result["dtype"], result["rows"])
            for result in results
            if result["backend"] == backend
        }
        for backend in ("native", "torch")
    }
    wanted = {("topk", tokens, "fp32", 4096) for tokens in (1, 3)}
    wanted |= {("lookup", tokens, "bf16", 4096) for tokens in (1, 3)}
    wanted |= {("backward", 1024, "fp32", rows) for rows in (2**14, 2**16)}
    gathers = {
        ("gather", tokens, dtype, 4096) for tokens, dtype in itertools.product((1, 3), DTYPES)
    }
    assert by_backend["native"] == wanted | gathers
    # torch has no e4m3 bag
    assert by_backend["torch"] == wanted | {case for case in gathers if case[2] != "fp8"}
    for result in results:
        assert result["width"] == width
        assert min(result[x] for x in ("us_per_token", "gb_per_s", "limit_gb_per_s")) > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 0), ("width", 7), ("num_subkeys", -1), ("rounds", 0), ("top_k", 1025)],
)
def test_a_shape_out_of_range_is_named_in_the_error(name, value):
    with pytest.raises(ConfigError, match=f"{name}: "):
        Shapes(**{name: value})


def test_unsupported_shapes_are_rejected_before_measuring():
    with pytest.raises(ConfigError, match="top_k: the kernels support at most 128"):
        measure(Shapes(top_k=129), None)
    with pytest.raises(ConfigError, match="num_subkeys: the kernels support at most"):
        measure(Shapes(num_subkeys=70_000), None)
