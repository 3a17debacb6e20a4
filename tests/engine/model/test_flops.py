"""Operation counts from shapes against torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.model.config import PLACEMENTS
from engine.model.flops import StepFlops, forward_flops, total_flops
from engine.model.layout import TokenLayout
from tests.models import feed_forward_changes, random_model, tiny_config

LENGTH = 16


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["dense", "moe", "memory_plus", "pkm", "peer"])
def test_products_equal_those_that_torch_counts(kind, placement):
    memory = {} if kind in ("dense", "moe") else {"placement": placement}
    config = tiny_config(**feed_forward_changes("dense", kind, **memory))
    model = random_model(config)
    layout = TokenLayout(torch.arange(LENGTH), (0, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(LENGTH), layout, torch.arange(LENGTH))
    # torch does not count attention on the CPU
    found = forward_flops(config, attended=0)
    total = found["attention"] + found["feed_forward"] + found["memory"] + found["head"]
    if config.memory is not None:
        # custom operators sum rows and candidates; torch does not count them
        reads = config.memory.num_heads * config.memory.top_k * config.memory.value_dim
        total -= 2 * reads * (2 if kind == "peer" else 1)
        total -= config.memory.num_heads * config.memory.top_k**2
    assert total * LENGTH == counter.get_total_flops()


def test_attention_costs_two_products_per_visible_token():
    config = tiny_config()
    more = forward_flops(config, 10)["attention"] - forward_flops(config, 0)["attention"]
    assert more == 10 * config.num_layers * 2 * (2 * config.num_heads * config.head_dim)


def test_a_larger_table_costs_only_its_scores():
    def parts(num_subkeys):
        changes = feed_forward_changes("memory_plus", num_subkeys=num_subkeys)
        return forward_flops(tiny_config(**changes), 100.0)

    small, large = parts(8), parts(80)
    # 72 more subkeys in both halves of two heads, with half of a query of width 8
    assert large["scoring"] - small["scoring"] == 2 * 2 * 2 * 72 * 4
    assert large["memory"] - small["memory"] == large["scoring"] - small["scoring"]
    assert all(large[part] == small[part] for part in ("attention", "feed_forward", "head"))


@pytest.mark.parametrize("kind", ["dense", "moe", "memory_plus", "pkm", "peer"])
def test_a_step_costs_what_its_tokens_cost(kind):
    config = tiny_config(**feed_forward_changes("dense", kind))
    flops = forward_flops(config, attended=7)
    # 5 tokens after 2 cached ones and 5 after 6: they attend to 70 tokens in total
    whole, largest = StepFlops(config).of((0, 5, 10), (7, 11), 4)
    assert whole == 10 * total_flops(flops) - 6 * flops["head"]
    assert whole - 4 * flops["head"] <= config.num_layers * largest
    # logits of the last positions only, or of all positions of a scored prompt
    assert StepFlops(config).of((0, 1), (1,), 10**6)[1] == 10**6 * flops["head"]
