"""The verbs of ``memplus bench``: options and one function each, with deferred imports."""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.answer_load import AnswerLoad
from benchmarks.cpu_costs.verb import add_cpu_costs_benchmark
from benchmarks.gpu.options import GpuCheck
from benchmarks.kernel_shapes import Shapes
from benchmarks.learning.verb import add_learning_benchmark
from benchmarks.memory.load import default_trace
from benchmarks.offline_load import OfflineLoad
from benchmarks.overload_options import OverloadOptions
from benchmarks.patches.options import PatchLoad
from benchmarks.retrofit.verb import add_retrofit_benchmark
from benchmarks.row_verbs import add_row_benchmarks
from benchmarks.serving_load import ServingLoad
from benchmarks.train_runs.verb import add_train_run_benchmark
from engine.config import EngineConfig
from server.cli.options import add_options, from_options
from server.cli.output_options import add_output_file, add_results_folder
from server.config import ThreadOptions
from server.model_options import ModelOptions
from weights.models.named_models import DEFAULT_MODEL, SMOLLM2

# the settings of benchmarks that run the model in plain torch
_MODEL_AND_DEVICE = ("model", "device")


def startup(options: argparse.Namespace) -> None:
    """Measure the seconds from the start of the server to its first response."""
    from benchmarks.startup import measure

    measure(from_options(ModelOptions, options), options.runs)


def step(options: argparse.Namespace) -> None:
    """Measure the time of an engine step outside the model."""
    from benchmarks.step_overhead import measure

    measure((1, 8, 32, 64), options.steps, options.context)


def http(options: argparse.Namespace) -> None:
    """Measure the CPU time of the HTTP process per streamed token, without an engine."""
    from benchmarks.http_cost import measure

    measure(options.model, options.streams, options.steps)


def kernels(options: argparse.Namespace) -> None:
    """Compare memory operations on the CPU with torch and with the memory bandwidth."""
    from benchmarks.kernels import measure

    measure(from_options(Shapes, options), options.json)


def gpu(options: argparse.Namespace) -> int:
    """Check a GPU: correctness, kernels, decode, tables, HTTP; resumable, in parts."""
    from benchmarks.gpu.run import measure

    check, shapes = from_options(GpuCheck, options), from_options(Shapes, options)
    return measure(check, shapes, options.trace, options.out)


def serving(options: argparse.Namespace) -> None:
    """Load a running OpenAI-compatible server; measure throughput and latency."""
    from benchmarks.serving import measure

    measure(from_options(ServingLoad, options), options.json, options.plot)


def overload(options: argparse.Namespace) -> int:
    """Serve a model, send ten times what it can serve; fail if it loses requests or slows down."""
    from benchmarks.overload import measure

    model = from_options(ModelOptions, options)
    return measure(model, from_options(OverloadOptions, options), options.json)


def offline(options: argparse.Namespace) -> None:
    """Measure the engine without HTTP; compare it with the machine's limits."""
    from benchmarks.offline import measure

    measure(
        from_options(OfflineLoad, options),
        from_options(ModelOptions, options),
        from_options(EngineConfig, options),
        options.json,
        options.text,
    )


def speculation(options: argparse.Namespace) -> None:
    """Measure decoding with and without ngram speculation, on answers that copy and others."""
    from benchmarks.speculation import measure

    model = from_options(ModelOptions, options)
    measure(model, _answer_load(options))


def grammars(options: argparse.Namespace) -> None:
    """Measure decode steps with and without the masks of a JSON schema and of a regex."""
    from benchmarks.grammars import measure

    model = from_options(ModelOptions, options)
    measure(model, _answer_load(options))


def patches(options: argparse.Namespace) -> None:
    """Measure decode steps of requests with row patches, and loads of patches while serving."""
    from benchmarks.patches.run import measure

    model = from_options(ModelOptions, options)
    measure(model, _answer_load(options), from_options(PatchLoad, options))


def train(options: argparse.Namespace) -> None:
    """Measure an optimiser step of a value table; compare it with torch."""
    from benchmarks.training import measure

    measure(options.rounds, options.json, options.device)


def busy(options: argparse.Namespace) -> None:
    """Measure serving and training on a CPU beside busy processes, by how idle threads wait."""
    from benchmarks.busy_machine import measure

    measure(options.model, options.rounds, options.json)


def facts(options: argparse.Namespace) -> None:
    """Measure fact recall against memory size, at equal compute, on the CPU."""
    from benchmarks.facts.run import measure

    measure(options.out, options.reduced, options.seeds, options.only)


def text(options: argparse.Namespace) -> None:
    """Measure perplexity of text against memory size, at equal compute, on the CPU."""
    from benchmarks.text.run import measure

    measure(options.out, options.dict, options.reduced, options.seeds, options.only)


