"""The engine gives every request the tokens of a plain loop, independent of its batch."""

import random

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.executors.executor import make_executor
from engine.model.config import MEMORY_KINDS
from engine.request import Request
from engine.sampling.params import SamplingParams
from tests.engine.delayed_executor import delayed
from tests.models import (
    engine_of,
    feed_forward_changes,
    greedy,
    plain_greedy,
    random_model,
    run,
    tiny_config,
)

KV_BYTES = tiny_config().kv_bytes_per_token(itemsize=4)


def engine(model, kv_tokens: int = 4096, **config) -> Engine:
    settings = EngineConfig(kv_cache_gib=kv_tokens * KV_BYTES / 2**30, **config)
    return engine_of(model, settings, make=model.make)


def prompts(count: int) -> list[list[int]]:
    drawn = random.Random(3)
    return [[drawn.randrange(256) for _ in range(drawn.randrange(1, 40))] for _ in range(count)]


@pytest.fixture(scope="module", params=[make_executor, delayed])
def model(request):
    torch.manual_seed(1)
    made = random_model(tiny_config())
    made.make = request.param
    return made


@pytest.fixture(scope="module")
def expected(model):
    return {str(i): plain_greedy(model, prompt, 12) for i, prompt in enumerate(prompts(16))}


def check(model, expected, arrivals=None, kv_tokens: int = 4096, **config) -> None:
    drawn = random.Random(4)
    requests: dict[int, list[Request]] = {}
    for i, prompt in enumerate(prompts(16)):
        at = 0 if arrivals is None else drawn.randrange(arrivals)
        requests.setdefault(at, []).append(greedy(str(i), prompt, 12))
    assert run(engine(model, kv_tokens, **config), requests) == expected


def test_alone(model, expected):
    assert run(engine(model), {0: [greedy("0", prompts(1)[0], 12)]}) == {"0": expected["0"]}


def test_sixteen_together(model, expected):
    check(model, expected)


def test_sixteen_arriving_at_random(model, expected):
    check(model, expected, arrivals=20)


def test_prompts_chunked_by_seven(model, expected):
    check(model, expected, max_batched_tokens=7, max_num_seqs=7)


def test_blocks_of_four(model, expected):
    check(model, expected, arrivals=20, block_size=4)


def test_a_pool_that_is_nearly_always_full(model, expected):
    check(model, expected, kv_tokens=128, block_size=4, max_model_len=64)


def test_aborting_another_request(model, expected):
    busy = engine(model)
    busy.add(greedy("neighbour", [1, 2, 3], 50))
    busy.add(greedy("0", prompts(1)[0], 12))
    tokens = []
    while len(tokens) < 12:
        outputs = busy.step().outputs
        tokens += [t for o in outputs if o.request_id == "0" for t in o.token_ids]
        if len(tokens) == 4:
            busy.abort("neighbour")
            busy.check_integrity()
    assert tokens == expected["0"] and not busy.has_work


OTHER_KINDS = [(kind, "dense", kind) for kind in MEMORY_KINDS] + [("moe", "memory_plus", "moe")]


@pytest.mark.parametrize("make", [make_executor, delayed])
@pytest.mark.parametrize("share_values", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kinds", OTHER_KINDS)
def test_other_feed_forwards(kinds, share_values, make):
    changes = feed_forward_changes(*kinds, share_values=share_values)
    model = random_model(tiny_config(**changes))
    model.make = make
    expected = {str(i): plain_greedy(model, prompt, 12) for i, prompt in enumerate(prompts(16))}
    check(model, expected, arrivals=20, max_batched_tokens=11, max_num_seqs=11)


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(model):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=11, ignore_eos=True)
    request = Request("seeded", (1, 2, 3), params)
    alone = run(engine(model), {0: [request]})["seeded"]
    others = [greedy(str(i), prompt, 12) for i, prompt in enumerate(prompts(5))]
    assert run(engine(model), {0: others, 3: [request]})["seeded"] == alone
    unseeded = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    assert run(engine(model), {0: [Request("x", (1, 2, 3), unseeded)]})["x"] != alone


def test_a_failing_request_is_answered_and_does_not_affect_others(model, expected, monkeypatch):
    broken = engine(model)
    run_batch = broken._executor.launch

    def fail(batch):
        assert not any(row.params.max_tokens == 5 for row in batch.rows)
        return run_batch(batch)

    monkeypatch.setattr(broken._executor, "launch", fail)
    broken.add(greedy("bad", [1, 2], 5))
    broken.add(greedy("good", prompts(1)[0], 12))
    output, *others = broken.step().outputs
    assert (output.finish_reason, output.error) == ("error", "AssertionError in the engine")
    while broken.has_work:
        others += broken.step().outputs
    broken.check_integrity()
    assert [token for other in others for token in other.token_ids] == expected["0"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([260], {}, "prompt"),
        ([1] * 512, {}, "prompt"),
        ([1], {"max_tokens": 512}, "max_tokens"),
        ([1], {"stop_token_ids": frozenset({260})}, "stop_token_ids"),
    ],
)
def test_impossible_requests_are_refused_by_name(model, prompt, sampling, param):
    refusing = engine(model)
    with pytest.raises(RequestError) as caught:
        refusing.add(Request("x", tuple(prompt), SamplingParams(**sampling)))
    assert caught.value.param == param and not refusing.has_work


def test_a_model_length_beyond_memory_is_refused(model):
    assert engine(model, kv_tokens=64).limits.max_model_len == 64
    for asked in (65, 513):
        with pytest.raises(ConfigError, match="^max_model_len: "):
            engine(model, kv_tokens=64, max_model_len=asked)
    with pytest.raises(ConfigError, match="^kv_cache_gib: "):
        engine(model, kv_tokens=1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": 0}, "block_size"),
        ({"max_batched_tokens": 8, "max_num_seqs": 9}, "max_batched_tokens"),
        ({"kv_cache_gib": float("nan")}, "kv_cache_gib"),
        ({"kv_dtype": "fp4"}, "kv_dtype"),
        ({"speculate": "medusa"}, "speculate"),
        ({"speculate_tokens": 4}, "speculate_tokens"),
        ({"speculate": "ngram", "speculate_tokens": 0}, "speculate_tokens"),
        ({"speculate": "ngram", "speculate_tokens": 65}, "speculate_tokens"),
        ({"max_patches": -1}, "max_patches"),
        ({"max_patch_rows": 0}, "max_patch_rows"),
        ({"max_patch_rows": 2**31}, "max_patch_rows"),
        ({"patch_memory_gib": 0.0}, "patch_memory_gib"),
        ({"patch_memory_gib": float("inf")}, "patch_memory_gib"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
    ],
)
def test_a_setting_out_of_range_is_named(changes, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        EngineConfig(**changes)


@pytest.mark.parametrize("debug_checks", [False, True])
def test_an_idle_engine_counts_its_blocks_and_debug_checks_inspect_each(model, debug_checks):
    idle = engine(model, debug_checks=debug_checks)
    run(idle, {0: [greedy("a", list(range(40)), 4)]})
    idle.check_idle()
    # only the check of every block finds a hash of a wrong block
    idle._pool._published[b"wrong"] = 0
    if debug_checks:
        with pytest.raises(AssertionError):
            idle.check_idle()
    else:
        idle.check_idle()
        idle._pool.take((), 1)
        with pytest.raises(AssertionError, match="lost"):
            idle.check_idle()
