"""``memplus bench learn``: teaches a model facts in several ways, and tests what it forgot."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from benchmarks.learning.composition import NUM_PATCHES, Composition, compose
from benchmarks.learning.contestants import Contestant, contestants
from benchmarks.learning.plot import plot
from benchmarks.learning.results import RATE_SEED, LearningResult, best_lr, share
from benchmarks.learning.task import LearningTask, Tasks
from benchmarks.result_file import append_result, keep_settings, read_results
from benchmarks.serving_plot import check_plot
from engine.errors import ConfigError
from weights.learning.learner import Learner, LearningReport
from weights.learning.learning_config import LearningConfig, RowConfig
from weights.learning.scores import exact_answers, score_drift

# what ``memplus learn`` does by default
OURS = "rows"
# further rates are tried while the best one is the smallest or the largest; this many at most
_MOST_RATES = 7


@dataclass(frozen=True)
class LearningRuns:
    """The runs of one benchmark.

    Attributes:
        folder: where ``results.csv`` and the plot are.
        model: name or folder of the model.
        counts: sizes of draws. All contestants learn draws of the first size; only ``OURS`` learns
            those of the others.
        seeds: draws that are reported. Learning rates are chosen on another one.
        replay_shares: parts of a step's tokens that are replayed text, one after the other.
        only: names of the contestants that run; all if empty.
        learning: other settings of the learning loop.
    """

    folder: Path
    model: str
    counts: Sequence[int]
    seeds: int
    replay_shares: Sequence[float]
    only: Sequence[str]
    learning: LearningConfig

    @property
    def file(self) -> Path:
        """Results so far."""
        return self.folder / "results.csv"


def measure(runs: LearningRuns, prepare: Callable[[], Tasks]) -> None:
    """Teach and test the contestants; skips runs that the folder's ``results.csv`` has.

    ``prepare`` loads the model and its texts.

    Raises:
        ConfigError: a number is out of range, ``only`` names an unknown contestant, the folder has
            results of other settings, or matplotlib is missing.
    """
    named = {one.name: one for one in contestants()}
    _check_numbers(runs)
    if unknown := set(runs.only) - set(named):
        raise ConfigError(f"only: {min(unknown)!r} is unknown; must be one of {', '.join(named)}")
    runs.folder.mkdir(parents=True, exist_ok=True)
    check_plot(runs.folder / "learned.png")
    tasks = prepare()
    if max(runs.counts) > tasks.num_facts:
        raise ConfigError(f"facts: must be at most {tasks.num_facts}, not {max(runs.counts)}")
    _check_settings(runs, tasks)
    suite = _Suite(runs, tasks)
    chosen = [one for name, one in named.items() if not runs.only or name in runs.only]
    for replay in runs.replay_shares:
        for contestant in chosen:
            suite.compare(contestant, replay)
            if contestant.name == OURS:
                suite.repeat_smaller(contestant, replay)
                suite.compose(replay)
    plot(read_results(runs.file, LearningResult), runs.folder / "learned.png")


def _check_numbers(runs: LearningRuns) -> None:
    if runs.counts[0] < NUM_PATCHES:
        raise ConfigError(f"facts: the first number must be at least {NUM_PATCHES}")
    if min(runs.counts) < 1:
        raise ConfigError(f"facts: must be at least 1, not {min(runs.counts)}")
    if not 1 <= runs.seeds <= RATE_SEED:
        raise ConfigError(f"seeds: must be 1 to {RATE_SEED}, not {runs.seeds}")
    for share_of_step in runs.replay_shares:
        replace(runs.learning, replay_share=share_of_step)


def _check_settings(runs: LearningRuns, tasks: Tasks) -> None:
    """Write the settings that all results of a folder share; ConfigError if it has others."""
    learning = asdict(runs.learning) | {"divergence_weight": runs.learning.kl_weight}
    for name in ("seed", "replay_share"):
        del learning[name]
    shared = {
        "model": runs.model,
        "fingerprint": tasks.fingerprint,
        "learning": learning,
        "contestants": {one.name: one.settings for one in contestants()},
    }
    keep_settings(runs.folder / "settings.json", shared)


class _Suite:
    def __init__(self, runs: LearningRuns, tasks: Tasks) -> None:
        self._runs = runs
        # rates are tried on the same facts one after another, and a draw runs the model
        self._draw = lru_cache(maxsize=1)(tasks.draw)

    def compare(self, contestant: Contestant, replay: float) -> None:
        """Choose a learning rate on one draw of facts, and report it on other draws."""
        count, rates = self._runs.counts[0], list(contestant.lrs)
        while True:
            tried = [self._run(count, RATE_SEED, contestant, lr, replay) for lr in rates]
            lr = best_lr(tried)
            if len(rates) == _MOST_RATES or rates[0] < lr < rates[-1]:
                break
            rates = [rates[0] / 3, *rates] if lr == rates[0] else [*rates, rates[-1] * 3]
        for seed in range(self._runs.seeds):
            self._run(count, seed, contestant, lr, replay)

    def repeat_smaller(self, contestant: Contestant, replay: float) -> None:
        """Learn the draws of other sizes, at the default rate of ``memplus learn``."""
        for count in self._runs.counts[1:]:
            for seed in range(self._runs.seeds):
                self._run(count, seed, contestant, RowConfig().peak_lr, replay)

    def compose(self, replay: float) -> None:
        """Learn the parts of each draw apart, and use them together."""
        file = self._runs.folder / "composition.csv"
        for seed in range(self._runs.seeds):
            done = read_results(file, Composition)
            if not any((one.replay_share, one.seed) == (replay, seed) for one in done):
                task = self._draw(self._runs.counts[0], seed)
                result = compose(
                    task, replace(self._runs.learning, replay_share=replay), RowConfig()
                )
                append_result(file, result)
                tqdm.write(_composition_line(result))

    def _run(
        self, count: int, seed: int, contestant: Contestant, lr: float, replay: float
    ) -> LearningResult:
        """A run's result, from an earlier call if there was one."""
        task = self._draw(count, seed)
        for one in read_results(self._runs.file, LearningResult):
            found = one.task, one.contestant, one.lr, one.replay_share, one.seed
            if found == (task.name, contestant.name, lr, replay, seed):
                return one
        learning = replace(self._runs.learning, replay_share=replay)
        result = learn(task, contestant, lr, learning)
        append_result(self._runs.file, result)
        tqdm.write(_line(result))
        return result


