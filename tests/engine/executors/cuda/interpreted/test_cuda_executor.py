"""The engine on the CUDA executor, interpreted: every model and request gets a plain loop's tokens.

The fake device runs each step as late as it may, so one step is always in flight.
"""

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.batch import prompt_batch
from engine.executors.executor import make_executor
from engine.model.grouped_weights import group_weights
from engine.model.transformer import converted
from engine.request import Request
from engine.sampling.params import SamplingParams
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.engine.executors.test_memory_recorder import check_reads, reads_of
from tests.engine.test_company import Multiples, Oracle, masked_greedy, step_all, tokens
from tests.grouped_models import in_groups, with_groups
from tests.models import (
    VOCAB_SIZE,
    feed_forward_changes,
    greedy,
    plain_greedy,
    plain_logits,
    random_model,
    run,
    tiny_config,
)

KV_BYTES = tiny_config().kv_bytes_per_token(itemsize=4)
PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9, 10], "c": [11]}
COUNT = 5
OTHER_KINDS = [("memory_plus", "dense", "memory_plus"), ("pkm", "pkm"), ("peer",), ("moe", "dense")]
KINDS = [
    ("dense", "memory_plus"),
    *(pytest.param(kinds, marks=pytest.mark.slow) for kinds in OTHER_KINDS),
]


def engine(model, device=None, eos_ids=frozenset(), kv_tokens: int = 512, warm=False, **config):
    values = {"max_num_seqs": 3, "max_batched_tokens": 16, "block_size": 4, "max_model_len": 64}
    drafter = config.pop("drafter", None)
    make_drafter = None if drafter is None else lambda: drafter
    settings = EngineConfig(kv_cache_gib=kv_tokens * KV_BYTES / 2**30, **(values | config))
    executor = cuda_on_cpu(model, settings, device, warm=warm)
    return Engine(executor, settings, eos_ids, make_drafter)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(1)
    return random_model(tiny_config())


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_every_kind_of_model(kinds):
    model = random_model(tiny_config(**feed_forward_changes(*kinds)))
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    device = FakeDevice()
    served = engine(model, device, warm=True)
    found = run(served, {0: [greedy(name, ids, COUNT) for name, ids in PROMPTS.items()]})
    assert found == expected
    # the prompts run without a graph, the decodes in graphs
    assert device.num_replays == COUNT - 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tied"), [("int8", False), ("int4", False), ("int4", True)])
def test_models_in_groups(dtype, tied):
    changes = feed_forward_changes("dense", "moe", "memory_plus")
    grouped = in_groups(random_model(tiny_config(tie_embeddings=tied, **changes)), dtype)
    model = converted(grouped, torch.float32)
    expected = {name: plain_greedy(model, ids, COUNT) for name, ids in PROMPTS.items()}
    served = engine(grouped, warm=True)
    assert run(served, {0: [greedy(name, ids, COUNT) for name, ids in PROMPTS.items()]}) == expected


@pytest.mark.slow
def test_layers_of_one_product_in_several_formats(dense):
    formats = {"q_proj": 8, "k_proj": 4, "gate_proj": 4}  # the others are dense
    groups = {
        name: group_weights(layer.weight, formats[last])
        for name, layer in dense.named_modules()
        if (last := name.rpartition(".")[2]) in formats
    }
    grouped = with_groups(dense, groups)
    wanted = plain_greedy(converted(grouped, torch.float32), PROMPTS["a"], COUNT)
    found = run(engine(grouped), {0: [greedy("a", PROMPTS["a"], COUNT)]})
    assert found == {"a": wanted}


@pytest.mark.slow
def test_experts_in_several_formats():
    model = random_model(tiny_config(**feed_forward_changes("moe")))
    weights = {
        name: layer.weight
        for name, layer in model.named_modules()
        if ".experts." in f"{name}." and hasattr(layer, "weight")
    }
    groups = {
        name: group_weights(weight, 8 if name.endswith("0.w1") else 4)
        for name, weight in weights.items()
    }
    grouped = with_groups(model, groups)
    wanted = plain_greedy(converted(grouped, torch.float32), PROMPTS["a"], COUNT)
    assert run(engine(grouped), {0: [greedy("a", PROMPTS["a"], COUNT)]}) == {"a": wanted}


