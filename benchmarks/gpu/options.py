"""Options of ``memplus bench gpu``; needs no torch."""

from dataclasses import dataclass, field

from engine.errors import ConfigError
from weights.models.named_models import DEFAULT_MODEL

# in order of worth
PARTS = ("correctness", "kernels", "decode", "tables", "http", "transformers", "lookups", "disk")
CORE = "core"
CORE_PARTS = ("correctness", "decode", "tables")


@dataclass(frozen=True)
class GpuCheck:
    """Settings of the check; every field becomes an option.

    Raises:
        ConfigError: a value is out of range.
    """

    part: tuple[str, ...] = field(
        default=PARTS,
        metadata={
            "help": "parts to run, in this order; core: the most important figures of"
            f" {', '.join(CORE_PARTS)}, planned to take less than 5 minutes on an H100",
            "choices": (CORE, *PARTS),
        },
    )
    again: bool = field(
        default=False, metadata={"help": "measure figures that the folder has already"}
    )
    served_model: str = field(
        default=DEFAULT_MODEL,
        metadata={"metavar": "NAME|DIR", "help": "model that part http serves"},
    )
    cache_share: float = field(
        default=0.1,
        metadata={"help": "cached rows of part lookups, as a fraction of the table's bytes"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.cache_share <= 1:
            raise ConfigError(f"cache_share: {self.cache_share} is not in (0, 1]")

    @property
    def runs(self) -> list[tuple[str, bool]]:
        """Name of each part to run, and whether only its core is wanted; each part once."""
        found: dict[str, bool] = {}
        for name in self.part:
            for part in CORE_PARTS if name == CORE else (name,):
                is_core = name == CORE
                found[part] = is_core and found.get(part, True)
        return list(found.items())
