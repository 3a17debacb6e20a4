"""The optimizer: clipping, weight decay and learning rate schedules."""

import math

import pytest
import torch

from engine.errors import ConfigError
from engine.model.config import MemoryConfig
from memory_ops.page_lock import PageLockError
from memory_ops.tables.trained import TrainedTable
from tests.models import random_model, tiny_config
from weights.errors import TrainingError
from weights.training.optimizer import Optimizer, lr_share
from weights.training.train_config import OptimizerConfig


def made(config):
    memory = MemoryConfig(2, 8, 3, query_dim=8, value_dim=16, qk_norm=True)
    kinds = ("memory_plus", "dense")
    model = random_model(tiny_config(feed_forward=kinds, memory=memory)).requires_grad_(True)
    table = TrainedTable(torch.randn(64, 16))
    return model, table, Optimizer(model, [table], config)


def backward(model, table, factor):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, factor)
    rows = torch.arange(6).view(1, 2, 3)
    out = table.read(rows, torch.ones(1, 2, 3))
    out.backward(torch.full_like(out, factor))


def test_all_gradients_are_clipped_by_their_common_norm():
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.0, beta1=0.0, beta2=0.0)
    model, table, optimizer = made(config)
    backward(model, table, 0.1)
    count = sum(p.numel() for p in model.parameters()) + 6 * 16
    seen = []
    optimizer.dense.register_step_pre_hook(
        lambda *_: seen.extend(float(p.grad.flatten()[0]) for p in model.parameters())
    )
    norm = optimizer.step(1.0)
    assert norm == pytest.approx(0.1 * math.sqrt(count), rel=1e-5)
    assert seen == pytest.approx([0.1 * 0.5 / norm] * len(seen), rel=1e-5)
    first, _ = optimizer.tables.moments[0]
    assert first[:6] == pytest.approx(0.1 * 0.5 / norm, rel=1e-5) and not first[6:].any()


def test_moments_that_cannot_be_locked_are_refused(monkeypatch):
    def refused(*_, **__):
        raise PageLockError("cannot page-lock 8 bytes of host memory: out of memory")

    monkeypatch.setattr(TrainedTable, "new_moments", refused)
    with pytest.raises(ConfigError, match="run.table_tier: moments of tables: cannot page-lock 8"):
        made(OptimizerConfig())


def test_only_matrices_decay():
    model, table, optimizer = made(OptimizerConfig(weight_decay=0.5, lr=0.1))
    backward(model, table, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = table.table_RV.clone()
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if is_matrix else 1))
    assert torch.equal(table.table_RV, rows)


def test_a_nan_norm_changes_no_weight():
    model, table, optimizer = made(OptimizerConfig())
    backward(model, table, math.nan)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match="norm is nan"):
        optimizer.step(1.0)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("decay", "halfway", "last"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_rates_rise_and_fall(decay, halfway, last):
    config = OptimizerConfig(warmup_steps=10, decay=decay, least_lr_share=0.1)
    share = [lr_share(config, step, 110) for step in range(1, 111)]
    assert share[0] == 0.1 and share[9] == 1.0
    assert share[59] == pytest.approx(halfway) and share[-1] == pytest.approx(last)
    assert share[:10] == sorted(share[:10]) and share[10:] == sorted(share[10:], reverse=True)
    assert lr_share(OptimizerConfig(warmup_steps=0), 1, 1) == pytest.approx(0.1)
    # steps after the schedule's end, and a warm-up that would not end before it
    assert lr_share(config, 200, 110) == pytest.approx(last)
    shares = [lr_share(config, step, 10) for step in range(1, 11)]
    assert shares[0] == 1.0 and shares[-1] == pytest.approx(last)