@pytest.mark.slow
def test_rows_of_traced_tokens():
    model = random_model(tiny_config(**feed_forward_changes("memory_plus")))
    request = greedy("a", PROMPTS["a"], COUNT, memory_trace=True)
    reads = reads_of(engine(model, warm=True), [request])
    assert len(reads["a"]) == COUNT
    check_reads(model, PROMPTS["a"], reads["a"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        {"qk_norm": True, "output_gate": True},
        {"value_projection": True, "value_dim": 24, "share_values": False},
        {"placement": "beside", "scalar_gate": True},
        {"placement": "beside", "output_gate": True},
        {"scalar_gate": True, "peer": True},
    ],
)
def test_options_of_memory_layers(memory):
    memory = dict(memory)
    kind = "peer" if memory.pop("peer", False) else "memory_plus"
    kind = "pkm" if "value_projection" in memory else kind
    changes = feed_forward_changes(kind, "dense", kind, **memory)
    model = random_model(tiny_config(**changes, attention_bias=True, tie_embeddings=True))
    found = run(engine(model), {0: [greedy("a", [1, 2, 3], COUNT)]})
    assert found == {"a": plain_greedy(model, [1, 2, 3], COUNT)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [{"qk_norm": True}, {"qkv_bias": True}],
    ids=["qk_norm", "qkv_bias"],
)
def test_attention_of_other_families(attention):
    model = random_model(tiny_config(**attention))
    found = run(engine(model), {0: [greedy("a", [1, 2, 3], COUNT)]})
    assert found == {"a": plain_greedy(model, [1, 2, 3], COUNT)}


@pytest.mark.slow
def test_mixed_steps_in_graphs(dense):
    # buckets of 64 tokens: prompts, decodes and padding share graphs
    device = FakeDevice()
    mixed = engine(dense, device, warm=True, max_batched_tokens=64)
    requests = {0: [greedy("a", [1, 2, 3], 6)], 2: [greedy("b", [5] * 20, 4)]}
    found = run(mixed, requests)
    assert found == {"a": plain_greedy(dense, [1, 2, 3], 6), "b": plain_greedy(dense, [5] * 20, 4)}
    assert device.num_replays == 6


@pytest.mark.slow
def test_a_decode_changes_to_a_graph_that_splits_its_context(dense, monkeypatch):
    # more than five keys of 8 values are long
    monkeypatch.setattr("engine.executors.cuda.buckets._SHORT_CONTEXT", 40)
    device = FakeDevice()
    long = engine(dense, device, warm=True, max_num_seqs=1)
    splits = {shape.num_splits for shape in long._executor._inputs}
    assert splits == {1, 2}
    found = run(long, {0: [greedy("a", [1, 2, 3], 6)]})
    assert found == {"a": plain_greedy(dense, [1, 2, 3], 6)}
    assert device.num_replays == 5


SAMPLING = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0, "logit_bias": ((7, 4.0), (9, -4.0))},
    {"temperature": 0, "stop_token_ids": frozenset(range(0, VOCAB_SIZE, 5)), "min_tokens": 3},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0, "allowed_token_ids": frozenset({1, 2, 3}), "bad_words": ((1, 2), (2, 2))},
    {"temperature": 0.9, "seed": 5, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0, "logit_bias": ((7, 4.0),), "logprobs": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if number else [])
        for number, kind in enumerate(SAMPLING)
    ],
    ids=lambda kind: "-".join(kind),
)
def test_every_kind_of_request_beside_a_greedy_one(dense, sampling):
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True, **sampling)
    request, neighbour = Request("x", (1, 2, 3), params), greedy("y", [4, 5], COUNT)

    def outputs(served):
        served.add(request)
        served.add(neighbour)
        return step_all(served)

    found = outputs(engine(dense))
    settings = EngineConfig(kv_cache_gib=0.001)
    wanted = outputs(Engine(make_executor(dense, settings), settings))
    for name in ("x", "y"):
        assert tokens(found[name]) == tokens(wanted[name])
    for kind in ("logprobs", "prompt_logprobs"):
        entries = [entry for output in found["x"] for entry in getattr(output, kind)]
        exact = [entry for output in wanted["x"] for entry in getattr(output, kind)]
        assert [entry.token_id for entry in entries] == [entry.token_id for entry in exact]
        assert [entry.rank for entry in entries] == [entry.rank for entry in exact]
        for one, other in zip(entries, exact, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


@pytest.mark.slow
def test_a_mask_and_drafts(dense):
    masked = engine(dense)
    mask = Multiples()
    masked.add(greedy("masked", [5, 6], COUNT), mask)
    masked.add(greedy("free", [1, 2, 3], COUNT))
    found = step_all(masked)
    assert tokens(found["masked"]) == mask.accepted and len(mask.accepted) == COUNT
    answer = plain_greedy(dense, [1, 2, 3], COUNT)
    assert tokens(found["free"]) == answer
    drafted = engine(
        dense, drafter=Oracle([([1, 2, 3], answer)]), speculate="ngram", speculate_tokens=2
    )
    drafted.add(greedy("drafted", [1, 2, 3], COUNT))
    outputs = step_all(drafted)["drafted"]
    assert tokens(outputs) == answer and len(outputs) < COUNT


@pytest.mark.slow
def test_ends_preemption_and_shared_prefixes(dense):
    prompts = {"a": [1] * 10, "b": [2] * 10, "c": [*[1] * 10, 3]}
    answers = {name: plain_greedy(dense, ids, 12) for name, ids in prompts.items()}
    eos = answers["b"][4]
    crowded = engine(dense, eos_ids=frozenset({eos}), kv_tokens=28, max_model_len=24)
    for name, ids in prompts.items():
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=name != "b")
        crowded.add(Request(name, tuple(ids), params))
    found = {name: tokens(outputs) for name, outputs in step_all(crowded).items()}
    assert crowded.statistics().preemptions
    cut = answers["b"][: answers["b"].index(eos) + 1]
    assert found == answers | {"b": cut}
    # a prefix of an earlier request, found in its KV blocks
    crowded.add(greedy("again", [*[1] * 9, 7], 4))
    assert tokens(step_all(crowded)["again"]) == plain_greedy(dense, [*[1] * 9, 7], 4)
    assert crowded.statistics().prefix_hits >= 8


