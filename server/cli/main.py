"""The ``memplus`` command line: one function per verb.

Each verb imports its modules when it runs, so that the HTTP process never loads torch.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.sampling.params import SamplingParams
from server.access import AccessOptions
from server.cli.config_actions import ShowSettings, WriteExample
from server.cli.config_file import apply_config
from server.cli.conversions import add_conversions
from server.cli.environment import apply_environment
from server.cli.evaluate import add_evaluate
from server.cli.exit_status import exit_status
from server.cli.learn import add_learn
from server.cli.options import Parser, add_options, from_options
from server.cli.output_options import add_output_folder, check_outputs
from server.cli.patch import add_patch
from server.cli.plan import add_plan
from server.cli.typed_names import in_typed_names, typed_names
from server.config import (
    HttpOptions,
    SupervisionOptions,
    ThreadOptions,
    cache_folder,
    environment_settings,
    set_threads,
)
from server.limits import LimitOptions
from server.logs import say, set_up_logs
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.patch_options import PatchOptions
from server.version import VERSION
from weights.models.named_models import DEFAULT_MODEL

# in the order of the help
_SERVED = (
    *(ModelOptions, EngineConfig, PatchOptions, ThreadOptions, HttpOptions, LimitOptions),
    *(AccessOptions, MonitoringOptions, SupervisionOptions),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: the verb's own or 0, or that of its error."""
    report: Callable[[str, int], None] = _print
    options = argparse.Namespace()

    def run() -> int:
        nonlocal report
        _parser().parse_args(arguments, options)
        if options.run is serve:
            apply_environment(environment_settings(), options, _SERVED)
            if options.config is not None:
                apply_config(options.config, options, _SERVED)
            set_up_logs(from_options(MonitoringOptions, options).log_format)
            report = say
        else:
            _show("weights.models.named_models")
        check_outputs(options)
        # a plan measures the whole machine, which its ranks would share
        ranks = 1 if options.run is plan else max(1, getattr(options, "tensor_parallel", 1))
        line = set_threads(from_options(ThreadOptions, options), ranks)
        if options.computes:
            report(line, logging.INFO)
            _show("server.device")
        code: int | None = options.run(options)
        return code or 0

    return exit_status(
        run,
        lambda line: report(line, logging.ERROR),
        lambda line: in_typed_names(line, typed_names(options)),
    )


def serve(options: argparse.Namespace) -> None:
    """Serve a model over HTTP, with an OpenAI-compatible API."""
    from server.serve import serve

    if hasattr(options, "uds") and (hasattr(options, "host") or hasattr(options, "port")):
        raise ConfigError("uds: replaces --host and --port; give one or the other")
    serve(
        from_options(ModelOptions, options),
        from_options(EngineConfig, options),
        from_options(PatchOptions, options),
        from_options(HttpOptions, options),
        from_options(LimitOptions, options),
        from_options(SupervisionOptions, options),
        from_options(AccessOptions, options),
        from_options(MonitoringOptions, options),
    )


def generate(options: argparse.Namespace) -> None:
    """Generate the continuation of a text."""
    from server.cli.generate import generate

    generate(
        options.text,
        from_options(ModelOptions, options),
        EngineConfig(max_patches=0),
        from_options(SamplingParams, options),
    )


def inspect(options: argparse.Namespace) -> None:
    """Print shapes, parameter counts, bytes and dtypes of a model."""
    from weights.checkpoints.summary import describe, summarize
    from weights.models.prepare import prepared_folder

    print(describe(summarize(prepared_folder(options.model, cache_folder()))))


def wordnet(options: argparse.Namespace) -> None:
    """Write a corpus of WordNet's nouns, the training data of the default model."""
    from weights.training.wordnet import write_corpus

    print(f"{options.target}: {write_corpus(options.dict, options.target)} nouns")


