"""``memplus eval``: perplexity of texts and recall of facts, printed and written as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import ModelOptions, cache_folder
from server.engine_entry import load_served, served_engine
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.prepare import prepared_folder
from weights.training.corpus import corpus_files, documents
from weights.training.evaluate import (
    RecallScore,
    TextScore,
    read_questions,
    score_recall,
    score_texts,
)
from weights.training.training_data import checkpoint_text


def evaluate(
    model: ModelOptions, texts: Sequence[str], questions: Path | None, json_file: Path | None
) -> None:
    """Score a model on texts, on questions, or on both.

    Raises:
        ConfigError: there is nothing to score it on.
        CheckpointError: the model cannot be read.
        DataError: texts or questions cannot be, or a question is too long for the model.
    """
    if not texts and questions is None:
        raise ConfigError("texts: give texts, --questions, or both")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"json: there is no folder {json_file.parent}")
    asked = read_questions(questions) if questions is not None else []
    files = corpus_files(texts) if texts else []
    folder, engine = prepared_folder(model.model, cache_folder()), EngineConfig()
    # loaded once for both: tables are large, and must not lie elsewhere for one than the other
    loaded = load_served(model, folder, engine if asked else None)
    whole: dict[str, dict[str, float]] = {}
    if texts:
        score = score_texts(loaded.model, checkpoint_text(folder), documents(files))
        whole["texts"] = asdict(score)
        print(_text_line(score))
    if asked:
        recall = score_recall(served_engine(loaded, engine), load_tokenizer(folder), asked)
        whole["questions"] = asdict(recall)
        print(_recall_line(recall))
    if json_file is not None:
        json_file.write_text(json.dumps(whole, indent=1) + "\n")


def _text_line(score: TextScore) -> str:
    return (
        f"texts      {score.documents} documents, {score.tokens} tokens: loss {score.loss:.4f},"
        f" perplexity {score.perplexity:.3f}, {score.bits_per_byte:.3f} bits a byte"
    )


def _recall_line(score: RecallScore) -> str:
    return f"questions  {score.right} of {score.questions} right: recall {score.recall:.3f}"
