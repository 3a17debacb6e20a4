"""The verb ``memplus bench learn`` and its options."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.options import add_options, from_options
from server.cli.output_options import add_results_folder
from server.config import ThreadOptions, cache_folder
from weights.learning.learning_config import LearningConfig
from weights.models.named_models import DEFAULT_MODEL, WORDNET

if TYPE_CHECKING:
    from benchmarks.learning.task import Tasks

# the settings of learning that are the same for all ways to learn
_LEARNING = ("steps", "warmup_steps", "cooldown_steps", "batch_tokens", "precision")


def learn(options: argparse.Namespace) -> None:
    """Teach a model facts in several ways, and measure what it forgets."""
    from benchmarks.learning.run import LearningRuns, measure

    learning = from_options(LearningConfig, options)
    runs = LearningRuns(
        folder=options.out,
        model=options.model,
        counts=options.facts,
        seeds=options.seeds,
        replay_shares=options.replay_shares,
        only=options.only,
        learning=learning,
    )
    measure(runs, partial(_tasks, options))


def _tasks(options: argparse.Namespace) -> "Tasks":
    from benchmarks.learning.nouns import NounTasks
    from benchmarks.learning.people import PeopleTasks
    from weights.models.prepare import prepared_folder
    from weights.training.corpus import corpus_files

    folder = prepared_folder(options.model, cache_folder())
    if options.model == WORDNET:
        return NounTasks(folder, options.dict)
    background, neutral = corpus_files(options.background), corpus_files(options.neutral)
    return PeopleTasks(folder, background, neutral)


def add_learning_benchmark(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the verb."""
    verb = benchmarks.add_parser("learn", help=learn.__doc__)
    verb.set_defaults(run=learn, computes=True)
    add_options(verb, ThreadOptions)
    add_results_folder(verb, required=True)
    models = f"{WORDNET}, which learns nouns, or a folder, whose model learns made-up people"
    verb.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME|DIR", help=models)
    source = "WordNet's folder, for nouns (default: %(default)s)"
    verb.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help=source)
    trained = "for people: texts and folders like those that the model was trained on"
    verb.add_argument("--background", nargs="+", default=[], metavar="TEXTS", help=trained)
    other = "for people: other texts and folders, whose perplexity should stay"
    verb.add_argument("--neutral", nargs="+", default=[], metavar="TEXTS", help=other)
    counts = "nouns or people; all ways learn the first number (default: 200 40 10)"
    verb.add_argument("--facts", type=int, nargs="+", default=[200, 40, 10], help=counts)
    verb.add_argument("--seeds", type=int, default=3, help="draws of facts (default: 3)")
    replayed = "parts of a step's tokens that are replayed text (default: 0.75 0)"
    verb.add_argument("--replay-shares", type=float, nargs="+", default=[0.75, 0.0], help=replayed)
    only = "run only this way to learn; repeat the option for several (default: all)"
    verb.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    add_options(verb, LearningConfig, _LEARNING)
