"""Row patches on the CUDA executor, interpreted: in graphs, in flight, in both tiers of tables.

The strict interpreter refuses to read a patch that is no longer alive.
"""

import gc
import logging
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RequestError
from engine.executors.executor import make_executor
from engine.executors.lookahead import LookaheadConfig
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams
from tests.engine.executors.cuda.fake_device import FakeDevice
from tests.engine.executors.cuda.on_cpu import cuda_on_cpu
from tests.engine.patches import patch_of
from tests.engine.test_company import step_all, tokens
from tests.engine.test_patched_requests import asks, changed_model, model_of
from tests.memory_ops.interpreted.test_host_in_model import on_host
from tests.models import plain_greedy, run

pytestmark = pytest.mark.slow

KINDS = ("memory_plus", "dense")
PROMPTS = {"a": [1, 2, 3], "b": [4, 5], "c": [11]}
COUNT = 3
CONFIG = EngineConfig(
    kv_cache_gib=0.001, max_num_seqs=4, max_batched_tokens=16, block_size=4, max_model_len=64
)
DEVICE = FakeDevice.torch_device


def check(
    kinds, config=CONFIG, table_of=None, lookahead=None, count=COUNT, num_first=1, **memory
) -> FakeDevice:
    """Compare tokens with those of models with changed tables, and counts with the CPU's.

    ``num_first`` requests arrive first, and the others while these decode. The largest graphs of
    decodes and of mixed steps run all steps, with padding.
    """
    model = model_of(kinds, **memory)
    first, second = (patch_of(model, seed, count=40) for seed in (1, 2))
    sets = {"a": ((first, 1.0), (second, -0.5)), "b": (), "c": ((second, 1.0),)}
    expected = {
        name: plain_greedy(changed_model(model, *sets[name], kinds=kinds, **memory), ids, count)
        for name, ids in PROMPTS.items()
    }

    def found(executor):
        served = Engine(executor, config)
        patches = [replace(patch, layers=patch.to(DEVICE).layers) for patch in (first, second)]
        for patch in patches:
            served.patches.put(patch)
        requests = [asks(name, count, *sets[name], prompt=ids) for name, ids in PROMPTS.items()]
        assert run(served, {0: requests[:num_first], 1: requests[num_first:]}) == expected
        return [patch.counts() for patch in patches]

    counts = found(make_executor(model, config))
    if table_of is not None:
        model.attach_tables({name: table_of(t.rows) for name, t in model.tables.items()})
    device = FakeDevice()
    executor = cuda_on_cpu(model, config, device, lookahead, warm=False)
    for shape in executor._buckets:
        if shape.sequences == config.max_num_seqs:
            executor._capture(shape)
    assert found(executor) == counts
    return device


def test_sets_in_one_batch_in_graphs():
    assert check(("memory_plus",), count=2, num_first=3).num_replays == 1


def test_mixed_steps_in_graphs():
    assert check(KINDS, replace(CONFIG, max_batched_tokens=64)).num_replays == COUNT + 1


def test_tables_of_several_layers():
    check(("memory_plus", "pkm", "memory_plus"), share_values=False)


@pytest.mark.parametrize("lookahead", [None, LookaheadConfig(1, 2)])
def test_tables_in_host_memory_behind_a_cache_that_evicts(lookahead):
    kinds = ("memory_plus", "dense", "memory_plus")
    check(kinds, table_of=lambda rows: on_host(rows, len(kinds)), lookahead=lookahead)


def served_with_patch(device, eos_ids=frozenset()):
    """An engine that has loaded a patch, to which it has the only reference."""
    model = model_of(KINDS)
    served = Engine(cuda_on_cpu(model, CONFIG, device, warm=False), CONFIG, eos_ids)
    patch = patch_of(model, 1, count=64)
    served.patches.put(patch)
    return served, PatchRef(patch.content_hash)


def ending_request():
    """A request whose last token ends it early, while the step of the next one is in flight."""
    model = model_of(KINDS)
    changed = changed_model(model, (patch_of(model, 1, count=64), 1.0), kinds=KINDS)
    answer = plain_greedy(changed, [1, 2, 3], 6)
    ends = next(n for n in range(1, 5) if answer[n] not in answer[:n])
    sampling = SamplingParams(max_tokens=6, temperature=0)
    return Request("a", (1, 2, 3), sampling), answer[: ends + 1]


def test_a_patch_stays_until_the_steps_in_flight_are_done():
    device = FakeDevice()
    # the fake's queue would keep the patch too
    device.is_ahead = True
    request, answer = ending_request()
    served, ref = served_with_patch(device, eos_ids=frozenset(answer[-1:]))
    served.add(replace(request, patches=(ref,)))
    served.patches.remove(ref.content_hash)
    outputs = []
    while not (outputs and outputs[-1].finish_reason):
        outputs += served.step().outputs
        gc.collect()
    assert tokens(outputs) == answer
    # a further step of the request, which is in flight, reads the patch
    assert served.has_work and served.patches.num_alive == 1
    assert not step_all(served)
    gc.collect()
    assert served.patches.num_alive == 0


@pytest.mark.parametrize("fails", ["queue", "_count"])
def test_a_failed_launch_waits_for_what_reads_the_patch(fails, monkeypatch, caplog):
    # pytest keeps logged tracebacks, which keep the batch
    caplog.set_level(logging.CRITICAL + 1, "engine.engine")
    device = FakeDevice()
    served, ref = served_with_patch(device)
    executor = served._executor
    owner = executor._runner if fails == "queue" else executor
    run = getattr(owner, fails)

    def fail(*work):
        run(*work)
        raise RuntimeError("after its kernels were queued")

    monkeypatch.setattr(owner, fails, fail)
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=3), patches=(ref,))
    served.add(request)
    served.patches.remove(ref.content_hash)
    (output,) = served.step().outputs
    assert output.error == "RuntimeError in the engine"
    gc.collect()
    assert served.patches.num_alive == 0
    device.record().wait()


def test_without_patches_graphs_have_none():
    config = replace(CONFIG, max_patches=0)
    executor = cuda_on_cpu(model_of(KINDS), config, warm=False)
    for one in (executor, cuda_on_cpu(model_of(("peer",)), CONFIG, warm=False)):
        inputs = one._staging.inputs(one._largest)
        assert not any(name.startswith("patch") for name in inputs.on_device)
    with pytest.raises(RequestError, match="memory_patches"):
        Engine(executor, config).add(
            Request("a", (1,), SamplingParams(1), patches=(PatchRef("a"),))
        )
