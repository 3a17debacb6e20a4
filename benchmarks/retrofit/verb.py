"""The verb ``memplus bench retrofit`` and its options."""

import argparse
from pathlib import Path

from server.cli.options import add_options
from server.cli.output_options import add_results_folder
from server.config import ThreadOptions, cache_folder
from weights.models.named_models import SMOLLM2


def retrofit(options: argparse.Namespace) -> None:
    """Add memory layers to a finished model in several ways; measure recall and perplexity."""
    from benchmarks.retrofit.run import FULL, REDUCED, RetrofitRuns, measure
    from weights.models.prepare import prepared_folder

    runs = RetrofitRuns(
        folder=options.out,
        model=prepared_folder(options.model, cache_folder()),
        wordnet=options.dict,
        scale=REDUCED if options.reduced else FULL,
        seeds=options.seeds,
        only=options.only,
    )
    measure(runs)


def add_retrofit_benchmark(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the verb."""
    verb = benchmarks.add_parser("retrofit", help=retrofit.__doc__)
    verb.set_defaults(run=retrofit, computes=True)
    add_options(verb, ThreadOptions)
    add_results_folder(verb, required=True)
    models = "a known name or a folder, without memory layers (default: %(default)s)"
    verb.add_argument("--model", default=SMOLLM2, metavar="NAME|DIR", help=models)
    source = "WordNet's folder (default: %(default)s)"
    verb.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help=source)
    verb.add_argument("--reduced", action="store_true", help="a small run of minutes")
    runs = "runs per contestant and learning rate (default: %(default)s)"
    verb.add_argument("--seeds", type=int, default=1, help=runs)
    only = "run only this contestant; repeat the option for several (default: all)"
    verb.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
