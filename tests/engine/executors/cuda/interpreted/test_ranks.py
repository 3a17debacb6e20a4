"""Tensor-parallel ranks on the CUDA executor, interpreted: the tokens of one process.

Rank 0's fake device runs each step as late as it may, so one step is always in flight.
"""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.batch import DeviceLostError, warm_up_batch
from engine.executors.cuda import rank_sizing
from engine.executors.cuda.buckets import StepShape
from engine.executors.cuda.rank_sizing import (
    StepTooLargeError,
    agreed_num_blocks,
    rank_settings,
    sized_rank,
)
from engine.executors.cuda.step import DeviceModel, DeviceRank
from engine.executors.executor import make_executor
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.shares import RankShare
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams
from tests.engine.executors.cuda.prompt_device import PromptDevice
from tests.engine.executors.cuda.rank_threads import Turn, rank_threads, ranked_executor
from tests.engine.patches import patch_of
from tests.engine.test_company import Multiples, step_all, tokens
from tests.models import feed_forward_changes, random_model, tiny_config

COUNT = 5
CONFIG = EngineConfig(
    max_num_seqs=3, max_batched_tokens=16, block_size=4, max_model_len=64, kv_cache_gib=0.001
)


def model_of(*kinds, **memory):
    torch.manual_seed(5)
    changes = feed_forward_changes(*kinds, **({"value_dim": 48} | memory))
    config = tiny_config(
        hidden_size=48,
        num_heads=6,
        num_kv_heads=3,
        attention_bias=True,
        mlp_bias="dense" in kinds,
        **changes,
    )
    return random_model(config)


