"""Scores of one model: perplexity of texts and recall of facts, computed and printed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.config import cache_folder
from server.device import chosen_device
from server.engine_entry import served_engine
from server.model_loading import load_served
from server.model_options import ModelOptions
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


def score_model(
    model: ModelOptions, texts: Sequence[str], questions: Path | None
) -> dict[str, Any]:
    """Score a model on texts, on questions, or on both; print the scores and return them.

    Names the model and its folder, too.

    Raises:
        ConfigError: texts and questions are both missing, or texts would be scored with rounded
            weights.
        CheckpointError: the model cannot be read.
        DataError: texts or questions cannot be read, or a question is too long for the model.
    """
    if not texts and questions is None:
        raise ConfigError("texts: none given; give text files, --questions, or both")
    if texts and model.weight_dtype != "auto":
        raise ConfigError(
            "weight_dtype: texts are scored with the weights of the model's folder; make one with"
            " `memplus quantize --weight-dtype`"
        )
    facts = read_questions(questions) if questions is not None else []
    files = corpus_files(texts) if texts else []
    engine = EngineConfig(max_patches=0)
    device = chosen_device(model, engine)
    folder = prepared_folder(model.model, cache_folder(), model.memory_adapter)
    # load once: tables are large, and both scores need them in the same tier
    loaded = load_served(model, folder, engine if facts else None, device)
    scores: dict[str, Any] = {"model": model.model, "folder": str(folder)}
    print(f"model      {model.model}" + (f" ({folder})" if model.model != str(folder) else ""))
    if texts:
        score = score_texts(loaded.model, checkpoint_text(folder), documents(files))
        scores["texts"] = asdict(score)
        print(_text_line(score))
    if facts:
        served = served_engine(loaded, engine)
        served.warm_up()
        recall = score_recall(served, load_tokenizer(folder), facts)
        scores["questions"] = asdict(recall)
        print(_recall_line(recall))
    return scores


def _text_line(score: TextScore) -> str:
    return (
        f"texts      {score.documents} documents, {score.tokens} tokens: loss {score.loss:.4f},"
        f" perplexity {score.perplexity:.3f}, {score.bits_per_byte:.3f} bits per byte"
    )


def _recall_line(score: RecallScore) -> str:
    return f"questions  {score.right} of {score.questions} right: recall {score.recall:.3f}"
