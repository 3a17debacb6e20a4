"""``memplus bench offline``: minimum work of a step, and exact token counts."""

import json
import re

import pytest

from benchmarks import machine_limits, read_limits
from benchmarks.engine_rounds import EngineRounds
from benchmarks.machine_limits import MachineLimits
from benchmarks.offline_load import OfflineLoad
from benchmarks.step_work import Chunk, ModelWork, StepWork
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.model.config import MemoryConfig
from engine.model.flops import forward_flops
from engine.model.grouped_weights import GroupFormat
from engine.scheduling.scheduler import Scheduler
from memory_ops.native.library import MEMORY_LIBRARY
from server.cli.main import main
from tests.engine.delayed_executor import delayed
from tests.models import engine_of, feed_forward_changes, random_model, tiny_config

# weights of a tiny model's layer: queries and outputs, keys and values, feed-forward, two norms
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
LAYERS = 2 * LAYER + 32
NORMS = 2 * 2 * 32 + 32
HEAD = 260 * 32
# bytes of a token's keys and values in bf16, in two layers
KV_BYTES = 2 * 2 * 2 * 8 * 2


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


@pytest.mark.parametrize("tied", [True, False])
def test_a_decode_step_reads_all_weights_once_and_every_context(tied):
    work = ModelWork(tiny_config(tie_embeddings=tied), itemsize=2, row_bytes=0)
    step = work.of([Chunk(9, 1), Chunk(19, 1)], num_logits=2)
    assert step.num_bytes == 2 * (LAYERS + HEAD) + 30 * KV_BYTES
    # 4 heads of 8 in 2 layers; 10 and 20 positions
    assert step.flops == 2 * 2 * (LAYERS - NORMS + HEAD) + 4 * (10 + 20) * 2 * 4 * 8


def test_weights_in_groups_are_fewer_bytes_and_integer_operations():
    formats = {"model.layers.1.mlp.up_proj": GroupFormat(4), "lm_head": GroupFormat(8)}
    dense = ModelWork(tiny_config(), itemsize=2, row_bytes=0)
    grouped = ModelWork(tiny_config(), itemsize=2, row_bytes=0, formats=formats)
    chunks = [Chunk(9, 1)] * 3
    before, after = dense.of(chunks, 2), grouped.of(chunks, 2)
    up = 32 * 48
    # 48 and 260 outputs with one group each
    assert before.num_bytes - after.num_bytes == 2 * (up + HEAD) - (48 * 18 + 260 * 34)
    assert after.integer_ops == 2 * (3 * up + 2 * HEAD)
    assert after.flops + after.integer_ops == before.flops and before.integer_ops == 0


def test_only_the_last_token_of_a_prompt_needs_the_head():
    work = ModelWork(tiny_config(), itemsize=4, row_bytes=0)
    first, last = work.of([Chunk(0, 3)], num_logits=0), work.of([Chunk(3, 2)], num_logits=1)
    assert first.num_bytes == 4 * LAYERS + 3 * 2 * KV_BYTES
    assert first.flops == 2 * 3 * (LAYERS - NORMS) + 4 * (1 + 2 + 3) * 2 * 4 * 8
    assert last.num_bytes == 4 * (LAYERS + HEAD) + 5 * 2 * KV_BYTES
    assert last.flops == 2 * 2 * (LAYERS - NORMS) + 2 * HEAD + 4 * (4 + 5) * 2 * 4 * 8


def test_memory_layers_read_no_row_twice():
    memory = MemoryConfig(num_heads=2, num_subkeys=8, top_k=3, query_dim=8, value_dim=32)
    config = tiny_config(feed_forward=("dense", "pkm"), memory=memory)
    rows, none = (ModelWork(config, itemsize=2, row_bytes=number) for number in (48, 0))
    for tokens, read in ((1, 6), (10, 60), (11, 64)):
        chunks = [Chunk(5, 1)] * tokens
        with_rows, without = rows.of(chunks, tokens), none.of(chunks, tokens)
        assert with_rows.num_bytes - without.num_bytes == 48 * read
        assert with_rows.flops == without.flops


