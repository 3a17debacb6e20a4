"""Figures of ``memplus bench gpu``: printed and saved one by one, so that a check can resume."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import Card

_TIMES = ("us", "ms", "s")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: unique in its part.
        bound: the shortest time or the highest rate that the card allows; of a check, the largest
            error or the smallest agreement that passes.
        is_wrong: whether this is a check that failed.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    is_wrong: bool = False

    @property
    def share(self) -> float | None:
        """The share of the bound that was reached; None for a check, or without a bound."""
        if self.bound and self.value and self.unit in _TIMES:
            return self.bound / self.value
        return self.value / self.bound if self.bound and self.unit.endswith("/s") else None

    def __str__(self) -> str:
        text = f"{self.name:<52} {self.value:>12.6g} {self.unit:<12}"
        if self.bound is not None:
            text += f" bound {self.bound:<10.4g}"
        if self.share is not None:
            text += f" {self.share:>6.0%}"
        return text + ("  WRONG" if self.is_wrong else "")


class FigureFile:
    """The figures of one part in a file of one JSON object per line.

    A line has the figure, its part and share, and the card. Lines of other cards do not count. The
    last line of a name counts.
    """

    def __init__(self, folder: Path, part: str, card: Card) -> None:
        """Read the file if it exists; an incomplete line is skipped."""
        self._file, self._part, self._card = folder / f"{part}.jsonl", part, card
        self._values: dict[str, float] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else ():
            try:
                saved = json.loads(line)
            except json.JSONDecodeError:
                continue
            if saved["card"] == card.name:
                self._note(saved)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those names that have no figure, or a wrong one."""
        return [name for name in names if name not in self._values]

    def value(self, name: str) -> float | None:
        """The figure of this name; None if it is missing."""
        return self._values.get(name)

    def add(self, figure: Figure) -> None:
        """Print and save a figure."""
        print(f"{self._part:<12} {figure}", flush=True)
        self._append(asdict(figure) | {"share": figure.share})

    def add_failure(self, name: str, error: str) -> None:
        """Print and save the reason why figures are missing."""
        print(f"{self._part:<12} {name:<52} FAILED: {error}", flush=True)
        self._append({"name": name, "error": error})

    def add_skip(self, name: str, reason: str) -> None:
        """Print and save why figures cannot be measured on this machine."""
        print(f"{self._part:<12} {name:<52} skipped: {reason}", flush=True)
        self._append({"name": name, "skipped": reason})

    def _append(self, line: dict[str, Any]) -> None:
        self._note(line)
        whole = {"part": self._part} | line | {"card": self._card.name} | self._card.versions
        is_cut = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with open(self._file, "a") as file:
            file.write("\n" * is_cut + json.dumps(whole) + "\n")

    def _note(self, line: dict[str, Any]) -> None:
        if "value" not in line:
            return
        self._values.pop(line["name"], None)
        if not line["is_wrong"]:
            self._values[line["name"]] = line["value"]
