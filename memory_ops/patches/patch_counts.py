"""Counts of the row reads that use a row patch."""

from typing import NamedTuple


class PatchCounts(NamedTuple):
    """Row reads of the tokens that use a row patch.

    Attributes:
        reads: rows that their memory layers read from tables that the patch changes.
        hits: those among them that the patch changes.
    """

    reads: int
    hits: int
