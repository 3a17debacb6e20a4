"""The trainer's TOML file: sections, command line changes, and errors by key."""

import pytest

from engine.errors import ConfigError
from weights.training.train_config import read_train_config

TEXT = """
[model]
hidden_size = 64
memory = {num_heads = 2}
[data]
train = ["a.txt", "b"]
[run]
steps = 10
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(TEXT)
    return path


def test_sections_and_defaults(file):
    config = read_train_config(file)
    assert config.data.train == ("a.txt", "b") and config.data.sequence_length == 256
    assert config.run.steps == 10 and config.optimizer.table_lr == 1e-3
    assert config.model == {"hidden_size": 64, "memory": {"num_heads": 2}}


def test_the_command_line_overrides_keys(file):
    changes = [
        "run.steps=20",
        "optimizer.lr = 1",
        "optimizer.decay=linear",
        "data.train=c.txt",
        "model.memory.num_subkeys=128",
        "optimizer.row_wise=true",
        'run.init_from="x=y"',
    ]
    config = read_train_config(file, changes)
    assert config.run.steps == 20 and config.optimizer.lr == 1.0
    assert config.optimizer.decay == "linear" and config.optimizer.row_wise is True
    assert config.data.train == ("c.txt",) and config.run.init_from == "x=y"
    assert config.model["memory"] == {"num_heads": 2, "num_subkeys": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.step=1", r"run.step: unknown key; did you mean run.steps\?"),
        ("run.lr=1", r"run.lr: unknown key; did you mean optimizer.lr\?"),
        ("optimizer.learning_rate=1", r"learning_rate: unknown key; did you mean optimizer.lr\?"),
        (
            "run.batch_size=1",
            r"run.batch_size: unknown key; did you mean run.tokens_per_step, in tokens\?",
        ),
        ("run.epochs=1", r"epochs: unknown key; did you mean run.steps, in optimizer steps\?"),
        ("run.max_steps=1", r"run.max_steps: .*; did you mean run.steps, in optimizer steps\?"),
        ("run.hidden_size=1", r"run.hidden_size: unknown key; did you mean model.hidden_size\?"),
        ("model.lr=1", r"model.lr: unknown key; did you mean optimizer.lr\?"),
        (
            "model.batch_size=1",
            r"model.batch_size: .*; did you mean run.tokens_per_step, in tokens\?",
        ),
        ("model.num_layers=1", r"model.num_layers: .*; did you mean model.num_hidden_layers\?"),
        ("model.n_layers=1", r"model.n_layers: .*; did you mean model.num_hidden_layers\?"),
        ("model.dim=1", r"model.dim: unknown key; did you mean model.hidden_size\?"),
        ("model.num_heads=1", r"num_heads: .*; did you mean model.num_attention_heads\?"),
        ("model.feed_forward=1", r"feed_forward: .*; did you mean model.intermediate_size\?"),
        ("model.hidden_siz=1", r"model.hidden_siz: .*; did you mean model.hidden_size\?"),
        ("model.dtype=x", r"model.dtype: has no effect on .*; did you mean run.dtype\?"),
        ("model.torch_dtype=x", r"torch_dtype: has no .*; did you mean run.dtype\?"),
        ("model.max_length=1", r"max_length: has no .*; did you mean data.sequence_length\?"),
        ("model.gradient_checkpointing=true", r"; did you mean run.checkpoint_activations\?"),
        ("model.vocab_size=1", r"vocab_size: has no .*; did you mean data.vocab_size\?"),
        ("model.top_k=1", r"top_k: has no .*; did you mean model.memory.top_k\?"),
        ("model.attention_dropout=0.1", "attention_dropout: has no effect on training; remove it"),
        ("model.initializer_range=1", "initializer_range: has no effect on training; remove it"),
        ("runs.steps=1", r"runs: unknown section, not data, run.*; did you mean run\?"),
        ("run=1", "set: expected section.key=value"),
        ("run.steps", "set: expected section.key=value"),
        ("run.steps.more=1", "set: run.steps.more: steps is not a section"),
        ("optimizer.moment_dtype=float16", "optimizer.moment_dtype: 'float16'"),
        ("run.steps=ten", "run.steps: expected int, got 'ten'"),
        ("run.steps=true", "run.steps: expected int"),
        ("run.steps=0", "run.steps: must be at least 1"),
        ("run.dtype=int8", "run.dtype: 'int8' is not one of bfloat16, float32"),
        ("optimizer.lr=-1", "optimizer.lr: must be at least 0"),
        ("optimizer.lr=nan", "optimizer.lr: must be finite, not nan"),
        ("optimizer.lr=inf", "optimizer.lr: must be finite, not inf"),
        ("optimizer.eps=0", "optimizer.eps: must be at least"),
        ("optimizer.least_lr_share=2", "optimizer.least_lr_share: must be at most 1, not 2.0"),
        ("run.seed=-1", "run.seed: must be at least 0"),
        ("run.passes_per_step=3", "run.passes_per_step: 3 does not divide tokens_per_step 8192"),
        ("optimizer.beta2=1", r"optimizer.beta2: 1.0 is outside \[0, 1\)"),
        ("data.train=[]", "data.train: is empty"),
        ("data.train=[1]", "data.train: expected a list of strings"),
        ("data.validation=", "data.validation: has an empty path; .. is an empty list"),
        ("data.validation_share=1", "data.validation_share: 1.0 is outside"),
    ],
)
def test_errors_name_the_key(file, change, message):
    with pytest.raises(ConfigError, match=message):
        read_train_config(file, [change])


def test_unreadable_files_are_refused(tmp_path, file):
    with pytest.raises(ConfigError, match="No such file"):
        read_train_config(tmp_path / "none.toml")
    for content in (b"steps = ", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="not a TOML file"):
            read_train_config(file)
    file.write_text("[run]\nsteps = 1\n")
    with pytest.raises(ConfigError, match="data.train: missing"):
        read_train_config(file)


def test_bfloat16_moments_that_would_not_decay_are_refused(file):
    narrow = "optimizer.moment_dtype=bfloat16"
    assert read_train_config(file, [narrow]).optimizer.moment_dtype == "bfloat16"
    for change, message in [
        ("optimizer.row_wise=true", "optimizer.moment_dtype: bfloat16 is for two moments"),
        ("optimizer.beta2=0.999", "optimizer.beta2: must be at most 0.99 with bfloat16 moments"),
        ("optimizer.beta1=0.995", "optimizer.beta1: must be at most 0.99 with bfloat16 moments"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_train_config(file, [narrow, change])
