"""``memplus bench offline``: minimum work of a step, and exact token counts."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import limit_meter, offline, read_limits
from benchmarks.engine_rounds import EngineRounds, TimedStep
from benchmarks.offline_load import OfflineLoad
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.model.machine_limits import MachineLimits
from engine.model.step_work import Chunk, ModelWork
from engine.scheduling.scheduler import Scheduler
from memory_ops.native.library import MEMORY_LIBRARY
from server.cli.main import main
from server.model_options import ModelOptions
from tests.engine.delayed_executor import delayed
from tests.models import engine_of, random_model, tiny_config


@pytest.fixture(params=[make_executor, delayed], ids=["settled", "in flight"])
def rounds(request):
    """An engine that splits prompts into chunks; some sequences start to decode before others."""
    config = EngineConfig(
        max_num_seqs=4, max_batched_tokens=8, block_size=4, kv_cache_gib=0.001, max_model_len=64
    )
    engine = engine_of(random_model(tiny_config()), config, make=request.param)
    yield EngineRounds(engine, config)
    assert not engine.has_work
    engine.check_integrity()


@pytest.fixture
def plans(monkeypatch):
    """The scheduler's plans, step by step, without those that only wait for a step in flight."""
    planned = []
    plan = Scheduler.plan

    def record(scheduler):
        found = plan(scheduler)
        planned.extend([found] if found.chunks else [])
        return found

    monkeypatch.setattr(Scheduler, "plan", record)
    return planned


