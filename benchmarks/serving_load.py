"""What ``memplus bench serving`` sends: plain data, and the prompts that are drawn by it."""

import json
import math
import random
from dataclasses import dataclass, field

from engine.errors import ConfigError
from weights.models.named_models import DEFAULT_MODEL

DEFAULT_CONCURRENCY = (1, 8, 32)
ROUNDS_OF_CONCURRENCY = 8
SECONDS_OF_RATE = 30
# the first ids of a vocabulary are often special, and some servers refuse them
FIRST_ID = 100
# frequent enough to be one token each in about any vocabulary
_WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one"
    " had not but what all were when we there can an your which their said if do will each about"
    " how up out them then she many some so these would other into has more her two like him see"
)


@dataclass(frozen=True)
class LoadPoint:
    """One point of a sweep: so many requests at a time, or so many a second on the average.

    Exactly one of ``concurrency`` and ``request_rate`` is given.
    """

    concurrency: int | None
    request_rate: float | None
    num_prompts: int

    @property
    def name(self) -> str:
        """What distinguishes it from the others."""
        if self.request_rate is not None:
            return f"{self.request_rate:g} requests a second"
        return f"concurrency {self.concurrency}"


@dataclass(frozen=True)
class ServingLoad:
    """Which server is loaded, and with what; every field becomes an option.

    Raises:
        ConfigError: a field is out of range, or two contradict each other.
    """

    base_url: str = field(
        default="http://127.0.0.1:8000",
        metadata={"help": "the server, with or without the /v1 of /v1/completions"},
    )
    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "the model's name, as the server knows it"}
    )
    input_len: int = field(default=128, metadata={"help": "tokens of a prompt"})
    output_len: int = field(default=128, metadata={"help": "tokens of an answer, each exactly"})
    concurrency: tuple[int, ...] = field(
        default=(),
        metadata={
            "help": "requests at a time, a point each"
            f" (default: {' '.join(map(str, DEFAULT_CONCURRENCY))})"
        },
    )
    request_rate: tuple[float, ...] = field(
        default=(),
        metadata={"help": "requests a second, a point each, at random times (Poisson), instead"},
    )
    num_prompts: int | None = field(
        default=None,
        metadata={
            "help": f"requests of each point (default: {ROUNDS_OF_CONCURRENCY} times concurrency,"
            f" or {SECONDS_OF_RATE} seconds' worth)"
        },
    )
    warm_up: int = field(
        default=2, metadata={"help": "requests sent together before each point, not counted"}
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "same seed, same prompts; the server may have kept them, so it should"
            " differ from run to run (default: drawn, and printed)"
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token"})
    vocab_size: int = field(
        default=49_000, metadata={"help": f"prompts are random ids from {FIRST_ID} up to this"}
    )
    prompt_as: str = field(
        default="ids",
        metadata={
            "help": "text: random words, about one a token, for servers that take no ids; the"
            " input then is what the server counts",
            "choices": ("ids", "text"),
        },
    )
    timeout_s: float = field(
        default=600.0, metadata={"help": "seconds for the whole of a request; then it has failed"}
    )

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1, not {value}")
        if any(number < 1 for number in self.concurrency):
            raise ConfigError(f"concurrency: must be at least 1, not {min(self.concurrency)}")
        for rate in self.request_rate:
            if not 0 < rate < math.inf:
                raise ConfigError(f"request_rate: must be greater than 0, not {rate}")
        if self.concurrency and self.request_rate:
            raise ConfigError("request_rate: does not go with concurrency; a sweep has one of them")
        if self.warm_up < 0:
            raise ConfigError(f"warm_up: must be 0 or more, not {self.warm_up}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: must be 0 or more, not {self.temperature}")
        if self.vocab_size <= FIRST_ID:
            raise ConfigError(f"vocab_size: must be above {FIRST_ID}, not {self.vocab_size}")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s: must be greater than 0, not {self.timeout_s}")

    @property
    def points(self) -> list[LoadPoint]:
        """The points of the sweep, in order."""
        if self.request_rate:
            return [
                LoadPoint(None, rate, self.num_prompts or math.ceil(SECONDS_OF_RATE * rate))
                for rate in self.request_rate
            ]
        return [
            LoadPoint(number, None, self.num_prompts or ROUNDS_OF_CONCURRENCY * number)
            for number in self.concurrency or DEFAULT_CONCURRENCY
        ]

    def drawing(self, what: str) -> random.Random:
        """A source of random numbers for this purpose alone.

        Shapes and purpose are part of its seed, so that no point of this or of another sweep with
        the same seed has prompts that a server could have kept.
        """
        return random.Random(f"{self.seed} {self.input_len} {self.output_len} {what}")

    def bodies(self, drawn: random.Random, count: int) -> list[bytes]:
        """The JSON of so many requests, no two alike."""
        return [json.dumps(self._body(drawn)).encode() for _ in range(count)]

    def _body(self, drawn: random.Random) -> dict[str, object]:
        prompt: list[int] | str
        if self.prompt_as == "ids":
            prompt = [drawn.randrange(FIRST_ID, self.vocab_size) for _ in range(self.input_len)]
        else:
            prompt = " ".join(drawn.choices(_WORDS.split(), k=self.input_len))
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
