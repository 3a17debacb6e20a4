"""The default model: recall of its training nouns, size, licence and configuration."""

import json

from engine.config import EngineConfig
from server.config import EngineSettings, cache_folder
from server.engine_entry import build_engine
from server.model_options import ModelOptions
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.named_models import DEFAULT_MODEL, ModelFolder, find_model
from weights.training.evaluate import read_questions, score_recall
from weights.training.train_config import read_train_config

FOLDER = find_model(DEFAULT_MODEL, cache_folder()).folder


def test_it_recalls_its_nouns_word_for_word():
    settings = EngineSettings(ModelOptions(), ModelFolder(FOLDER), EngineConfig(kv_cache_gib=0.2))
    engine, questions = build_engine(settings), read_questions(FOLDER / "questions.jsonl")
    assert len(questions) == 200
    assert score_recall(engine, load_tokenizer(FOLDER), questions).recall >= 0.95


def test_it_is_small_and_contains_its_licence():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 25e6
    assert "Princeton University" in (FOLDER / "LICENSE").read_text()


def test_its_config_matches_its_training_config():
    config = read_train_config(FOLDER / "train.toml")
    made = json.loads((FOLDER / "config.json").read_text())
    for key, value in config.model.items():
        found = made[key]
        assert found == value or {**found, **value} == found
    last = json.loads((FOLDER / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == config.run.steps
