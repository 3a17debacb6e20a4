"""Load options of ``memplus bench offline``; needs no torch."""

from dataclasses import asdict, dataclass, field

from engine.errors import ConfigError


@dataclass(frozen=True)
class OfflineLoad:
    """Prompts, batches and rounds to run; every field becomes an option.

    Raises:
        ConfigError: a number is out of range.
    """

    prompt_lengths: tuple[int, ...] = field(
        default=(128, 512, 2048),
        metadata={"help": "tokens per prompt; each prompt is computed alone"},
    )
    batches: tuple[int, ...] = field(
        default=(1, 8, 32, 64), metadata={"help": "sequences that decode together"}
    )
    input_len: int = field(default=128, metadata={"help": "prompt tokens of these sequences"})
    output_len: int = field(default=64, metadata={"help": "decode steps per round"})
    rounds: int = field(
        default=3, metadata={"help": "timed rounds after a warm-up; the median is reported"}
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if number < 1:
                    raise ConfigError(f"{name}: must be at least 1, not {number}")
