"""The verbs of ``memplus bench`` about the rows that memory layers read."""

import argparse
from pathlib import Path

from benchmarks.memory.load import MemoryLoad, default_trace
from engine.errors import ConfigError
from server.cli.options import add_options, from_options
from server.cli.output_options import add_output_file, add_output_folder, check_output
from server.config import ThreadOptions, cache_folder
from server.model_options import ModelOptions
from weights.models.named_models import SMOLLM2

# the settings of benchmarks that run the model in plain torch
_MODEL_AND_DEVICE = ("model", "device")


def trace(options: argparse.Namespace) -> None:
    """Record the table rows that a model reads on texts."""
    from benchmarks.access_trace import record, summarize
    from server.device import chosen_device
    from weights.models.prepare import prepared_folder

    if options.out is None and not options.record:
        raise ConfigError("out: give --out FILE.npz, --record or both")
    model = from_options(ModelOptions, options)
    device = chosen_device(model)
    folder = prepared_folder(model.model, cache_folder())
    if options.record:
        check_output("record", folder, "folder")
    found = record(
        folder, options.texts, options.tokens, options.traced, device, keep_record=options.record
    )
    if options.out is not None:
        found.save(options.out)
    print(summarize(found))


def lookahead(options: argparse.Namespace) -> None:
    """Measure how well rows can be predicted before memory layers read them."""
    from benchmarks.lookahead import measure
    from server.device import chosen_device
    from weights.models.prepare import prepared_folder

    model = from_options(ModelOptions, options)
    device = chosen_device(model)
    folder = prepared_folder(model.model, cache_folder())
    measure(folder, options.texts, options.tokens, options.widths, options.json, device)


def memory(options: argparse.Namespace) -> None:
    """Measure tokens per second on the CPU by memory size, tier and access pattern."""
    from benchmarks.memory.sweep import measure
    from weights.models.prepare import prepared_folder

    source = prepared_folder(options.model, cache_folder())
    load = from_options(MemoryLoad, options)
    measure(source, load, options.trace, options.out, options.json)


def eviction(options: argparse.Namespace) -> None:
    """Compare eviction policies of a row cache on a recorded trace."""
    from benchmarks.memory.eviction import measure

    measure(options.trace, options.cache_shares, options.sequences, options.json)


def memory_model(options: argparse.Namespace) -> None:
    """Write a variant of a model with three random memory layers, for benchmarks."""
    from benchmarks.random_memory import write_variant
    from weights.models.prepare import prepared_folder

    source = prepared_folder(options.model, cache_folder())
    write_variant(source, options.target, options.num_subkeys)


def add_row_benchmarks(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the benchmarks of the rows that memory layers read."""
    _add_trace(benchmarks.add_parser("trace", help=trace.__doc__))
    _add_lookahead(benchmarks.add_parser("lookahead", help=lookahead.__doc__))
    _add_memory(benchmarks.add_parser("memory", help=memory.__doc__))
    _add_eviction(benchmarks.add_parser("eviction", help=eviction.__doc__))

    verb = benchmarks.add_parser("memory-model", help=memory_model.__doc__)
    verb.set_defaults(run=memory_model)
    add_output_folder(verb, "target", "folder to create", metavar="DST")
    verb.add_argument("--model", default=SMOLLM2, help="model name or folder")
    subkeys = "subkeys per half; their square is the number of rows (default: %(default)s)"
    verb.add_argument("--num-subkeys", type=int, default=1024, help=subkeys)


def _add_texts(verb: argparse.ArgumentParser) -> None:
    """Options of a benchmark that runs a model on texts, in plain torch."""
    add_options(verb, ThreadOptions)
    add_options(verb, ModelOptions, _MODEL_AND_DEVICE)
    verb.add_argument("texts", nargs="+", metavar="TEXTS", help="text files and folders")


def _add_trace(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(run=trace, computes=True)
    _add_texts(verb)
    written = "write the counts of reads, and the rows of the first tokens, to this file"
    add_output_file(verb, "--out", written, metavar="FILE.npz")
    counted = "run the model on the first N tokens of the texts, and count how often each row is"
    counted += " read; the texts must have as many (default: %(default)s)"
    verb.add_argument("--tokens", type=int, metavar="N", default=100_000, help=counted)
    traced = "write the rows that each of the first N tokens reads, which `memplus bench memory"
    traced += " --trace` replays (default: %(default)s)"
    verb.add_argument("--traced", type=int, metavar="N", default=4096, help=traced)
    kept = "write the counts to row_reads.safetensors in the model's folder, for `memplus learn`"
    verb.add_argument("--record", action="store_true", help=kept)


def _add_lookahead(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(run=lookahead, computes=True)
    _add_texts(verb)
    ran = "run the model on the first N tokens of the texts (default: %(default)s)"
    verb.add_argument("--tokens", type=int, metavar="N", default=2048, help=ran)
    widths = "how many rows to predict per lookup, as multiples of the rows that it reads; each"
    widths += " number is measured (default: 1 1.5 2)"
    verb.add_argument(
        "--widths", type=float, nargs="+", metavar="NUMBER", default=[1, 1.5, 2], help=widths
    )
    add_output_file(verb, "--json", "write the results to this file")


def _add_memory(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(run=memory, computes=True)
    add_options(verb, ThreadOptions)
    add_options(verb, MemoryLoad)
    own = "model to measure, with its own memory layers and tables; one without gets three layers"
    own += " with random rows (default: %(default)s)"
    verb.add_argument("--model", default=SMOLLM2, metavar="NAME|DIR|GGUF|HUB", help=own)
    kept = "folder for the results, their plot and the models that are written; the same command"
    kept += " continues an interrupted run there"
    add_output_folder(verb, "--out", kept, required=True)
    reads = "reads of this model to replay, from `memplus bench trace --out FILE.npz` (default:"
    reads += " for a model without memory layers, those of the benchmark model)"
    verb.add_argument("--trace", type=Path, metavar="FILE.npz", help=reads)
    add_output_file(verb, "--json", "write the medians to this file")


def _add_eviction(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(run=eviction)
    recorded = "reads to replay, from `memplus bench trace --out FILE.npz` (default: those of the"
    recorded += " benchmark model)"
    trace_file = default_trace()
    verb.add_argument("--trace", type=Path, metavar="FILE.npz", default=trace_file, help=recorded)
    shares = "cached rows, as fractions of the table (default: 0.05 0.1 0.2)"
    default = [0.05, 0.1, 0.2]
    verb.add_argument(
        "--cache-shares", type=float, nargs="+", metavar="FRACTION", default=default, help=shares
    )
    together = "sequences that decode together, parts of the trace (default: %(default)s)"
    verb.add_argument("--sequences", type=int, metavar="N", default=1, help=together)
    add_output_file(verb, "--json", "write the results to this file")
