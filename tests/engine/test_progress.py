"""What tells a slow step from one that hangs."""

import torch

from engine import progress
from engine.ops.layout import TokenLayout
from engine.progress import Progress
from tests.models import random_model, tiny_config


def test_a_mark_begins_anew_and_rest_is_no_stall(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    seen = Progress()
    assert seen.stalled_s == 0
    seen.mark()
    now = 103.0
    assert seen.stalled_s == 3
    seen.mark()
    assert seen.stalled_s == 0
    now = 200.0
    seen.rest()
    assert seen.stalled_s == 0


def test_each_layer_is_progress():
    model, at = random_model(tiny_config(num_layers=3)), torch.arange(4)
    marks = []
    model(at, TokenLayout(at, (0, 4)), at, on_layer=lambda: marks.append(1))
    assert len(marks) == 3
