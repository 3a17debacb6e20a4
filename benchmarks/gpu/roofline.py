"""Rooflines of engine steps on a card, with the rows that cross the bus."""

from collections.abc import Mapping, Sequence

from benchmarks.engine_rounds import TimedStep
from benchmarks.gpu.card_limits import CardLimits
from engine.model.config import ModelConfig
from engine.model.grouped_weights import GroupFormat
from engine.model.step_work import ModelWork


class Roofline:
    """The least time of steps: each reads its bytes and does its operations at the card's rates.

    Rows that cross the bus add their time, because the rest of the layer waits for them.
    """

    def __init__(
        self,
        model: ModelConfig,
        limits: CardLimits,
        *,
        itemsize: int = 2,
        row_bytes: int = 0,
        formats: Mapping[str, GroupFormat] | None = None,
    ) -> None:
        """``itemsize``: bytes per weight, key and value; ``row_bytes``: bytes per table row.

        ``formats`` are those of the layers whose weights are in groups, by name.
        """
        self._work = ModelWork(model, itemsize, row_bytes, formats, has_integer_products=False)
        self._limits, self._row_bytes = limits, row_bytes

    def seconds(self, steps: Sequence[TimedStep], bus_rows: float = 0) -> float:
        """The least seconds of all steps together, in which ``bus_rows`` rows cross the bus."""
        machine = self._limits.machine
        works = (self._work.of(step.chunks, step.num_logits) for step in steps)
        least = sum(work.least_seconds(machine) for work in works)
        return least + bus_rows * self._row_bytes / self._limits.bus / 1e9

    def tokens_per_s(self, steps: Sequence[TimedStep], bus_rows: float = 0) -> float:
        """The highest rate of tokens."""
        return num_tokens(steps) / self.seconds(steps, bus_rows)


def num_tokens(steps: Sequence[TimedStep]) -> int:
    """Tokens that the steps ran."""
    return sum(chunk.count for step in steps for chunk in step.chunks)


def measured_rate(steps: Sequence[TimedStep]) -> float:
    """Tokens per second of the steps."""
    return num_tokens(steps) / sum(step.seconds for step in steps)