def requests(patches=()):
    """A greedy and a drawn answer, one with rules that a graph does not apply, one with a mask."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3, "top_k": 20, "logprobs": 1},
        {"temperature": 0, "repetition_penalty": 1.5, "logit_bias": ((7, 4.0),)},
        {"temperature": 0},
    ]
    prompts = [(1, 2, 3), tuple(range(20, 41)), (4, 5), (6, 7)]
    return [
        Request(
            f"r{number}",
            prompt,
            SamplingParams(max_tokens=COUNT, ignore_eos=True, **kind),
            patches=patches if number % 2 else (),
        )
        for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


def answers(engine, patches=()):
    *free, last = requests(patches)
    for request in free:
        engine.add(request)
    engine.add(last, Multiples())
    found = step_all(engine)
    engine.check_idle()
    return {name: tokens(outputs) for name, outputs in found.items()}


CASES = [
    (("memory_plus",), {"output_gate": True}, 2, "columns"),
    (("dense", "moe"), {}, 2, "columns"),
    (("memory_plus",), {"placement": "beside", "scalar_gate": True}, 3, "rows"),
    (("pkm",), {}, 2, "columns"),
    (("pkm",), {"value_projection": True}, 2, "rows"),
    (("pkm",), {}, 3, "rows"),
    (("peer",), {}, 3, "columns"),
    (("peer",), {}, 2, "rows"),
]


@pytest.mark.parametrize(
    ("kinds", "memory", "size", "sharding"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case != CASES[0] else []) for case in CASES],
    ids=lambda one: "-".join(map(str, one)) if isinstance(one, tuple | dict) else str(one),
)
def test_the_tokens_are_those_of_one_process(kinds, memory, size, sharding):
    model = model_of(*kinds, **memory)
    wanted = answers(Engine(make_executor(model, CONFIG), CONFIG))
    with ranked_executor(model, CONFIG, size, sharding) as (first, others):
        first.warm_up()
        assert answers(Engine(first, CONFIG)) == wanted
        # a rank that took part in the last step has captured all graphs before
        assert first._inputs and len(others) == size - 1
        assert all(one._inputs.keys() == first._inputs.keys() for one in others.values())
        assert first._device.num_replays
    counts = {one._runner._model._group.num_collectives for one in (first, *others.values())}
    assert len(counts) == 1
    assert {len(name) for name in wanted.values()} == {COUNT}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["columns", "rows"])
def test_row_patches(sharding):
    model = model_of("memory_plus")
    patch = patch_of(model, 1)
    uses = (PatchRef(patch.content_hash, 0.5),)
    one = Engine(make_executor(model, CONFIG), CONFIG)
    one.patches.put(patch)
    with ranked_executor(model, CONFIG, 2, sharding) as (first, _):
        several = Engine(first, CONFIG)
        several.patches.put(first.share_patch(patch))
        wanted = answers(one, uses)
        assert answers(several, uses) == wanted != answers(one)


@pytest.mark.slow
def test_lookups_are_counted_once_a_step():
    model = model_of("memory_plus")
    with ranked_executor(model, CONFIG, 2) as (first, _):
        first.warm_up()
        engine = Engine(first, CONFIG)
        engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=3, temperature=0)))
        step_all(engine)
        (table,) = first.tables.values()
        assert table.statistics()[0].lookups == 3


@pytest.mark.parametrize("is_warm_up", [True, False])
def test_a_rank_that_waits_in_a_failed_step_ends(is_warm_up, monkeypatch, capfd):
    left = pytest.raises(RankLostError, match="an exchange between tensor-parallel ranks failed")
    with left, ranked_executor(model_of("dense"), CONFIG, 2) as (first, _):
        # the other rank has been sent the step
        failure = torch.OutOfMemoryError("the GPU is full")
        monkeypatch.setattr(first._runner, "queue", raiser(failure))
        if is_warm_up:
            with pytest.raises(ConfigError, match="the graphs of steps do not fit"):
                first.warm_up()
        else:
            with pytest.raises(DeviceLostError, match="step failed: the GPU is full"):
                first.launch(warm_up_batch())
        first.close()
    assert "RankLostError" in capfd.readouterr().err


def test_rank_0_frees_its_graphs_when_it_ends():
    # nccl does not end as long as one exists
    with ranked_executor(model_of("dense"), CONFIG, 2) as (first, _):
        graph = StepShape(1, 1, 1, True)
        first._capture(graph)
        assert graph in first._runner._graphs
        first.close()
        assert not first._runner._graphs


def test_a_gpu_that_cannot_hold_the_largest_step_raises_another_error_than_all_ranks(monkeypatch):
    monkeypatch.setattr(rank_sizing, "CudaDevice", lambda device: None)
    monkeypatch.setattr(rank_sizing, "GpuMemory", lambda device: None)
    monkeypatch.setattr(rank_sizing, "agreed_num_blocks", raiser(torch.OutOfMemoryError("full")))
    model = model_of("dense")
    rank = DeviceRank(RankShare(model.config, 1, 2), None)
    with pytest.raises(StepTooLargeError, match="GPU of tensor-parallel rank 1; lower --max-batc"):
        sized_rank(DeviceModel(model), CONFIG, rank, None)


def raiser(error):
    """A function that raises an error, whatever it is called with."""

    def fail(*arguments):
        raise error

    return fail


class Memory:
    """A GPU that has some bytes left for KV blocks."""

    def __init__(self, left):
        self._left = left

    def total(self):
        return 2**34

    def in_use(self):
        # a reserve of 256 MiB stays free
        return 2**34 - 2**28 - self._left

    def peak(self, work):
        work()
        return 0


@pytest.mark.parametrize("left", [21, 0])
def test_all_ranks_get_the_blocks_that_the_fullest_gpu_can_hold(left):
    model, found = model_of("dense"), {}
    config = replace(CONFIG, kv_cache_gib=None, gpu_memory_utilization=1.0)
    # of the 3 KV heads rank 1 has 2: 512 bytes of a block of 4 tokens
    memories = Memory(2**30), Memory(left * 512)

    def sized(own, rank):
        number = rank.share.rank
        try:
            arguments = own, config, rank, PromptDevice(), memories[number]
            found[number] = agreed_num_blocks(*arguments)
        except ConfigError as error:
            found[number] = str(error)

    with rank_threads(model, 2, "columns", Turn(), sized) as first:
        sized(*first)
    if left:
        # the executor adds a block
        assert found == {0: 20, 1: 20}
    else:
        assert "another tensor-parallel rank has too little memory" in found[0]
        assert found[1].startswith("kv_cache_gib: weights, tables and steps leave 0.00 GiB")
        assert found[1].endswith("(tensor-parallel rank 1)")


def test_each_rank_has_its_part_of_the_memory_that_the_user_gives():
    config = EngineConfig(kv_cache_gib=3.0, patch_memory_gib=1.0)
    found = [rank_settings(config, RankShare(model_of("dense").config, rank, 2)) for rank in (0, 1)]
    assert [one.kv_cache_gib for one in found] == [1.0, 2.0]
    assert [one.patch_memory_gib for one in found] == [0.5, 0.5]
