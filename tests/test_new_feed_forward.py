"""A new feed-forward kind changes only the files that CONTRIBUTING.md lists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULE = '''"""A toy feed-forward: squared ReLU."""

from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.forward_trace import ForwardTrace
from engine.model.row_patches import ForwardPatches
from engine.model.uninitialised import Linear


class ToyFeedForward(nn.Module):
    """``down(relu(up(x))^2)`` (arXiv 2109.08668)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(
        self,
        x_TD: Tensor,
        trace: ForwardTrace | None = None,
        patches: ForwardPatches | None = None,
    ) -> Tensor:
        return self.down(self.up(x_TD).relu().square())
'''
# file -> [(old text, new text)]
EDITS = {
    "engine/model/config.py": [
        ('FEED_FORWARD_KINDS = ("dense", ', 'FEED_FORWARD_KINDS = ("dense", "toy", '),
    ],
    "engine/model/<kind>.py": [("", MODULE)],
    "engine/model/feed_forward.py": [
        (
            "    assert kind in MEMORY_KINDS",
            '    if kind == "toy":\n'
            '        return NamedFeedForward("toy", ToyFeedForward(config))\n'
            "    assert kind in MEMORY_KINDS",
        ),
        (
            "from engine.model.uninitialised",
            "from engine.model.toy import ToyFeedForward\nfrom engine.model.uninitialised",
        ),
    ],
    "engine/model/flops.py": [
        (
            '    elif kind == "moe":',
            '    elif kind == "toy":\n'
            '        parts["feed_forward"] += 4 * width * config.intermediate_size\n'
            '    elif kind == "moe":',
        ),
    ],
    "weights/checkpoints/feed_forward_json.py": [
        ('_EXPERT_SIZE, "memory"}', '_EXPERT_SIZE, "memory", "toy_layers"}'),
        (
            "    if model.memory is not None:\n",
            "    toys = [i for i, kind in enumerate(model.feed_forward) if kind == 'toy']\n"
            '    raw |= {"toy_layers": toys} if toys else {}\n'
            "    if model.memory is not None:\n",
        ),
        (
            "    values: dict[str, Any] = {}\n    if raw.get",
            '    for layer in raw.get("toy_layers", ()):\n'
            '        kinds[layer] = "toy"\n'
            "    values: dict[str, Any] = {}\n    if raw.get",
        ),
    ],
}
PROGRAM = """
import sys
from pathlib import Path
import torch
from engine.model.flops import forward_flops
from engine.model.transformer import Transformer
from tests.models import plain_logits, random_model, save_model, served_logits, tiny_config
from weights.checkpoints.checkpoint import load_model
from weights.training.initialise import initialise

config = tiny_config(num_layers=3, feed_forward=("dense", "toy", "toy"))
model = random_model(config)
loaded, read = load_model(save_model(model, Path(sys.argv[1])))
assert read.model.feed_forward == config.feed_forward
ids = list(range(20))
wanted = plain_logits(model, ids)
torch.testing.assert_close(plain_logits(loaded, ids), wanted)
torch.testing.assert_close(served_logits(loaded, ids), wanted, rtol=1e-3, atol=1e-3)
assert forward_flops(config, 1)["feed_forward"] == (6 + 4 + 4) * 32 * 48
made = Transformer(config)
initialise(made, torch.Generator().manual_seed(0))
assert all(parameter.isfinite().all() for parameter in made.parameters())
print("a toy kind trains, loads and serves")
"""


def listed_files() -> list[str]:
    """The files in the numbered list of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(r"^[0-9]\. `([^`]+)`", text, re.MULTILINE)


@pytest.mark.slow
def test_a_toy_kind_changes_only_the_listed_files(tmp_path):
    assert listed_files() == list(EDITS)
    skipped = shutil.ignore_patterns("__pycache__", "wordnet")
    for package in ("memory_ops", "engine", "weights", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skipped)
    for name, edits in EDITS.items():
        file = tmp_path / name.replace("<kind>", "toy")
        text = file.read_text() if file.exists() else ""
        for before, after in edits:
            assert not before or text.count(before) == 1, (name, before)
            text = text.replace(before, after) if before else after
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "a toy kind trains, loads and serves\n", done.stderr
