"""What runs have found: a line of a CSV file each, which a benchmark goes on from."""

import csv
import fcntl
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One model, trained from one seed.

    Attributes:
        name: the contestant's.
        kind: of the feed-forward that differs.
        rows: of its table.
        seed: of its weights, and of the order of documents.
        parameters: but for tables.
        flops: of a token's forward.
        scoring_flops: of these, for scores of subkeys and of candidates.
        tokens: that it was trained on.
        recall: the share of questions that it answers right.
        loss: nats a token of facts that are told anew.
        perplexity: of the same.
        seconds: that training took.
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
    """Those that are there; none where there is no file."""
    if not file.exists():
        return []
    kinds = {field.name: field.type for field in fields(Result)}
    with open(file, newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        return [Result(**{name: kinds[name](row[name]) for name in kinds}) for row in rows]  # type: ignore[operator]


def append_result(file: Path, result: Result) -> None:
    """Add a line; several processes may do so."""
    names = [field.name for field in fields(Result)]
    with open(file, "a", newline="", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0, os.SEEK_END)
        writer = csv.DictWriter(lines, names, lineterminator="\n")
        if not lines.tell():
            writer.writeheader()
        writer.writerow(asdict(result))
