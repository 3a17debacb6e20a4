"""``memplus bench grammars``: decode steps with and without token masks, interleaved."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

from benchmarks.answer_load import AnswerLoad
from benchmarks.decode_steps import run_requests
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import Executor
from engine.request import Request
from engine.sampling.grammar import Grammar
from engine.sampling.params import SamplingParams
from server.allocator import keep_freed_memory
from server.config import cache_folder
from server.device import chosen_device
from server.model_loading import load_served, served_executor
from server.model_options import ModelOptions
from weights.checkpoints.tokenizer import load_tokenizer
from weights.grammars.compiler import GrammarCompiler
from weights.models.prepare import prepared_folder

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "is_admin": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    },
    "required": ["name", "age", "is_admin", "tags"],
    "additionalProperties": False,
}
# answers that are longer than the measured ones
GRAMMARS = {
    "JSON schema": Grammar(
        "json_schema", json.dumps({"type": "array", "items": _PERSON, "minItems": 200})
    ),
    "regex": Grammar("regex", r"(\d{4}-\d{2}-\d{2} (INFO|ERROR) [a-z]{1,12}: [a-z ,]+\n)+"),
    # each count of each line is another state, new to most masks
    "counts": Grammar(
        "regex", r"(\d{4}-\d{2}-\d{2} (INFO|ERROR) [a-z]{1,12}: [a-z ,]{8,60}\n){40}"
    ),
}
_PROMPT = "Example number {} of what was asked for:\n"


@dataclass(frozen=True)
class GrammarResult:
    """One line of the table, one object of the JSON file.

    Attributes:
        step_ms: of a decode step of ``batch`` requests, all with this grammar.
        plain_step_ms: without grammars. Both are medians of the rounds.
        overhead: median of the rounds' ratios, minus 1.
    """

    grammar: str
    batch: int
    plain_step_ms: float
    step_ms: float
    overhead: float


def measure(model: ModelOptions, load: AnswerLoad) -> None:
    """Print a line per grammar and batch; write them as JSON.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: a number is out of range.
    """
    load.check(least_tokens=3)
    batches, tokens, rounds, json_file = load.batches, load.tokens, load.rounds, load.json_file
    keep_freed_memory()
    folder = prepared_folder(model.model, cache_folder(), model.memory_adapter)
    tokenizer = load_tokenizer(folder)
    prompts = [tuple(tokenizer.encode(_PROMPT.format(n))) for n in range(max(batches))]
    most = max(map(len, prompts)) + tokens
    config = EngineConfig(max_num_seqs=max(batches), max_model_len=most)
    loaded = load_served(model, folder, config, chosen_device(model, config), keep_stored=True)
    eos_ids = loaded.config.eos_ids
    grammars = GrammarCompiler(
        partial(load_tokenizer, folder), loaded.model.config.vocab_size, eos_ids
    )
    steps = _Steps(served_executor(loaded, config), config, eos_ids, grammars)
    print(f"{model.model}, {loaded.dtype}, medians of {rounds} rounds")
    print("grammar       batch   plain step         step  overhead")
    results: list[GrammarResult] = []
    for batch in batches:
        for name, grammar in GRAMMARS.items():
            pairs = steps.pairs(prompts[:batch], grammar, tokens, rounds)
            results.append(_result(name, batch, pairs))
            print(_line(results[-1]), flush=True)
            if json_file is not None:
                whole = json.dumps([asdict(result) for result in results], indent=1)
                json_file.write_text(whole + "\n")


@dataclass(frozen=True)
class _Steps:
    """Times decode steps on one executor."""

    executor: Executor
    config: EngineConfig
    eos_ids: frozenset[int]
    grammars: GrammarCompiler

    def pairs(
        self, prompts: Sequence[tuple[int, ...]], grammar: Grammar, tokens: int, rounds: int
    ) -> list[tuple[float, float]]:
        """Seconds of a step without and with the grammar; after a warm-up, in turn."""
        pairs = []
        for number in range(rounds + 1):
            seconds = {}
            for one in (None, grammar) if number % 2 else (grammar, None):
                seconds[one] = self._step_s(prompts, one, tokens)
            pairs.append((seconds[None], seconds[grammar]))
        return pairs[1:]

    def _step_s(
        self, prompts: Sequence[tuple[int, ...]], grammar: Grammar | None, tokens: int
    ) -> float:
        """The median step that runs one token of every request."""
        engine = Engine(self.executor, self.config, self.eos_ids, grammars=self.grammars)
        requests = []
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True)
            requests.append(Request(str(seed), prompt, params, grammar=grammar))
        return run_requests(engine, requests, self.grammars).step_s


def _result(name: str, batch: int, pairs: Sequence[tuple[float, float]]) -> GrammarResult:
    return GrammarResult(
        grammar=name,
        batch=batch,
        plain_step_ms=1e3 * median(plain for plain, _ in pairs),
        step_ms=1e3 * median(masked for _, masked in pairs),
        overhead=median(masked / plain for plain, masked in pairs) - 1,
    )


def _line(result: GrammarResult) -> str:
    return (
        f"{result.grammar:<12} {result.batch:>6} {result.plain_step_ms:>9.2f} ms"
        f" {result.step_ms:>9.2f} ms {result.overhead:>8.1%}"
    )