def test_prefill_steps_match_the_scheduler_s_plans(rounds, plans):
    steps = rounds.prefill(19)
    assert [step.chunks for step in steps] == [(Chunk(0, 8),), (Chunk(8, 8),), (Chunk(16, 3),)]
    assert [step.num_logits for step in steps] == [0, 0, 1]
    assert all(step.seconds > 0 for step in steps)
    ran = [[(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] for plan in plans]
    assert ran == [[(0, 8)], [(8, 8)], [(16, 3)]]
    # the same number of steps again: the next prompt finds no cached prefix
    assert len(rounds.prefill(19)) == 3


def test_an_untimed_prompt_of_a_block_precedes_a_timed_one(rounds, plans):
    steps = rounds.warm_prefill(9)
    assert [step.chunks for step in steps] == [(Chunk(0, 8),), (Chunk(8, 1),)]
    ran = [[(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] for plan in plans]
    assert ran == [[(0, 4)], [(0, 8)], [(8, 1)]]


def test_decode_steps_match_the_scheduler_s_plans(rounds, plans):
    steps = rounds.decode(batch=3, input_len=7, output_len=5)
    assert len(steps) == 5
    for step, plan in zip(steps, plans[-5:], strict=True):
        ran = {(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks}
        assert {(chunk.start, chunk.count) for chunk in step.chunks} == ran
        assert len(step.chunks) == step.num_logits == 3
    # the prompts ended in different steps, so the sequences have different lengths
    assert len({chunk.start for chunk in steps[0].chunks}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lengths": (8, 64)}, "prompt_lengths: 64 is not below max_model_len 64"),
        ({"batches": (5,)}, "batches: 5 is more than max_num_seqs 4"),
        # 3 * 7 prompt tokens, 6 per step next to 2 decoding sequences: 4 steps, and one more
        ({"output_len": 53}, "output_len: .* takes up to 65 tokens"),
    ],
)
def test_a_load_beyond_the_limits_is_rejected_before_anything_runs(rounds, plans, changes, message):
    fits = {"prompt_lengths": (63,), "batches": (3,), "input_len": 7, "output_len": 52}
    rounds.check(OfflineLoad(**fits))
    with pytest.raises(ConfigError, match=message):
        rounds.check(OfflineLoad(**(fits | changes)))
    assert not plans


def test_the_longest_allowed_load_runs(rounds):
    assert len(rounds.decode(batch=3, input_len=7, output_len=52)) == 52


def test_a_batch_that_exceeds_the_kv_cache_is_rejected():
    config = EngineConfig(max_num_seqs=4, block_size=4, kv_cache_gib=0.00002, max_model_len=64)
    rounds = EngineRounds(engine_of(random_model(tiny_config()), config), config)
    with pytest.raises(ConfigError, match="kv_cache_gib: a batch of 4 takes up to"):
        rounds.check(OfflineLoad((8,), (4,), input_len=20, output_len=20))


@pytest.mark.parametrize("name", ["prompt_lengths", "batches"])
def test_a_load_out_of_range_is_named_in_the_error(name):
    with pytest.raises(ConfigError, match=f"^{name}: must be at least 1, not 0"):
        OfflineLoad(**{name: (1, 0)})
    with pytest.raises(ConfigError, match="^rounds: must be at least 1, not -1"):
        OfflineLoad(rounds=-1)


def test_the_planned_speed_takes_products_and_attention_in_turn():
    work, chunk = ModelWork(tiny_config(), itemsize=4, row_bytes=0), Chunk(0, 40)
    parts = work.products(40, num_logits=1), work.attention([chunk])
    # arithmetic binds one of them, reading the other
    first, second = (part.flops / part.num_bytes for part in parts)
    limits = MachineLimits(gb_per_s=1.0, gflops=(first * second) ** 0.5)
    rounds = SimpleNamespace(warm_prefill=lambda length: [TimedStep(0.5, (chunk,), 1)])
    load = OfflineLoad((40,), (1,), rounds=1)
    for is_planned in (True, False):
        benchmark = offline._Benchmark(load, rounds, work, lambda: limits, 0, is_planned=is_planned)
        result = next(benchmark.results())
        if not is_planned:
            assert result.planned_tokens_per_s is None
            assert offline._line(result).split()[7] == "-"
            continue
        seconds = sum(part.least_seconds(limits) for part in parts)
        assert result.planned_tokens_per_s == pytest.approx(0.85 * 40 / seconds)
        # the roofline lets them overlap
        assert seconds > 1.01 * result.limit_ms / 1e3


@pytest.mark.parametrize(("table_dtype", "row_bytes"), [("auto", 4 * 24), ("int8", 64)])
def test_rows_are_counted_in_the_dtype_in_which_they_are_served(
    memory_plus_folder, table_dtype, row_bytes
):
    settings = SimpleNamespace(
        model=ModelOptions(table_dtype=table_dtype),
        folder=SimpleNamespace(folder=memory_plus_folder),
        engine=EngineConfig(),
    )
    work, _, _ = offline._work(settings, torch.device("cpu"))
    # two memory layers read 6 rows each
    assert work.table_bytes(1) == 12 * row_bytes


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
@pytest.mark.parametrize(("dtype", "tier"), [("float32", "device"), ("bfloat16", "disk")])
def test_every_length_and_batch_is_reported(
    memory_plus_folder, tmp_path, capsys, monkeypatch, dtype, tier
):
    monkeypatch.setattr(limit_meter, "PRODUCT", (16, 32, 64))
    monkeypatch.setattr(read_limits, "_SEQUENTIAL_BYTES", 2**16)
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", dtype, "--kv-cache-gib", "0.01"]
    options += ["--table-tier", tier]
    options += ["--prompt-lengths", "5", "40", "--batches", "1", "3", "--input-len", "8"]
    options += ["--output-len", "4", "--rounds", "2", "--json", str(file)]
    text = tmp_path / "text.txt"
    text.write_text("A short text.")
    options += ["--text", str(text), "--max-batched-tokens", "64"]
    assert main(["bench", "offline", *options]) == 0
    results = json.loads(file.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(results) + 3
    assert re.fullmatch(rf"perplexity [\d.]+ of \d+ tokens of {text}, in windows of \d+", lines[1])
    rows = [(result["phase"], result["batch"], result["tokens"]) for result in results]
    assert rows == [("prefill", 1, 5), ("prefill", 1, 40), ("decode", 1, 4), ("decode", 3, 12)]
    for result in results:
        share = result["limit_ms"] / result["ms_per_step"]
        assert result["roofline_share"] == pytest.approx(share)
        # a plan's reads of rows from disk are not counted here
        assert (result["planned_tokens_per_s"] is None) == (tier == "disk")
        assert min(result["bandwidth_gb_per_s"], result["product_gflops"], share) > 0
        if result["phase"] == "decode":
            per_second = result["batch"] / result["ms_per_step"] * 1e3
            assert result["tokens_per_s"] == pytest.approx(per_second)


def test_speculation_is_refused(capsys):
    assert main(["bench", "offline", "--model", "no-such-model", "--speculate", "ngram"]) == 2
    assert "speculate: is measured by `memplus bench speculation`" in capsys.readouterr().err
