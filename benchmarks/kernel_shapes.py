"""Shape options of lookups in ``memplus bench kernels`` and ``bench gpu``; needs no torch."""

from dataclasses import asdict, dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class Shapes:
    """Shapes of lookups, and rounds; every field becomes an option.

    Raises:
        ConfigError: a number is out of range.
    """

    num_subkeys: int = field(
        default=1024, metadata={"help": "subkeys per half; their square is the number of rows"}
    )
    width: int = field(default=1024, metadata={"help": "values per row, an even number"})
    num_heads: int = field(default=4, metadata={"help": "memory heads"})
    top_k: int = field(default=32, metadata={"help": "rows that a head reads per token"})
    rounds: int = field(default=11, metadata={"help": "timed rounds; the median is reported"})

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number < 1:
                raise ConfigError(f"{name}: must be at least 1, not {number}")
        if self.top_k > self.num_subkeys:
            raise ConfigError(f"top_k: {self.top_k} is more than the {self.num_subkeys} subkeys")
        if self.width % 2:
            raise ConfigError(f"width: must be even for torch's 4-bit rows, not {self.width}")

    @property
    def num_rows(self) -> int:
        return self.num_subkeys**2

    def per_row_shape(self, *leading: int) -> tuple[int, ...]:
        """The shape of a tensor with one number per row read: [..., H, K]."""
        return (*leading, self.num_heads, self.top_k)
