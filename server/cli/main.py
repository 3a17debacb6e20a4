"""The ``memplus`` command: one function a verb, nothing else.

Verbs import what they need inside, so that serving never loads torch into the HTTP process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.process import EngineLostError, EngineStartError
from engine.sampling.params import SamplingParams
from server.cli.options import add_options, from_options
from server.config import (
    HttpOptions,
    ModelOptions,
    SupervisionOptions,
    ThreadOptions,
    cache_folder,
    set_threads,
)
from weights.checkpoints.dtype_names import TABLE_DTYPES
from weights.errors import CheckpointError, DataError, TrainingError
from weights.models.named_models import DEFAULT_MODEL

_FAILURE = 1
_CALLERS_MISTAKE = 2
_MISTAKES = (
    *(CheckpointError, ConfigError, DataError),
    *(EngineStartError, RequestError, TrainingError),
)
# lists of ids, and what would not be shown
_NOT_TYPED = (
    "stop_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprobs",
    "prompt_logprobs",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code.

    It is 2 with one line on stderr for a caller's mistake, and 1 with one line for a server whose
    engine was lost.

    A verb that may end in other ways than well or by an error returns a code of its own.
    """
    options = _parser().parse_args(arguments)
    try:
        line = set_threads(from_options(ThreadOptions, options))
        if options.computes:
            print(line, file=sys.stderr, flush=True)
        code: int | None = options.run(options)
    except _MISTAKES as error:
        print(f"memplus: {error}", file=sys.stderr)
        return _CALLERS_MISTAKE
    except EngineLostError as error:
        print(f"memplus: {error}", file=sys.stderr)
        return _FAILURE
    except KeyboardInterrupt:
        return 130
    return code or 0


def serve(options: argparse.Namespace) -> None:
    """Answer HTTP requests."""
    from server.serve import serve

    serve(
        from_options(ModelOptions, options),
        from_options(EngineConfig, options),
        from_options(HttpOptions, options),
        from_options(SupervisionOptions, options),
    )


def generate(options: argparse.Namespace) -> None:
    """Continue a text."""
    from server.cli.generate import generate

    generate(
        options.text,
        from_options(ModelOptions, options),
        EngineConfig(),
        from_options(SamplingParams, options),
    )


def convert(options: argparse.Namespace) -> None:
    """Convert a model to a checkpoint folder."""
    from weights.checkpoints.convert import convert

    convert(Path(options.source), Path(options.target), options.dtype, options.table_dtype)


def quantize(options: argparse.Namespace) -> None:
    """Convert the value tables of a model, and nothing else of it."""
    from weights.checkpoints.convert import convert
    from weights.models.prepare import prepared_folder

    source = prepared_folder(options.source, cache_folder())
    convert(source, Path(options.target), table_dtype=options.table_dtype)


def inspect(options: argparse.Namespace) -> None:
    """Print shapes, parameter counts, bytes and dtypes of a model."""
    from weights.checkpoints.summary import describe, summarize
    from weights.models.prepare import prepared_folder

    print(describe(summarize(prepared_folder(options.model, cache_folder()))))


def wordnet(options: argparse.Namespace) -> None:
    """Make a corpus of WordNet's nouns, which the default model was trained on."""
    from weights.training.wordnet import write_corpus

    print(f"{options.target}: {write_corpus(options.dict, options.target)} nouns")


def evaluate(options: argparse.Namespace) -> None:
    """Score a model: perplexity of texts, recall of facts."""
    from server.cli.evaluate import evaluate

    model = from_options(ModelOptions, options)
    evaluate(model, options.texts, options.questions, options.json)


def train(options: argparse.Namespace) -> int:
    """Train a model as a TOML file says."""
    from server.cli.train import run
    from weights.training.train_config import read_train_config

    return run(read_train_config(options.config, options.set), options.out, resume=options.resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("memplus", description="Serve language models with memory.")
    parser.set_defaults(computes=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    verb = verbs.add_parser("serve", help=serve.__doc__)
    verb.set_defaults(run=serve, computes=True)
    for settings in (ModelOptions, EngineConfig, ThreadOptions, HttpOptions, SupervisionOptions):
        add_options(verb, settings)

    verb = verbs.add_parser("generate", help=generate.__doc__)
    verb.set_defaults(run=generate, computes=True)
    verb.add_argument("text", help="what to continue")
    for settings in (ModelOptions, ThreadOptions):
        add_options(verb, settings)
    add_options(verb, SamplingParams, leave_out=_NOT_TYPED)

    verb = verbs.add_parser("convert", help=convert.__doc__)
    verb.set_defaults(run=convert)
    verb.add_argument("source", metavar="SRC", help="a .gguf file or a checkpoint folder")
    verb.add_argument("target", metavar="DST", help="the folder to make")
    verb.add_argument("--dtype", help="bfloat16, ... (default: as stored; bfloat16 for GGUF)")
    verb.add_argument("--table-dtype", help="of value tables: int8, int4, ... (default: --dtype)")

    verb = verbs.add_parser("quantize", help=quantize.__doc__)
    verb.set_defaults(run=quantize)
    verb.add_argument("source", metavar="SRC", help="a known name or a checkpoint folder")
    verb.add_argument("target", metavar="DST", help="the folder to make")
    verb.add_argument("--table-dtype", required=True, choices=TABLE_DTYPES, help="of value tables")

    verb = verbs.add_parser("inspect", help=inspect.__doc__)
    verb.set_defaults(run=inspect)
    verb.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a name or a folder")

    _add_train(verbs)

    verb = verbs.add_parser("eval", help=evaluate.__doc__)
    verb.set_defaults(run=evaluate, computes=True)
    verb.add_argument("texts", nargs="*", metavar="TEXTS", help="files and folders to foresee")
    question = 'a JSONL file of {"prompt": ..., "answer": ..., "until": ...}'
    verb.add_argument("--questions", type=Path, metavar="FILE", help=question)
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file")
    for settings in (ModelOptions, ThreadOptions):
        add_options(verb, settings)

    verb = verbs.add_parser("wordnet", help=wordnet.__doc__)
    verb.set_defaults(run=wordnet)
    verb.add_argument("target", type=Path, metavar="DST", help="the folder to write to")
    where = "WordNet's folder (default: %(default)s, of Debian's wordnet-base)"
    verb.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help=where)

    from benchmarks.verbs import add_benchmarks

    add_benchmarks(verbs)
    return parser


def _add_train(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("train", help=train.__doc__)
    verb.set_defaults(run=train, computes=True)
    verb.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to train, and on what")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    verb.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    change = "change a setting; may be given more than once"
    verb.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=change
    )
    add_options(verb, ThreadOptions)


if __name__ == "__main__":
    sys.exit(main())