@pytest.mark.slow
def test_more_changes_of_the_block_table_than_a_step_sends(dense, monkeypatch):
    monkeypatch.setattr("engine.executors.cuda.executor.MOST_UPDATES", 2)
    found = run(engine(dense), {0: [greedy("a", list(range(16)), 3)]})
    assert found == {"a": plain_greedy(dense, list(range(16)), 3)}


@pytest.mark.slow
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_failed_launch_overwrites_no_results(dense, monkeypatch, is_ahead):
    device = FakeDevice()
    broken = engine(dense, device)
    device.is_ahead = is_ahead
    runner, count = broken._executor._runner, 0
    queue = runner.queue

    def fail(*launch):
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError("no memory")
        queue(*launch)

    # while the mask waits for its token, its neighbour's step fails alone and a request arrives
    broken.add(greedy("masked", [5, 6], COUNT), Multiples())
    broken.add(greedy("free", [1, 2, 3], COUNT))
    monkeypatch.setattr(runner, "queue", fail)
    outputs = {}
    for name in ("free", "late"):
        for output in broken.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        if name == "late":
            broken.add(greedy(name, [7], COUNT))
    found = {name: tokens(parts) for name, parts in step_all(broken, outputs).items()}
    assert outputs["free"][-1].error == "OutOfMemoryError in the engine"
    assert found["masked"] == masked_greedy(dense, [5, 6], COUNT)
    assert found["late"] == plain_greedy(dense, [7], COUNT)


@pytest.mark.slow
def test_a_failed_launch_leaves_the_device_usable(dense, monkeypatch):
    broken = engine(dense)
    runner = broken._executor._runner
    queue, failures = runner.queue, [torch.OutOfMemoryError("no memory")]

    def fail_once(*launch):
        if failures:
            raise failures.pop()
        queue(*launch)

    broken.add(greedy("a", [1, 2, 3, 4, 5], COUNT))
    broken.add(greedy("b", [6, 7], COUNT))
    monkeypatch.setattr(runner, "queue", fail_once)
    found = {name: tokens(outputs) for name, outputs in step_all(broken).items()}
    # the block table was sent again
    assert found == {
        "a": plain_greedy(dense, [1, 2, 3, 4, 5], COUNT),
        "b": plain_greedy(dense, [6, 7], COUNT),
    }


@pytest.mark.slow
def test_no_wait_can_be_left_out(dense):
    def run_with(ignored: int) -> tuple[dict[str, list[int]], int]:
        device = FakeDevice()
        served = engine(dense, device)
        before = device.num_waits
        device.ignored_wait = before + ignored if ignored >= 0 else -1
        found = run(served, {0: [greedy("a", [1, 2, 3], 4)]})
        return found, device.num_waits - before

    expected, num_waits = run_with(-1)
    assert expected == {"a": plain_greedy(dense, [1, 2, 3], 4)} and num_waits == 4
    for wait in range(num_waits):
        try:
            found, _ = run_with(wait)
        except Exception:
            continue
        assert found != expected, wait


@pytest.mark.slow
def test_logits_of_a_prompt(dense):
    executor = engine(dense)._executor
    found = executor.logits(prompt_batch(range(15), block_size=4))
    wanted = plain_logits(dense, list(range(15)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
