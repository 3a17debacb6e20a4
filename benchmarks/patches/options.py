"""Options of ``memplus bench patches``; needs no torch."""

from dataclasses import dataclass, field, fields

from engine.errors import ConfigError

_LOADED_ROWS = 100_000


@dataclass(frozen=True)
class PatchLoad:
    """Sizes of the patches; every field becomes an option.

    Raises:
        ConfigError: a field is less than 1.
    """

    own_rows: int = field(
        default=10_000, metadata={"help": "rows of the patches that requests are timed with"}
    )
    many: int = field(default=1_000, metadata={"help": "patches that are loaded together"})
    many_rows: int = field(default=1_000, metadata={"help": "rows of each of these"})
    loaded_rows: int | None = field(
        default=None,
        metadata={
            "help": "rows of the patches that a busy server loads"
            f" (default: {_LOADED_ROWS}, or all rows of a smaller model)"
        },
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and value < 1:
                raise ConfigError(f"{one.name}: must be at least 1, not {value}")

    def check(self, num_tables: int, num_rows: int) -> None:
        """Raise ConfigError if a patch has no row of a table, or more rows than all tables."""
        for name in ("own_rows", "many_rows", "loaded_rows"):
            value = getattr(self, name)
            if value is not None and not num_tables <= value <= num_rows:
                where = f"in {num_tables} tables" if num_tables > 1 else "in its table"
                problem = f"{value} is outside [{num_tables}, {num_rows}]"
                raise ConfigError(f"{name}: {problem}; the model has {num_rows} rows {where}")

    def rows_to_load(self, num_rows: int) -> int:
        """``loaded_rows`` for a model with this many rows in all its tables."""
        return min(_LOADED_ROWS, num_rows) if self.loaded_rows is None else self.loaded_rows
