"""Tiny training runs: their settings, their tensors and their losses."""

import json

import torch
from safetensors.torch import load_file

from weights.training.run_folder import saved_states
from weights.training.trainer import Trainer

# `memplus train` in a process that kills itself at an fsync; its first argument is which one
KILLED = """
import os, signal, sys
from server.cli.main import main
left, fsync = int(sys.argv[1]), os.fsync
def counted(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = counted
sys.exit(main(["train", *sys.argv[2:]]))
"""
MEMORY = (
    "memory = {num_heads = 2, num_subkeys = 8, top_k = 4, query_dim = 8, value_dim = 16,"
    ' qk_norm = true, layers = {"0" = "memory_plus", "1" = "memory_plus"}}'
)
CONFIG = """
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
tie_word_embeddings = true
max_position_embeddings = 64
[data]
train = ["{texts}"]
validation_share = 0.1
vocab_size = 300
sequence_length = 24
[optimizer]
lr = 3e-3
table_lr = 1e-2
warmup_steps = 3
[run]
steps = 8
tokens_per_step = 128
dtype = "float32"
checkpoint_every = 4
evaluate_every = 4
"""


def run(config, folder, resume=False, until=None):
    made = Trainer(config, folder, resume=resume)
    reports = []

    def on_step(report):
        reports.append(report)
        return report.step != until

    made.run(on_step)
    return reports


def tensors(folder):
    """All tensors of the newest checkpoint."""
    newest = saved_states(folder / "checkpoints")[-1]
    return {
        f"{file.name} {name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def check_same(folder, other):
    found, wanted = tensors(folder), tensors(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def records(folder):
    """All records of the log without times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"tokens_per_s": 0} for line in lines]


def losses(folder):
    return [record["loss"] for record in records(folder) if record["kind"] == "step"]
