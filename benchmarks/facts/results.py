"""Results of ``memplus bench facts``: a CSV file of one line per run, for resuming."""

import csv
import fcntl
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One model, trained from one seed.

    Attributes:
        name: the contestant's name.
        kind: kind of the second feed-forward.
        rows: rows of its table, 0 without one.
        seed: random seed of the weights and of the document order.
        parameters: number of parameters, tables excluded.
        flops: operations per token of a forward pass.
        scoring_flops: the part of ``flops`` that scores subkeys and candidates.
        tokens: tokens of training.
        recall: fraction of the questions answered correctly.
        loss: nats per token on new texts of the same facts.
        perplexity: perplexity of the same texts.
        seconds: duration of the training.
    """

    name: str
    kind: str
    rows: int
    seed: int
    parameters: int
    flops: int
    scoring_flops: int
    tokens: int
    recall: float
    loss: float
    perplexity: float
    seconds: float


def read_results(file: Path) -> list[Result]:
    """Read all results; an empty list if the file does not exist."""
    if not file.exists():
        return []
    kinds = {field.name: field.type for field in fields(Result)}
    with open(file, newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        return [Result(**{name: kinds[name](row[name]) for name in kinds}) for row in rows]  # type: ignore[operator]


def append_result(file: Path, result: Result) -> None:
    """Append a line; safe with several processes."""
    names = [field.name for field in fields(Result)]
    with open(file, "a", newline="", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0, os.SEEK_END)
        writer = csv.DictWriter(lines, names, lineterminator="\n")
        if not lines.tell():
            writer.writeheader()
        writer.writerow(asdict(result))
