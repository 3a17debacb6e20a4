"""Options of ``memplus bench patches``; needs no torch."""

from dataclasses import dataclass, field, fields

from engine.errors import ConfigError


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
    loaded_rows: int = field(
        default=100_000, metadata={"help": "rows of the patches that a busy server loads"}
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            if (value := getattr(self, one.name)) < 1:
                raise ConfigError(f"{one.name}: must be at least 1, not {value}")