def plan(options: argparse.Namespace) -> None:
    """Print the memory and the speed that a model has on a machine, by tier of its table."""
    import torch

    from benchmarks.disk_meter import limits_of_tables
    from benchmarks.limit_meter import LimitMeter
    from server.cli.plan import plan

    plan(
        options,
        lambda has_groups: LimitMeter(torch.bfloat16, with_integers=has_groups).measure(),
        limits_of_tables,
    )


def train(options: argparse.Namespace) -> int:
    """Train a model with the settings of a TOML file."""
    from server.cli.train import run
    from weights.training.train_config import read_train_config

    _show("weights.training")
    config = read_train_config(options.config, options.set)
    return run(
        config,
        options.out,
        resume=options.resume,
        only_plan=options.plan,
        tensorboard=options.tensorboard,
    )


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="memplus", description="Serve language models with memory layers."
    )
    parser.add_argument("--version", action="version", version=f"memplus {VERSION}")
    parser.set_defaults(computes=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    usage = "%(prog)s [OPTION ...]"
    _add_serve(verbs, usage)

    verb = verbs.add_parser("generate", help=generate.__doc__, usage=f"{usage} TEXT")
    verb.set_defaults(run=generate, computes=True)
    verb.add_argument("text", metavar="TEXT", help="text to continue")
    for settings in (ModelOptions, ThreadOptions):
        add_options(verb, settings)
    add_options(verb, SamplingParams)

    add_conversions(verbs)

    verb = verbs.add_parser("inspect", help=inspect.__doc__)
    verb.set_defaults(run=inspect)
    verb.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="model name, folder, GGUF file or ORG/NAME"
    )

    _add_train(verbs)

    add_evaluate(verbs)

    verb = verbs.add_parser("wordnet", help=wordnet.__doc__)
    verb.set_defaults(run=wordnet)
    add_output_folder(verb, "target", "folder to write the corpus to", metavar="DST")
    source = "WordNet's folder (default: %(default)s, from Debian's package wordnet-base)"
    verb.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help=source)

    add_learn(verbs)
    add_patch(verbs)
    add_plan(verbs, plan)

    from benchmarks.verbs import add_benchmarks

    add_benchmarks(verbs)
    return parser


def _add_serve(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", usage: str) -> None:
    verb = verbs.add_parser("serve", help=serve.__doc__, description=serve.__doc__, usage=usage)
    verb.set_defaults(run=serve, computes=True)
    config = "TOML file of options; MEMPLUS_ variables and options override it"
    verb.add_argument("--config", type=Path, metavar="FILE", help=config)
    for settings in _SERVED:
        add_options(verb, settings)


def _add_train(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("train", help=train.__doc__)
    verb.set_defaults(run=train, computes=True)
    verb.add_argument("config", type=Path, metavar="CONFIG.toml", help="settings of the run")
    settings = "print every setting with its type, default and meaning, and exit"
    verb.add_argument("--help-config", action=ShowSettings, help=settings)
    example = "write an example of CONFIG.toml to a new file, and exit"
    verb.add_argument("--write-example", action=WriteExample, metavar="FILE", help=example)
    add_output_folder(verb, "--out", "folder of the run (optional with --plan of a new run)")
    verb.add_argument("--resume", action="store_true", help="continue the run in that folder")
    plan = "check everything and print what the run needs, but write nothing"
    verb.add_argument("--plan", action="store_true", help=plan)
    events = (
        "write losses, speed, table usage and learning rates for TensorBoard, to DIR/tensorboard"
    )
    verb.add_argument("--tensorboard", action="store_true", help=events)
    change = "override a setting; repeat the option for several"
    verb.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=change
    )
    add_options(verb, ThreadOptions)


def _print(line: str, level: int) -> None:
    # work goes on if stderr cannot be written
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _show(name: str) -> None:
    """Print the lines of a logger on stderr; the server's processes set up their own logs."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    # anew: a handler keeps the stderr of its first call, which may be closed
    logger.handlers[:] = [logging.StreamHandler()]


if __name__ == "__main__":
    sys.exit(main())
