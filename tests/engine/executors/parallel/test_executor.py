"""Whole engines over 2 and 3 processes: the tokens of one process; and what ranks are sent."""

from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.executors.parallel.executor import ParallelExecutor
from engine.executors.parallel.group import RankLostError
from engine.executors.parallel.shares import RankShare
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams
from server.config import EngineSettings
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from tests.engine.patches import patch_of
from tests.models import feed_forward_changes, random_model, save_model, tiny_config
from weights.models.named_models import ModelFolder

ALL_KINDS = ("dense", "memory_plus", "peer", "moe", "pkm")
PATCHED_KINDS = ("memory_plus", "dense", "pkm")


def saved(kinds, folder):
    """A saved model of layers of these kinds, and the model."""
    torch.manual_seed(3)
    config = tiny_config(
        hidden_size=48,
        num_heads=6,
        num_kv_heads=3,
        **feed_forward_changes(*kinds, value_dim=48, share_values=False),
    )
    model = random_model(config)
    return save_model(model, folder), model


def engine_of(folder, config=None, **options):
    """An engine on the CPU for a saved model."""
    config = config or EngineConfig(kv_cache_gib=0.01, speculate="ngram")
    options = ModelOptions(model=str(folder), device="cpu", **options)
    return build_engine(EngineSettings(options, ModelFolder(folder), config))


def answers(engine, patches=()):
    """Greedy and drawn answers to prompts of which some share a prefix, some with patches."""
    requests = [
        Request(
            f"request-{i}",
            (*range(40), *range(7 * i, 9 * i)),
            SamplingParams(max_tokens=10, temperature=i % 2, seed=i, logprobs=0),
            patches=patches if i > 1 else (),
        )
        for i in range(4)
    ]
    found = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            found[output.request_id] += output.token_ids
    engine.check_idle()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (ALL_KINDS, {"tensor_parallel": 2}),
        (ALL_KINDS, {"tensor_parallel": 3, "table_sharding": "rows"}),
        (PATCHED_KINDS, {"tensor_parallel": 3, "table_dtype": "int8"}),
        (PATCHED_KINDS, {"tensor_parallel": 2, "table_sharding": "rows"}),
    ],
    ids=["columns", "rows", "patches-columns", "patches-rows"],
)
def test_the_tokens_are_those_of_one_process(kinds, options, tmp_path):
    folder, model = saved(kinds, tmp_path / "model")
    single = {"table_dtype": options.get("table_dtype", "auto")}
    one, several = engine_of(folder, **single), engine_of(folder, **options)
    try:
        uses = ()
        if kinds == PATCHED_KINDS:
            patch = patch_of(model, 1)
            one.patches.put(patch)
            shared = several._executor.share_patch(patch)
            several.patches.put(shared)
            assert shared.num_bytes == patch.num_bytes
            uses = (PatchRef(patch.content_hash, 0.5),)
        expected = answers(one, uses)
        assert answers(several, uses) == expected
        if uses:
            assert answers(several) == answers(one) != expected
            del shared
            several.patches.remove(patch.content_hash)
            # the ranks free a patch that no request uses, and go on
            assert answers(several) == answers(one)
    finally:
        several.close()


class SentMessages:
    """Ranks without processes, whose messages stay in a list; sending can fail."""

    def __init__(self, size=2):
        self.others, self.sent, self.fails = size - 1, [], False

    def send(self, messages):
        if self.fails:
            raise RankLostError("a rank has died")
        self.sent += messages

    def send_to(self, rank, message):
        assert rank == 1 + len(self.sent) % self.others
        self.send([message])


def test_numbers_of_dead_patches_travel_with_the_next_message():
    config = tiny_config(**feed_forward_changes("memory_plus"))
    model, ranks = random_model(config), SentMessages()
    executor = ParallelExecutor(model, 4, 16, RankShare(config, 0, 2), ranks)
    first, second, third = (patch_of(model, seed) for seed in range(3))
    kept = executor.share_patch(first)
    del kept
    ranks.fails = True
    with pytest.raises(RankLostError):
        executor.share_patch(second)
    ranks.fails = False
    kept = executor.share_patch(third)
    # a server without requests sends patches only
    executor.share_patch(replace(third, content_hash="another"))
    del kept
    executor.share_patch(first)
    numbers = [(message.number, message.freed) for message in ranks.sent]
    assert numbers == [(0, []), (2, [0, 1]), (3, []), (4, [3, 2])]


@pytest.mark.slow
def test_a_process_that_dies_while_it_loads_is_named(tmp_path, monkeypatch):
    folder, _ = saved(("dense",), tmp_path / "model")
    monkeypatch.setattr("server.parallel_engine.RANK_ENTRY", "server.parallel_engine:no_function")
    with pytest.raises(RankLostError, match=r"rank 1 died while it loaded its share \(exit 1"):
        engine_of(folder, tensor_parallel=2)
