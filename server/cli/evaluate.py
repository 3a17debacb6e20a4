"""``memplus eval``: scores a model, or compares what two models know."""

import argparse
import json
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from server.cli.options import add_options, from_options
from server.cli.output_options import add_output_file
from server.config import ThreadOptions
from server.model_options import ModelOptions


def evaluate(options: argparse.Namespace) -> None:
    """Score a model (perplexity, recall of facts), or compare two models."""
    if options.compare and hasattr(options, "model"):
        raise ConfigError("model: --compare names both models; leave --model out")
    if options.compare and hasattr(options, "memory_adapter"):
        raise ConfigError("memory_adapter: --compare takes folders; merge by `memplus convert`")
    model = from_options(ModelOptions, options)
    scores: dict[str, Any]
    if options.compare:
        from server.cli.model_comparison import compare_models

        scores = compare_models(model, options.compare, options.texts, options.questions)
    else:
        from server.cli.model_scores import score_model

        scores = score_model(model, options.texts, options.questions)
    if options.json is not None:
        options.json.write_text(json.dumps(scores, indent=1) + "\n")


def add_evaluate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``eval``."""
    usage = "%(prog)s [OPTION ...] [TEXTS ...]"
    verb = verbs.add_parser("eval", help=evaluate.__doc__, usage=usage)
    verb.set_defaults(run=evaluate, computes=True)
    verb.add_argument("texts", nargs="*", metavar="TEXTS", help="text files and folders to score")
    question = 'ask these questions: a JSONL file with lines {"prompt": ..., "answer": ...,'
    question += ' "until": ...}; an answer is right if the most likely continuation of the prompt'
    question += ' is the same up to the text "until" (without it, up to the end)'
    verb.add_argument("--questions", type=Path, metavar="FILE", help=question)
    compare = "ask two models the --questions, and print those that only one of them answers right"
    verb.add_argument("--compare", nargs=2, metavar=("A", "B"), help=compare)
    add_output_file(verb, "--json", "write the scores to this file")
    for settings in (ModelOptions, ThreadOptions):
        add_options(verb, settings)