def add_benchmarks(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``bench`` and its benchmarks."""
    benchmarks = verbs.add_parser("bench", help="Run a benchmark.").add_subparsers(
        title="benchmarks", required=True, metavar="BENCHMARK"
    )
    verb = benchmarks.add_parser("startup", help=startup.__doc__)
    verb.set_defaults(run=startup)
    add_options(verb, ModelOptions, _MODEL_AND_DEVICE)
    verb.add_argument("--runs", type=int, default=3, help="cold and warm starts each (default: 3)")

    verb = benchmarks.add_parser("step", help=step.__doc__)
    verb.set_defaults(run=step, computes=True)
    add_options(verb, ThreadOptions)
    verb.add_argument("--steps", type=int, default=200, help="steps to measure (default: 200)")
    context = "tokens in the longest sequence's context; the others have 128 (default: 128)"
    verb.add_argument("--context", type=int, default=128, metavar="TOKENS", help=context)

    verb = benchmarks.add_parser("http", help=http.__doc__)
    verb.set_defaults(run=http)
    verb.add_argument("--model", default=DEFAULT_MODEL, help="its tokenizer is used")
    verb.add_argument("--streams", type=int, default=64, help="open streams (default: 64)")
    verb.add_argument("--steps", type=int, default=200, help="tokens per stream (default: 200)")

    verb = benchmarks.add_parser("kernels", help=kernels.__doc__)
    verb.set_defaults(run=kernels, computes=True)
    add_options(verb, ThreadOptions)
    add_options(verb, Shapes)
    add_output_file(verb, "--json", "write the results to this file")

    verb = benchmarks.add_parser("gpu", help=gpu.__doc__)
    verb.set_defaults(run=gpu)
    add_options(verb, GpuCheck)
    add_options(verb, Shapes)
    add_results_folder(verb, default=Path("gpu-check"))
    verb.add_argument("--trace", type=Path, default=default_trace(), help="from bench trace")

    _add_server_benchmarks(benchmarks)

    _add_offline(benchmarks)
    add_cpu_costs_benchmark(benchmarks)
    _add_answer_benchmark(benchmarks, "speculation", speculation, [1, 8], 256)
    _add_answer_benchmark(benchmarks, "grammars", grammars, [1, 8, 32], 128)
    verb = _add_answer_benchmark(benchmarks, "patches", patches, [1, 8, 32], 128, DEFAULT_MODEL)
    add_options(verb, PatchLoad)

    verb = benchmarks.add_parser("train", help=train.__doc__)
    verb.set_defaults(run=train, computes=True)
    add_options(verb, ThreadOptions)
    verb.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    sizes = "device that trains; cuda has other sizes, and whole models (default: cpu)"
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=sizes)
    add_output_file(verb, "--json", "write the results to this file")

    _add_training_benchmarks(benchmarks)
    add_row_benchmarks(benchmarks)


def _add_server_benchmarks(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Those that load a server."""
    verb = benchmarks.add_parser("serving", help=serving.__doc__)
    verb.set_defaults(run=serving)
    add_options(verb, ServingLoad)
    add_output_file(verb, "--json", "write the results to this file")
    add_output_file(verb, "--plot", "plot the results to this file", metavar="FILE.png")

    verb = benchmarks.add_parser("overload", help=overload.__doc__)
    verb.set_defaults(run=overload)
    verb.add_argument("--model", default=SMOLLM2, help="a known name or a folder")
    add_options(verb, ModelOptions, ("device",))
    add_options(verb, OverloadOptions)
    add_output_file(verb, "--json", "write the results to this file")


def _answer_load(options: argparse.Namespace) -> AnswerLoad:
    return AnswerLoad(options.batches, options.tokens, options.rounds, options.json)


def _add_offline(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    verb = benchmarks.add_parser("offline", help=offline.__doc__)
    verb.set_defaults(run=offline, computes=True)
    add_options(verb, ThreadOptions)
    for settings in (OfflineLoad, ModelOptions, EngineConfig):
        add_options(verb, settings)
    add_output_file(verb, "--json", "write the results to this file")
    scored = "also print the perplexity of a file or folder, by weights and activations as served"
    verb.add_argument("--text", type=Path, metavar="TEXTS", help=scored)


def _add_answer_benchmark(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    batches: list[int],
    tokens: int,
    model: str = SMOLLM2,
) -> argparse.ArgumentParser:
    """One that compares two ways to generate answers; the numbers are defaults."""
    verb = benchmarks.add_parser(name, help=run.__doc__)
    verb.set_defaults(run=run, computes=True)
    add_options(verb, ThreadOptions)
    verb.add_argument("--model", default=model, help="a known name or a folder")
    add_options(verb, ModelOptions, ("device", "dtype"))
    together = f"requests that decode together (default: {' '.join(map(str, batches))})"
    verb.add_argument("--batches", type=int, nargs="+", default=batches, help=together)
    most = "answer tokens per request, at most (default: %(default)s)"
    verb.add_argument("--tokens", type=int, default=tokens, help=most)
    rounds = "rounds after a warm-up; medians are reported (default: %(default)s)"
    verb.add_argument("--rounds", type=int, default=5, help=rounds)
    add_output_file(verb, "--json", "write the results to this file")
    return verb


def _add_training_benchmarks(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Those that train models."""
    verb = benchmarks.add_parser("busy", help=busy.__doc__)
    verb.set_defaults(run=busy)
    verb.add_argument("--model", default=DEFAULT_MODEL, help="a known name or a folder")
    verb.add_argument("--rounds", type=int, default=3, help="rounds of which the median is taken")
    add_output_file(verb, "--json", "write the results there, too")

    _add_curve(benchmarks, "facts", facts)
    verb = _add_curve(benchmarks, "text", text)
    source = "WordNet's folder (default: %(default)s, from Debian's package wordnet-base)"
    verb.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help=source)
    add_train_run_benchmark(benchmarks)
    add_learning_benchmark(benchmarks)
    add_retrofit_benchmark(benchmarks)


def _add_curve(
    benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """One that trains models with tables of several sizes, from several seeds."""
    verb = benchmarks.add_parser(name, help=run.__doc__)
    verb.set_defaults(run=run, computes=True)
    add_options(verb, ThreadOptions)
    add_results_folder(verb, required=True)
    verb.add_argument("--reduced", action="store_true", help="a small run of minutes")
    verb.add_argument("--seeds", type=int, help="runs per model (default: 3; 1 if reduced)")
    only = "run only this model; repeat the option for several (default: all)"
    verb.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    return verb
