"""``memplus bench patches``: steps and loads, order of rounds, sizes, and kept results."""

import asyncio
import json
from dataclasses import fields

import pytest
import torch

from benchmarks.decode_steps import DecodeRun
from benchmarks.patches import loading, run
from benchmarks.patches.drawn_patches import drawn_tables
from benchmarks.patches.loading import LoadedWhileServing, patch_limits
from benchmarks.patches.options import PatchLoad
from benchmarks.patches.steps import PatchContest, PatchedSteps
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.process import EngineStartError
from memory_ops.patches.patched_rows import PatchedRows
from server.cli.main import main
from server.cli.options import Parser, add_options, from_options
from tests.models import feed_forward_changes, random_model, tiny_config
from weights.errors import PatchError

# the model's only table has 64 rows
SIZES = ["--own-rows", "50", "--many", "5", "--many-rows", "20"]


@pytest.mark.slow
def test_steps_and_loads_are_reported(memory_plus_folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", "float32", "--batches", "1", "3"]
    options += ["--tokens", "9", "--rounds", "2", *SIZES, "--json", str(file)]
    assert main(["bench", "patches", *options]) == 0
    results = json.loads(file.read_text())
    steps, loads = results["steps"], results["loading"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(steps) + len(loads)
    assert [(one["batch"], one["num_loaded"]) for one in steps] == [(1, 1), (3, 3), (1, 5), (3, 5)]
    for one in steps:
        assert min(one["step_ms"], one["other_step_ms"]) > 0 and 0 < one["hit_share"] <= 1
    assert [one["batch"] for one in loads] == [1, 3]
    for one in loads:
        # all rows, since the model has fewer than a patch has by default
        assert len(one["load_ms"]) == 2 and one["patch_rows"] == 64
        assert one["longest_load_ms"] == max(one["load_ms"])
        # tokens that arrive together have no time between them
        assert one["longest_ms"] >= one["step_ms"] >= 0


class RecordedContest(PatchContest):
    """Runs no requests: notes which patches are used and loaded."""

    def _run(self, batch, used, loaded):
        for patch in used:
            for rows in patch.distinct_rows:
                rows.counts += torch.tensor([2, 1])
        self.runs = [*getattr(self, "runs", ()), (batch, tuple(used), tuple(loaded))]
        return DecodeRun(float(bool(loaded)) + 1, 3.0, {str(n): [1, 2] for n in range(batch)})


def test_rounds_alternate_and_the_other_steps_have_no_patches_of_the_tested_ones():
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    contest = RecordedContest(model, None, EngineConfig(max_num_seqs=2), tokens=3, rounds=3)
    contest.runs.clear()
    own = contest.own_patches(2, num_rows=10)
    plain, tested = (2, (), ()), contest.runs[0]
    batch, used, loaded = tested
    assert batch == 2 and len(used) == 2 and used == loaded
    # a warm-up and three rounds, each of which begins with what the last one ended with
    assert contest.runs == [tested, plain, plain, tested, tested, plain, plain, tested]
    assert own.overhead == 1 and own.hit_share == 0.5 and own.patch_rows == 10
    contest.runs.clear()
    contest.many_patches(1, num_rows=10, num_loaded=4)
    batch, used, loaded = tested = contest.runs[0]
    assert batch == 1 and used == loaded[:1] and len(loaded) == 4
    assert contest.runs[1:4] == [(1, used, used), (1, used, used), tested]


def test_drawn_rows_begin_with_those_that_are_given():
    first = {"b": torch.tensor([9, 3])}
    for count, wanted in ((3, {9}), (8, {3, 9}), (20, {3, 9})):
        tables = drawn_tables(0, {"a": (10, 4), "b": (10, 2)}, count, first)
        for rows_P, deltas_PV in tables.values():
            assert rows_P.tolist() == sorted(set(rows_P.tolist()))
            assert len(rows_P) == len(deltas_PV) == count // 2 and deltas_PV.any()
        assert wanted <= set(tables["b"][0].tolist())


def test_a_server_that_loads_drawn_patches_allows_them_all():
    shapes = {"a": (64, 24), "b": (64, 8)}
    parser = Parser()
    add_options(parser, EngineConfig)
    options = parser.parse_args(patch_limits(shapes, 100, count=7))
    config = from_options(EngineConfig, options)
    tables = drawn_tables(0, shapes, 100).values()
    assert config.max_patches == 7 and config.max_patch_rows == 100
    assert config.patch_bytes >= 7 * sum(PatchedRows(*pair).num_bytes for pair in tables)


def zeros(kind, **changes):
    return kind(**{one.name: 0 for one in fields(kind)} | changes)


@pytest.mark.parametrize(
    "error", [PatchError("POST /v1/memory/patches: HTTP 400"), EngineStartError("no memory")]
)
def test_results_are_kept_when_loads_fail(memory_plus_folder, tmp_path, monkeypatch, capsys, error):
    def loads(*arguments):
        assert arguments[2:] == ([1, 3], 64, 5)
        yield zeros(LoadedWhileServing, batch=1)
        raise error

    steps = zeros(PatchedSteps, batch=3)
    monkeypatch.setattr(run, "_measure_steps", lambda *arguments: [steps])
    monkeypatch.setattr(run, "measure_loading", loads)
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--batches", "1", "3", *SIZES]
    assert main(["bench", "patches", *options, "--json", str(file)]) == 2
    assert f"memplus: {error}" in capsys.readouterr().err
    results = json.loads(file.read_text())
    assert [len(results[part]) for part in ("steps", "loading")] == [1, 1]


def test_a_refused_load_is_an_error_of_the_user(monkeypatch):
    def refuse(url, *request):
        raise PatchError("POST /v1/memory/patches: HTTP 400")

    async def complete(self, body):
        await asyncio.sleep(0)

    monkeypatch.setattr(loading, "_ask", refuse)
    monkeypatch.setattr(loading.CompletionClient, "complete", complete)
    with pytest.raises(PatchError, match="HTTP 400"):
        asyncio.run(loading._load_all("http://127.0.0.1:1", 1, ["p0"]))


@pytest.mark.parametrize("option", ["--own-rows", "--many-rows", "--loaded-rows"])
def test_sizes_must_fit_the_model(memory_plus_folder, capsys, option):
    """Fewer rows were written than were reported."""
    arguments = ["bench", "patches", "--model", str(memory_plus_folder), *SIZES, option, "65"]
    assert main(arguments) == 2
    message = f"{option}: 65 is outside [1, 64]; the model has 64 rows in its table"
    assert message in capsys.readouterr().err


def test_a_patch_has_rows_of_all_tables():
    load = PatchLoad(many_rows=2)
    load.check(num_tables=2, num_rows=10_000)
    with pytest.raises(
        ConfigError, match=r"^many_rows: 2 is outside \[3, 10000\]; .* in 3 tables$"
    ):
        load.check(num_tables=3, num_rows=10_000)
    assert load.rows_to_load(10_000) == 10_000 and load.rows_to_load(10**6) == 100_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1", "0"], "batches: must be at least 1, not 0"),
        (["--tokens", "2"], "tokens: must be at least 3, not 2"),
        (["--own-rows", "0"], "--own-rows: must be at least 1, not 0"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_is_loaded(options, message, capsys):
    assert main(["bench", "patches", "--model", "no-such-model", *options]) == 2
    assert message in capsys.readouterr().err
