"""What ``memplus bench kernels`` looks up: plain data that needs no torch."""

from dataclasses import asdict, dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class Shapes:
    """What is looked up, and how often it is timed; every field becomes an option.

    Raises:
        ConfigError: a number is out of its range.
    """

    num_subkeys: int = field(
        default=1024, metadata={"help": "subkeys per half: the table has their square of rows"}
    )
    width: int = field(default=1024, metadata={"help": "values of a row, an even number"})
    num_heads: int = field(default=4, metadata={"help": "memory heads"})
    top_k: int = field(default=32, metadata={"help": "rows that a head reads"})
    rounds: int = field(default=11, metadata={"help": "turns of which the median is taken"})

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number < 1:
                raise ConfigError(f"{name}: must be at least 1, not {number}")
        if self.top_k > self.num_subkeys:
            raise ConfigError(f"top_k: {self.top_k} is more than the {self.num_subkeys} subkeys")
        if self.width % 2:
            raise ConfigError(f"width: must be even for torch's rows of 4 bits, not {self.width}")

    @property
    def num_rows(self) -> int:
        return self.num_subkeys**2

    def each_row(self, *leading: int) -> tuple[int, ...]:
        """The shape of one number for each row read."""
        return (*leading, self.num_heads, self.top_k)
