"""Parts of a training step: which operations belong to each, and their share of profiled steps."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from weights.training.trainer import DATA_RANGE, OPTIMIZER_RANGE

PRODUCTS, ATTENTION, LOOKUPS = "products", "attention", "lookups"
OPTIMIZER, DATA, OTHER = "optimizer", "data", "other"
PARTS = (PRODUCTS, ATTENTION, LOOKUPS, OPTIMIZER, DATA, OTHER)
_BY_NAME = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"), PRODUCTS),
    DATA_RANGE: DATA,
    OPTIMIZER_RANGE: OPTIMIZER,
}
# backward passes have the same beginnings
_BY_START = {
    "memplus::": LOOKUPS,
    "GeneratedBackwardFor_memplus": LOOKUPS,
    "aten::scaled_dot_product": ATTENTION,
    "aten::_scaled_dot_product": ATTENTION,
}


class Event(Protocol):
    """An operation of a profile, as torch.profiler records it; times are in microseconds."""

    @property
    def name(self) -> str: ...
    @property
    def cpu_time_total(self) -> float: ...
    @property
    def cpu_parent(self) -> "Event | None": ...


def part_shares(events: Iterable[Event], seconds: float) -> Mapping[str, float]:
    """Each part's share of steps that took ``seconds`` in all.

    An operation inside another one that has a part belongs to that part. The rest is ``other``:
    norms, activations, rounding to bfloat16, the loss, and Python.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = _part(event.name)
        if part is not None and not _is_inside_a_part(event):
            found[part] += event.cpu_time_total / 1e6 / seconds
    found[OTHER] = max(0.0, 1 - sum(found.values()))
    return found


def _part(name: str) -> str | None:
    starts = (part for start, part in _BY_START.items() if name.startswith(start))
    return _BY_NAME.get(name) or next(starts, None)


def _is_inside_a_part(event: Event) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _part(parent.name) is not None:
            return True
        parent = parent.cpu_parent
    return False
