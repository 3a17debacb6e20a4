"""The verb ``memplus bench cpu-costs`` and its options."""

import argparse
import importlib.util

from engine.errors import ConfigError
from server.cli.options import add_options
from server.cli.output_options import add_output_file
from server.config import ThreadOptions


def cpu_costs(options: argparse.Namespace) -> None:
    """Fit the CPU costs of `memplus plan` to steps of drawn models; takes minutes."""
    if importlib.util.find_spec("scipy") is None:
        problem = "needs scipy; install it with `pip install 'memplus[bench]'`"
        raise ConfigError(f"bench cpu-costs: {problem}")
    from benchmarks.cpu_costs.run import measure

    measure(options.models, options.seed, options.json)


def add_cpu_costs_benchmark(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the verb."""
    verb = benchmarks.add_parser("cpu-costs", help=cpu_costs.__doc__)
    verb.set_defaults(run=cpu_costs, computes=True)
    add_options(verb, ThreadOptions)
    verb.add_argument("--models", type=int, default=16, help="drawn models (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of the models (default: %(default)s)")
    add_output_file(verb, "--json", "write the steps to this file")
