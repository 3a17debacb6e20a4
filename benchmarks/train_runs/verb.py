"""The verb ``memplus bench train-run`` and its options."""

import argparse
from pathlib import Path

from server.cli.options import add_options
from server.cli.output_options import add_output_file
from server.config import ThreadOptions


def train_run(options: argparse.Namespace) -> None:
    """Measure training runs on the CPU, alone and next to a busy process; profile their steps."""
    from benchmarks.train_runs.run import measure

    measure(options.configs, options.rounds, options.steps, options.json)


def add_train_run_benchmark(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the verb."""
    verb = benchmarks.add_parser("train-run", help=train_run.__doc__)
    verb.set_defaults(run=train_run, computes=True)
    add_options(verb, ThreadOptions)
    files = "configs of `memplus train` (default: dense, memory_plus and retrofit of examples/)"
    verb.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.toml", help=files)
    rounds = "phases alone, and as many next to a busy process, in turn (default: %(default)s)"
    verb.add_argument("--rounds", type=int, default=3, help=rounds)
    steps = "timed steps of a phase; medians are reported (default: %(default)s)"
    verb.add_argument("--steps", type=int, default=5, help=steps)
    add_output_file(verb, "--json", "write the results to this file")