def test_keys_and_values_in_int8_take_fewer_bytes():
    plain, small = (
        ModelWork(tiny_config(head_dim=64), itemsize=2, row_bytes=0, kv_dtype=dtype)
        for dtype in ("auto", "int8")
    )
    chunks = [Chunk(10, 1)]
    saved = plain.of(chunks, 1).num_bytes - small.of(chunks, 1).num_bytes
    assert saved == 11 * 2 * 2 * 2 * (128 - 68)  # keys and values of two layers with two heads


def test_peer_reads_two_tables_and_a_mixture_only_the_chosen_experts():
    peer = tiny_config(**feed_forward_changes("dense", "peer"))
    rows, none = (ModelWork(peer, itemsize=2, row_bytes=number) for number in (48, 0))
    chunks = [Chunk(5, 1)]
    assert rows.of(chunks, 1).num_bytes - none.of(chunks, 1).num_bytes == 2 * 48 * 6
    config = tiny_config(**feed_forward_changes("dense", "moe"))
    work = ModelWork(config, itemsize=2, row_bytes=0).of(chunks, 1)
    expert, router = 3 * 32 * 24, 5 * 32
    own = LAYERS - 3 * 32 * 48 + router + 2 * expert + HEAD
    assert work.num_bytes == 2 * own + 6 * KV_BYTES
    assert work.flops == sum(
        count for part, count in forward_flops(config, 6).items() if part != "scoring"
    )


def test_the_roofline_is_the_longer_of_reading_and_multiplying():
    work = StepWork(num_bytes=8 * 10**9, flops=6 * 10**9)
    assert work.least_seconds(MachineLimits(gb_per_s=2, gflops=3)) == 4
    assert work.least_seconds(MachineLimits(gb_per_s=8, gflops=3)) == 2
    mixed = StepWork(num_bytes=1, flops=6 * 10**9, integer_ops=8 * 10**9)
    assert mixed.least_seconds(MachineLimits(8, gflops=3, integer_gops=4)) == 4
    limits = [MachineLimits(1, 5), MachineLimits(2, 4)]
    assert MachineLimits.median(limits) == MachineLimits(1.5, 4.5)


def test_prefill_steps_match_the_scheduler_s_plans(rounds, plans):
    steps = rounds.prefill(19)
    assert [step.chunks for step in steps] == [(Chunk(0, 8),), (Chunk(8, 8),), (Chunk(16, 3),)]
    assert [step.num_logits for step in steps] == [0, 0, 1]
    assert all(step.seconds > 0 for step in steps)
    ran = [[(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] for plan in plans]
    assert ran == [[(0, 8)], [(8, 8)], [(16, 3)]]
    # the same number of steps again: the next prompt finds no cached prefix
    assert len(rounds.prefill(19)) == 3


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


@pytest.mark.skipif(MEMORY_LIBRARY.best_build is None, reason="needs the native library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_length_and_batch_is_reported(
    memory_plus_folder, tmp_path, capsys, monkeypatch, dtype
):
    monkeypatch.setattr(machine_limits, "PRODUCT", (16, 32, 64))
    monkeypatch.setattr(read_limits, "_SEQUENTIAL_BYTES", 2**16)
    file = tmp_path / "out.json"
    options = ["--model", str(memory_plus_folder), "--dtype", dtype, "--kv-cache-gib", "0.01"]
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
        assert min(result["bandwidth_gb_per_s"], result["product_gflops"], share) > 0
        if result["phase"] == "decode":
            per_second = result["batch"] / result["ms_per_step"] * 1e3
            assert result["tokens_per_s"] == pytest.approx(per_second)


def test_speculation_is_refused(capsys):
    assert main(["bench", "offline", "--model", "no-such-model", "--speculate", "ngram"]) == 2
    assert "speculate: is measured by `memplus bench speculation`" in capsys.readouterr().err