def learn(
    task: LearningTask, contestant: Contestant, lr: float, learning: LearningConfig
) -> LearningResult:
    """Teach one contestant a task's facts, in the order of the task's seed, and score it."""
    student, num_learned = contestant.make(task, lr)
    config = replace(learning, seed=task.seed)
    learner = Learner(student, task.base, task.facts, task.background, config)
    started = time.perf_counter()
    with tqdm(total=config.steps, desc=f"{contestant.name} {lr:g}", leave=False) as bar:

        def show(report: LearningReport) -> bool:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}", exact=f"{report.exact:.2f}")
            return True

        learner.run(show)
    seconds = time.perf_counter() - started
    drift = score_drift(task.base, student.model, task.neutral)
    return LearningResult(
        task=task.name,
        contestant=contestant.name,
        lr=lr,
        replay_share=config.replay_share,
        seed=task.seed,
        num_learned=num_learned,
        recall=share(exact_answers(student.model, task.facts)),
        rephrased=share(exact_answers(student.model, task.questions)) if task.questions else 0.0,
        lost=1 - share(exact_answers(student.model, task.known)),
        lost_held_out=1 - share(exact_answers(student.model, task.held_out)),
        perplexity_before=drift.perplexity_before,
        perplexity=drift.perplexity,
        divergence=drift.divergence,
        exact_step=-1 if learner.exact_step is None else learner.exact_step,
        steps=learner.step,
        seconds=seconds,
    )


def _line(one: LearningResult) -> str:
    return (
        f"{one.task:<10} {one.contestant:<14} lr {one.lr:<8.2g} replay {one.replay_share:<5g}"
        f" seed {one.seed}  learned {one.recall:6.1%}"
        f" rephrased {one.rephrased:6.1%}  lost {one.lost:6.1%} held out {one.lost_held_out:6.1%}"
        f"  perplexity {one.perplexity_before:.2f} to {one.perplexity:.2f}"
        f"  {one.steps} steps, {one.seconds:.0f} s"
    )


def _composition_line(one: Composition) -> str:
    return (
        f"{one.task:<10} {NUM_PATCHES} patches  replay {one.replay_share:<5g} seed {one.seed}"
        f"  learned {one.alone:6.1%} alone, {one.together:6.1%} together"
        f"  lost {one.lost_alone:6.1%} alone, {one.lost_together:6.1%} together"
    )
