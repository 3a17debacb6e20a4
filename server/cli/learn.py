"""``memplus learn``: teaches a model facts and writes them as a row patch."""

import argparse
import signal
from pathlib import Path

from server.cli.options import add_options, from_options
from server.cli.output_options import add_output_folder
from server.config import ThreadOptions, cache_folder
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.models.named_models import DEFAULT_MODEL


def learn(options: argparse.Namespace) -> int:
    """Teach a model facts, and write what it learned as a row patch."""
    from tqdm import tqdm

    from server.cli.stop_signals import stop_signals
    from weights.learning.exams import describe
    from weights.learning.learn import PatchLearner
    from weights.learning.learner import LearningReport
    from weights.learning.learning_texts import LearningTexts
    from weights.models.prepare import prepared_folder

    folder: Path = options.out
    learning = from_options(LearningConfig, options)
    run = PatchLearner(
        prepared_folder(options.model, cache_folder()),
        folder,
        from_options(LearningTexts, options),
        learning,
        from_options(RowConfig, options),
        resume=options.resume,
    )
    print(f"{sum(map(len, run.chosen.values())):,} rows may change", flush=True)
    if run.replay_source == "none":
        print("nothing is replayed, so the model may forget much of what it knows")
    else:
        print(f"{sum(map(len, run.background)):,} {run.replay_source} tokens to replay")
    bar = tqdm(total=learning.steps, initial=run.learner.step, unit="step")
    with stop_signals(once=True) as stopped_by, bar:

        def show(report: LearningReport) -> bool:
            bar.update()
            phase = "cool-down" if report.is_cooling else "learn"
            bar.set_postfix_str(
                f"{phase}, loss {report.loss:.3f}, exact {report.exact:.0%},"
                f" replay {report.replay_loss:.4f}"
            )
            return not stopped_by

        patch = run.run(show)
    if patch is None:
        name, step = signal.Signals(stopped_by[0]).name, run.learner.step
        print(f"{folder}: stopped by {name} after step {step}; continue with --resume")
        return 128 + stopped_by[0]
    print(describe(dict(patch.description.scores)))
    print(f"{folder}: {patch.num_rows:,} rows, {patch.num_bytes:,} bytes, {patch.content_hash}")
    return 0


def add_learn(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``learn``."""
    usage = "%(prog)s [OPTION ...] FACTS --out PATCH"
    verb = verbs.add_parser("learn", help=learn.__doc__, description=learn.__doc__, usage=usage)
    verb.set_defaults(run=learn, computes=True)
    lines = '.jsonl file with lines {"prompt": ..., "answer": ...} or {"text": ...}, or .txt file'
    verb.add_argument("facts", type=Path, metavar="FACTS", help=lines)
    add_output_folder(verb, "--out", "folder to create", required=True, metavar="PATCH")
    model = "model name, checkpoint folder or ORG/NAME of the Hub (default: %(default)s)"
    verb.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME|DIR", help=model)
    verb.add_argument("--resume", action="store_true", help="continue an interrupted run")
    group = verb.add_argument_group("texts", "example: --background corpus --known known.jsonl")
    background = "text files and folders to compare row reads with, and to replay (default: the"
    background += " model's own record of row reads, and text that the model writes)"
    group.add_argument("--background", nargs="+", default=(), metavar="TEXTS", help=background)
    lines = 'a JSONL file with lines {"prompt": ..., "answer": ..., "until": ...}, where the answer'
    lines += ' ends before the text "until", which may be left out'
    questions = f"score answers about the facts in other phrasings: {lines}"
    group.add_argument("--questions", type=Path, metavar="FILE", help=questions)
    known = "score answers about facts that the model knew before: a file like that of --questions"
    group.add_argument("--known", type=Path, metavar="FILE", help=known)
    neutral = "text files and folders to score: other text, which the patch should not change"
    group.add_argument("--neutral", nargs="+", default=(), metavar="TEXTS", help=neutral)
    for settings in (LearningConfig, RowConfig, ThreadOptions):
        add_options(verb, settings)
