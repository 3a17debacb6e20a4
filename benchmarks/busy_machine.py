"""``memplus bench busy``: tokens per second next to busy processes, by wait policy."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from benchmarks.busy_loops import busy_loops
from benchmarks.started_server import last_words
from engine.errors import ConfigError
from engine.process import EngineStartError
from server.config import cache_folder
from weights.models.named_models import WORDNET, find_model

NEIGHBOURS = (0, 1, 2)
# variables of the environment by policy of waiting threads
POLICIES = {"default": (), "passive": ("OMP_WAIT_POLICY=passive",)}
_UNSET = ("-u", "GOMP_SPINCOUNT", "-u", "OMP_WAIT_POLICY")
_STEPS = 12

Work = Callable[[tuple[str, ...], Path], dict[str, float]]


@dataclass(frozen=True)
class Result:
    """One line of the table, one object of the JSON file: the median round."""

    work: str
    neighbours: int
    policy: str
    tokens_per_s: float


def measure(model: str, rounds: int, json_file: Path | None) -> None:
    """Run ``bench offline`` and a training run alone and beside one and two busy loops.

    Each round runs every waiting policy once, one after another, in processes of their own.

    Raises:
        CheckpointError: the model does not exist.
        ConfigError: ``rounds`` is less than 1.
        EngineStartError: a measured process failed.
    """
    if rounds < 1:
        raise ConfigError(f"rounds: must be at least 1, not {rounds}")
    find_model(model, cache_folder())

    def offline(environment: tuple[str, ...], folder: Path) -> dict[str, float]:
        return _offline(model, environment, folder)

    print("work       neighbours  policy     tokens/s  (medians)")
    results: list[Result] = []
    for neighbours in NEIGHBOURS:
        for work in (offline, _training):
            for result in _compared(work, neighbours, rounds):
                results.append(result)
                tqdm.write(
                    f"{result.work:<10} {result.neighbours:>10}  {result.policy:<8}"
                    f" {result.tokens_per_s:>10.1f}"
                )
        if json_file is not None:
            json_file.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")


def _compared(work: Work, neighbours: int, rounds: int) -> list[Result]:
    """Median tokens a second of each part of the work, by policy."""
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name, busy_loops(neighbours):
        for _ in range(rounds):
            for policy, environment in POLICIES.items():
                for part, tokens_per_s in work(environment, Path(name)).items():
                    found.setdefault((part, policy), []).append(tokens_per_s)
    return [
        Result(part, neighbours, policy, median(speeds))
        for (part, policy), speeds in sorted(found.items())
    ]


def _offline(model: str, environment: tuple[str, ...], folder: Path) -> dict[str, float]:
    file = folder / "offline.json"
    load = ["--prompt-lengths", "128", "--batches", "1", "8", "--rounds", "5"]
    _memplus(
        environment,
        "bench",
        "offline",
        "--model",
        model,
        "--device",
        "cpu",
        *load,
        "--json",
        str(file),
    )
    results = json.loads(file.read_text())
    return {f"{one['phase']} {one['batch']}": one["tokens_per_s"] for one in results}


def _training(environment: tuple[str, ...], folder: Path) -> dict[str, float]:
    """The default model's own training, with its tokenizer, on other texts."""
    model, texts = find_model(WORDNET, cache_folder()).folder, folder / "texts.jsonl"
    lines = (f"{a} and {b} make {a * b + b}" for a in range(64) for b in range(64))
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    changes = (f"run.steps={_STEPS}", f"data.train={texts}", f"data.tokenizer={model}")
    settings = [f"--set={change}" for change in changes]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Path(name) / "run"
        _memplus(environment, "train", str(model / "train.toml"), *settings, "--out", str(run))
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # the first steps have memory and threads made
    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "step"]
    return {"training": median(speeds[2:])}


def _memplus(environment: tuple[str, ...], *arguments: str) -> None:
    command = ["env", *_UNSET, *environment, sys.executable, "-m", "server.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = last_words(done.stderr.splitlines(keepends=True))
        raise EngineStartError(f"memplus {arguments[0]} failed: {reason}")
