"""The shares of a model, run by threads as ranks, against the whole model."""

from dataclasses import replace

import pytest
import torch

from engine.executors.cpu.kernels import CPU_LIBRARY, CpuKernels
from engine.executors.parallel.messages import AddPatch
from engine.executors.parallel.native_layers import use_native_layers
from engine.executors.parallel.sharded_model import rank_model
from engine.executors.parallel.shares import RankShare
from engine.executors.parallel.tables import CapturedPart, shared_table
from engine.model.attention import kv_memory
from engine.model.layout import PagedKv, TokenLayout
from engine.model.row_patches import ScaledPatch, forward_patches
from memory_ops.tables.device import DeviceTable
from tests.conftest import TOLERANCE
from tests.engine.executors.parallel.rank_threads import run_ranks
from tests.engine.patches import patch_of
from tests.models import feed_forward_changes, random_model, tiny_config

BLOCK_SIZE = 4
STARTS = (0, 6, 7)


def share_of(model, share, group, *, is_captured=False):
    """One rank's model with its parts of the weights and tables of ``model``.

    If ``is_captured``, the tables are those of a GPU.
    """
    made = rank_model(share, group)
    weights = model.state_dict()
    parts = {name: share.part(name) for name in weights}
    cut = {
        name: one if parts[name] is None else parts[name].of(one) for name, one in weights.items()
    }
    made.load_state_dict(cut, assign=True)
    tables = {}
    for name, table in model.tables.items():
        rows, columns = share.table_rows, share.value_columns
        own = table.rows[rows.start : rows.stop]
        if share.table_sharding == "columns":
            own = table.rows[:, columns.start : columns.stop].contiguous()
        part = CapturedPart(own) if is_captured else DeviceTable(own)
        tables[name] = shared_table(part, share, group)
    made.attach_tables(tables)
    return made.eval().requires_grad_(False)


def forward(model, config, patches=None, scale=1.0):
    """Hidden states and logits of two sequences, one of which continues a context of 3 tokens.

    The values of its keys and values are at most ``scale``.
    """
    kv_blocks = kv_memory(config, 4, BLOCK_SIZE, model.model.norm.weight)
    kv_blocks.copy_(scale * torch.linspace(-1, 1, BLOCK_SIZE * 8)[: BLOCK_SIZE * 2].view(-1, 1)[:4])
    positions_T = torch.tensor([0, 1, 2, 3, 4, 5, 3])
    table_SB = torch.tensor([[0, 1], [2, 0]])
    kv_index_T = torch.tensor([0, 1, 2, 3, 4, 5, 11])
    paged = PagedKv(kv_index_T, table_SB, (6, 4))
    layout = TokenLayout(positions_T, STARTS, paged, patches)
    ids_T = torch.tensor([5, 99, 3, 200, 17, 8, 44])
    return model(ids_T, layout, torch.arange(7), kv_blocks, with_hidden=True)


@pytest.mark.parametrize(("size", "sharding"), [(2, "columns"), (3, "columns"), (2, "rows")])
@pytest.mark.parametrize(
    ("kinds", "memory"),
    [
        (("dense", "moe"), {}),
        (("memory_plus", "pkm"), {"qk_norm": True, "output_gate": True}),
        (("memory_plus", "dense"), {"placement": "beside", "scalar_gate": True, "value_dim": 24}),
        (("pkm",), {"value_projection": True, "value_dim": 12}),
        (("peer", "dense"), {"share_values": False}),
    ],
    ids=lambda one: "-".join(one),
)
def test_all_ranks_compute_the_logits_of_the_whole_model(size, sharding, kinds, memory):
    changes = feed_forward_changes(*kinds, **({"value_dim": 48} | memory))
    config = tiny_config(
        hidden_size=48,
        num_heads=6,
        num_kv_heads=3,
        attention_bias=True,
        tie_embeddings=size == 2,
        **changes,
    )
    model = random_model(config, torch.float64)
    patch = patch_of(model, 1) if config.takes_patches else None
    expected = forward(model, config, of_second_sequence(patch))

    def work(group):
        share = RankShare(config, group.rank, size, sharding)
        with torch.inference_mode():
            own = patch and AddPatch.of(0, patch, share.value_columns).patch()
            made = share_of(model, share, group)
            return forward(made, share.kv_config, of_second_sequence(own))

    for output in run_ranks(size, work):
        torch.testing.assert_close(output.logits_LV, expected.logits_LV)
        torch.testing.assert_close(output.hidden_LD, expected.hidden_LD)


def of_second_sequence(patch):
    """The use of a patch by the second of two sequences; None without a patch."""
    return patch and forward_patches([(), (ScaledPatch(patch, 0.5),)], STARTS)


def test_a_rank_has_its_part_of_the_weights():
    config = tiny_config(**feed_forward_changes("memory_plus"))
    share = RankShare(config, 1, 2)
    shapes = {name: tuple(one.shape) for name, one in rank_model(share, None).state_dict().items()}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8, 32)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (32, 16)
    assert shapes["model.layers.0.memory.gate.weight"] == (16, 32)
    assert shapes["model.layers.0.memory.gate.bias"] == (16,)
    assert shapes["model.layers.0.memory.value_proj.bias"] == (32,)
    assert replace(share, rank=0).value_columns == range(16)


@pytest.mark.parametrize("build", CPU_LIBRARY.runnable_builds)
def test_native_layers_give_the_same_logits(build):
    kinds = ("dense", "memory_plus", "moe", "pkm")
    changes = feed_forward_changes(*kinds, value_dim=32, output_gate=True)
    config = tiny_config(attention_bias=True, mlp_bias=True, **changes)
    model = random_model(config)
    # kernels have another layout of blocks, in which only zeros are the same
    expected = forward(model, config, scale=0.0).logits_LV

    def work(group):
        share = RankShare(config, group.rank, 2)
        with torch.inference_mode():
            own = share_of(model, share, group)
            use_native_layers(own, CpuKernels(build))
            assert not any(isinstance(one, torch.nn.Linear) for one in own.model.modules())
            return forward(own, share.kv_config, scale=0.0).logits_LV

    for logits_LV in run_ranks(2, work):
        relative, absolute = TOLERANCE[torch.float32]
        torch.testing.assert_close(logits_LV, expected, rtol=100 * relative, atol=100 * absolute)
