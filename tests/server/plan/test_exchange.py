"""Exchanges of tensor-parallel ranks: those that the engine makes, and their time by hand."""

import pytest
import torch

from engine.executors.parallel.shares import RankShare
from server.plan.exchange import Collective, Exchange
from server.plan.machine import Link
from tests.engine.executors.parallel.test_sharded_model import forward, share_of
from tests.models import feed_forward_changes, random_model, tiny_config


class RecordingGroup:
    """The group of rank 0, which notes each exchange and gets its own values from the others."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size
        self.collectives: list[Collective] = []

    def sum(self, x):
        self.collectives.append(Collective("all-reduce", x.nbytes))
        return x

    def gather_columns(self, x):
        self.collectives.append(Collective("all-gather", self.size * x.nbytes))
        return torch.cat([x] * self.size, dim=1)

    def exchange_columns(self, x):
        self.collectives.append(Collective("all-to-all", x.nbytes))
        return x[:, : x.shape[1] // self.size]


@pytest.mark.parametrize("sharding", ["columns", "rows"])
@pytest.mark.parametrize(
    ("kinds", "memory"),
    [
        (("dense", "moe"), {}),
        (("memory_plus", "pkm"), {}),
        (("memory_plus", "dense"), {"placement": "beside", "value_dim": 24}),
        (("pkm",), {"value_projection": True, "value_dim": 12}),
        (("peer", "dense"), {"share_values": False}),
    ],
    ids=lambda one: "-".join(one),
)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_the_engine_exchanges_what_is_planned(sharding, kinds, memory, dtype, size):
    changes = feed_forward_changes(*kinds, **({"value_dim": 48} | memory))
    config = tiny_config(hidden_size=48, num_heads=6, num_kv_heads=3, **changes)
    model, group = random_model(config, dtype), RecordingGroup(size)
    share = RankShare(config, 0, size, sharding)
    with torch.inference_mode():
        forward(share_of(model, share, group), share.kv_config)
    # 7 tokens, of which each has logits
    planned = Exchange(config, size, sharding, dtype.itemsize, False).collectives(7, 7)
    assert group.collectives == planned


def test_a_rank_sends_all_parts_but_its_own():
    sent = {kind: Collective(kind, 800).sent_bytes(8) for kind in ("all-gather", "all-to-all")}
    assert sent == {"all-gather": 700, "all-to-all": 700}
    # to sum the parts, and to spread the sums
    assert Collective("all-reduce", 800).sent_bytes(8) == 1400
    assert Collective("all-reduce", 800).sent_bytes(2) == 800


def test_exchanges_take_their_latency_and_the_time_of_their_bytes():
    exchange = Exchange(tiny_config(), 2, "columns", 2, False)
    # 2 layers with 2 sums of [5, 32], and the logits of 3 tokens
    assert exchange.sent_bytes(5, 3) == 4 * 320 + 3 * 260 * 2 / 2
    seconds = exchange.seconds(5, 3, Link(gb_per_s=1e-6, latency_s=0.5))
    assert seconds == pytest.approx(5 * 0.5 + (1280 + 780) / 1000)
    assert len(exchange.collectives(5, 0)) == 4
    assert not Exchange(tiny_config(), 1, "columns", 2, False).collectives(5, 3)


def test_logits_are_padded_to_equal_parts():
    # 260 logits on 3 ranks: 87 each
    last = Exchange(tiny_config(num_kv_heads=4), 3, "columns", 2, False).collectives(1, 1)[-1]
    assert last == Collective("all-gather", 3 * 87 * 2)


def test_gpus_also_send_the_last_tokens_and_gather_wide_logits():
    on_cpu, on_gpu = (
        Exchange(tiny_config(), 2, "columns", 2, is_on_gpu).collectives(5, 3)
        for is_on_gpu in (False, True)
    )
    # one token of 8 bytes for each of 64 sequences
    assert on_gpu[0] == Collective("broadcast", 512) and on_gpu[0].sent_bytes(2) == 512
    assert on_gpu[1:-1] == on_cpu[:-1]
    assert on_gpu[-1] == Collective("all-gather", 3 * 260 * 4)
