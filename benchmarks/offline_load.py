"""What ``memplus bench offline`` has the engine run: plain data that needs no torch."""

from dataclasses import asdict, dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class OfflineLoad:
    """What is run, and how often; every field becomes an option.

    Raises:
        ConfigError: a number is out of its range.
    """

    prompt_lengths: tuple[int, ...] = field(
        default=(128, 512, 2048), metadata={"help": "tokens of a prompt, computed alone"}
    )
    batches: tuple[int, ...] = field(
        default=(1, 8, 32, 64), metadata={"help": "sequences that decode together"}
    )
    input_len: int = field(default=128, metadata={"help": "tokens of prompt that they have before"})
    output_len: int = field(default=64, metadata={"help": "decode steps of a round"})
    rounds: int = field(
        default=3, metadata={"help": "rounds of which the median is taken, after one to warm up"}
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if number < 1:
                    raise ConfigError(f"{name}: must be at least 1, not {number}")
