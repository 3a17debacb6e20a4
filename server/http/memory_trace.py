"""Rows that memory layers read, as JSON."""

from collections.abc import Sequence
from typing import Any

from engine.request import MemoryRead, TableReport

_DIGITS = 6


def memory_trace(tokens: Sequence[Sequence[MemoryRead]]) -> list[list[dict[str, Any]]]:
    """For each token one object per memory layer: its rows, the largest weight first."""
    return [
        [
            {
                "layer": read.layer,
                "rows": read.rows,
                "weights": [round(weight, _DIGITS) for weight in read.weights],
            }
            for read in reads
        ]
        for reads in tokens
    ]


def table_object(report: TableReport) -> dict[str, Any]:
    """A value table and the reads of its rows."""
    usage = report.usage
    return {
        "table": report.name,
        "tier": report.tier,
        "rows": report.num_rows,
        "row_values": report.value_dim,
        "layers": report.layers,
        "usage": None
        if usage is None
        else {
            "counted_reads": usage.num_reads,
            "most_read": [{"row": row, "reads": reads} for row, reads in usage.most_read],
            "histogram": [
                {"min_reads": least, "max_reads": 2 * least - 1, "rows": rows}
                for least, rows in usage.histogram
            ],
        },
    }
