"""Fixtures of training runs: a small corpus, and settings that read it."""

import json

import pytest

from tests.small_runs import CONFIG, MEMORY
from weights.training.train_config import read_train_config


@pytest.fixture
def texts(tmp_path):
    words = ["red", "green", "blue", "one", "two", "three"]
    lines = (f"{a} {b} makes {b} {a}" for a in words for b in words)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path, texts):
    def read(*changes, memory=True):
        path = tmp_path / "train.toml"
        text = CONFIG.replace("{texts}", str(texts))
        path.write_text(text.replace("[data]", f"{MEMORY}\n[data]") if memory else text)
        return read_train_config(path, changes)

    return read
