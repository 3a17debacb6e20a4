"""Options of ``memplus bench serving`` and the requests that they define; needs no torch."""

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
# words so frequent that almost every vocabulary has a token for each
_WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one"
    " had not but what all were when we there can an your which their said if do will each about"
    " how up out them then she many some so these would other into has more her two like him see"
)


@dataclass(frozen=True)
class LoadPoint:
    """One point of a sweep: a number of concurrent requests, or an average request rate.

    Exactly one of ``concurrency`` and ``request_rate`` is given.
    """

    concurrency: int | None
    request_rate: float | None
    num_prompts: int

    @property
    def name(self) -> str:
        """The point's load, as reports name it."""
        if self.request_rate is not None:
            return f"{self.request_rate:g} requests per second"
        return f"concurrency {self.concurrency}"


@dataclass(frozen=True)
class ServingLoad:
    """The server and the load on it; every field becomes an option.

    Raises:
        ConfigError: a field is out of range, or two contradict each other.
    """

    base_url: str = field(
        default="http://127.0.0.1:8000",
        metadata={"help": "the server's URL, with or without /v1"},
    )
    model: str = field(
        default=DEFAULT_MODEL, metadata={"help": "name under which the server serves the model"}
    )
    input_len: int = field(default=128, metadata={"help": "tokens per prompt"})
    output_len: int = field(
        default=128, metadata={"help": "tokens to generate per request, exactly"}
    )
    concurrency: tuple[int, ...] = field(
        default=(),
        metadata={
            "help": "concurrent requests; each value is one point of the sweep"
            f" (default: {' '.join(map(str, DEFAULT_CONCURRENCY))})"
        },
    )
    request_rate: tuple[float, ...] = field(
        default=(),
        metadata={
            "help": "requests per second (Poisson), one point each, instead of --concurrency"
        },
    )
    num_prompts: int | None = field(
        default=None,
        metadata={
            "help": f"requests per point (default: {ROUNDS_OF_CONCURRENCY} times the concurrency,"
            f" or {SECONDS_OF_RATE} seconds of the rate)"
        },
    )
    warm_up: int = field(
        default=2,
        metadata={"help": "warm-up requests sent together before each point, not measured"},
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "seed of the prompts; change it between runs, since the server may cache"
            " prompts (default: random, and printed)"
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "sampling temperature; 0 is greedy"})
    vocab_size: int = field(
        default=49_000, metadata={"help": f"prompts are random ids from {FIRST_ID} up to this"}
    )
    prompt_as: str = field(
        default="ids",
        metadata={
            "help": "ids, or text: random words of about one token each, for servers that reject"
            " ids; the server then counts the prompt tokens",
            "choices": ("ids", "text"),
        },
    )
    timeout_s: float = field(
        default=600.0, metadata={"help": "seconds after which a request fails"}
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
            raise ConfigError("request_rate: cannot be combined with concurrency; set one of them")
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

    def rng(self, purpose: str) -> random.Random:
        """A random number generator for one purpose.

        Lengths and purpose are part of its seed. So no two points, not even of two sweeps with the
        same seed, share prompts that the server could have cached.
        """
        return random.Random(f"{self.seed} {self.input_len} {self.output_len} {purpose}")

    def bodies(self, rng: random.Random, count: int) -> list[bytes]:
        """JSON bodies of ``count`` random requests."""
        return [json.dumps(self._body(rng)).encode() for _ in range(count)]

    def _body(self, rng: random.Random) -> dict[str, object]:
        prompt: list[int] | str
        if self.prompt_as == "ids":
            prompt = [rng.randrange(FIRST_ID, self.vocab_size) for _ in range(self.input_len)]
        else:
            prompt = " ".join(rng.choices(_WORDS.split(), k=self.input_len))
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
