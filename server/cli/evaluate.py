"""``memplus eval``: scores a model on texts and questions."""

import argparse
from pathlib import Path

from server.cli.options import add_options, from_options
from server.config import ThreadOptions
from server.model_options import ModelOptions


def evaluate(options: argparse.Namespace) -> None:
    """Score a model: perplexity of texts and recall of facts."""
    from server.cli.model_scores import score_model

    model = from_options(ModelOptions, options)
    score_model(model, options.texts, options.questions, options.json)


def add_evaluate(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``eval``."""
    usage = "%(prog)s [OPTION ...] [TEXTS ...]"
    verb = verbs.add_parser("eval", help=evaluate.__doc__, usage=usage)
    verb.set_defaults(run=evaluate, computes=True)
    verb.add_argument("texts", nargs="*", metavar="TEXTS", help="text files and folders to score")
    question = 'JSONL file with lines {"prompt": ..., "answer": ..., "until": ...}'
    verb.add_argument("--questions", type=Path, metavar="FILE", help=question)
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file")
    for settings in (ModelOptions, ThreadOptions):
        add_options(verb, settings)
