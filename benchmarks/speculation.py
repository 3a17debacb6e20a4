"""``memplus bench speculation``: decode speed with and without ngram speculation, interleaved."""

import json
import time
from dataclasses import asdict, dataclass, replace
from statistics import median

from benchmarks.answer_load import AnswerLoad
from benchmarks.speculation_tasks import TASKS, Task
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import Executor
from engine.request import Request, StepOutput
from engine.sampling.params import SamplingParams
from server.allocator import keep_freed_memory
from server.config import cache_folder
from server.device import chosen_device
from server.model_loading import load_served, served_executor
from server.model_options import ModelOptions
from weights.checkpoints.tokenizer import load_tokenizer
from weights.models.prepare import prepared_folder


@dataclass(frozen=True)
class SpeculationResult:
    """One line of the table, one object of the JSON file.

    Attributes:
        batch: number of requests that decode together, all with the task's prompt.
        plain_tokens_per_s, tokens_per_s: without and with speculation; medians of the rounds.
        speedup: median of the rounds' ratios.
        draft_tokens, accepted_tokens: of all requests of one round.
        is_same: whether all answers are the same with and without speculation.
    """

    task: str
    batch: int
    tokens: int
    plain_tokens_per_s: float
    tokens_per_s: float
    speedup: float
    draft_tokens: int
    accepted_tokens: int
    is_same: bool


@dataclass(frozen=True)
class _Run:
    """Answers, and the speed from the step that gave the last request its first token."""

    answers: dict[str, list[int]]
    tokens_per_s: float
    last: StepOutput


def measure(model: ModelOptions, load: AnswerLoad) -> None:
    """Print a line per task and batch; write them as JSON.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: a number is out of range.
    """
    load.check(least_tokens=2)
    batches, tokens, rounds, json_file = load.batches, load.tokens, load.rounds, load.json_file
    keep_freed_memory()
    folder = prepared_folder(model.model, cache_folder(), model.memory_adapter)
    encode = load_tokenizer(folder).encode
    prompts = {task: tuple(encode(task.prompt)) for task in TASKS}
    most = max(map(len, prompts.values())) + tokens
    config = EngineConfig(max_num_seqs=max(batches), max_model_len=most)
    loaded = load_served(model, folder, config, chosen_device(model, config), keep_stored=True)
    contest = _Contest(served_executor(loaded, config), config, loaded.config.eos_ids)
    contest.warm_up()
    print(f"{model.model}, {loaded.dtype}, medians of {rounds} rounds")
    print("task              batch  tokens  plain t/s        t/s  speedup  drafts  accepted  same")
    results: list[SpeculationResult] = []
    for batch in batches:
        for task in TASKS:
            results.append(contest.result(task, prompts[task], batch, tokens, rounds))
            print(_line(results[-1]), flush=True)
            if json_file is not None:
                whole = json.dumps([asdict(result) for result in results], indent=1)
                json_file.write_text(whole + "\n")


class _Contest:
    """Runs requests on one executor, with and without speculation."""

    def __init__(self, executor: Executor, config: EngineConfig, eos_ids: frozenset[int]) -> None:
        self._executor, self._eos_ids = executor, eos_ids
        self._plain, self._speculating = config, replace(config, speculate="ngram")

    def warm_up(self) -> None:
        """Let the executor do the extra work of a first step."""
        self._executor.warm_up()

    def result(
        self, task: Task, prompt_ids: tuple[int, ...], batch: int, tokens: int, rounds: int
    ) -> SpeculationResult:
        """Run a warm-up round and the others; each round runs first what the last ran second."""
        pairs: list[tuple[_Run, _Run]] = []
        for number in range(rounds + 1):
            runs: dict[bool, _Run] = {}
            for speculates in (False, True) if number % 2 else (True, False):
                config = self._speculating if speculates else self._plain
                runs[speculates] = self._run(config, task, prompt_ids, batch, tokens)
            pairs.append((runs[False], runs[True]))
        timed, statistics = pairs[1:], pairs[-1][1].last.statistics
        return SpeculationResult(
            task=task.name,
            batch=batch,
            tokens=sum(map(len, pairs[-1][0].answers.values())),
            plain_tokens_per_s=median(plain.tokens_per_s for plain, _ in timed),
            tokens_per_s=median(fast.tokens_per_s for _, fast in timed),
            speedup=median(fast.tokens_per_s / plain.tokens_per_s for plain, fast in timed),
            draft_tokens=statistics.draft_tokens,
            accepted_tokens=statistics.accepted_tokens,
            is_same=all(plain.answers == fast.answers for plain, fast in pairs),
        )

    def _run(
        self, config: EngineConfig, task: Task, prompt_ids: tuple[int, ...], batch: int, tokens: int
    ) -> _Run:
        # a new engine has no cached prefix; the KV memory is the executor's
        engine = Engine(self._executor, config, self._eos_ids)
        answers: dict[str, list[int]] = {str(number): [] for number in range(batch)}
        for number, name in enumerate(answers):
            params = SamplingParams(max_tokens=tokens, temperature=task.temperature, seed=number)
            engine.add(Request(name, prompt_ids, params))
        start, before = time.perf_counter(), 0
        while engine.has_work:
            began = all(answers.values())
            output = engine.step()
            for one in output.outputs:
                if one.finish_reason == "error":
                    raise RuntimeError(one.error)
                answers[one.request_id] += one.token_ids
            if not began:
                start, before = time.perf_counter(), sum(map(len, answers.values()))
        seconds = time.perf_counter() - start
        decoded = sum(map(len, answers.values())) - before
        return _Run(answers, decoded / seconds, output)


def _line(result: SpeculationResult) -> str:
    return (
        f"{result.task:<17} {result.batch:>5} {result.tokens:>7} {result.plain_tokens_per_s:>10.1f}"
        f" {result.tokens_per_s:>10.1f} {result.speedup:>8.2f} {result.draft_tokens:>7}"
        f" {result.accepted_tokens:>9}  {'yes' if result.is_same else 'no'}"
    )
