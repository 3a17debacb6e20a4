"""Options of logs and metrics."""

import re
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.sampling.params import option

_FORMATS = ("text", "json")


@dataclass(frozen=True)
class MonitoringOptions:
    """Options of logs and metrics.

    Raises:
        ConfigError: a field is out of range.
    """

    log_format: str = option(
        "text",
        "lines for people, or one JSON object per line",
        group=("monitoring", "--log-format json --access-log"),
        choices=_FORMATS,
    )
    access_log: bool = option(False, "log every HTTP request")
    log_prompts: bool = option(False, "log the prompts of requests")
    log_interval_s: int = option(10, "log throughput this often while busy (0 disables it)")
    metrics_prefix: str = option(
        "memplus:", "start of the metrics' names; vllm: fits dashboards for vLLM", metavar="TEXT"
    )

    def __post_init__(self) -> None:
        if self.log_format not in _FORMATS:
            raise ConfigError(f"log_format: {self.log_format!r} is not text or json")
        if self.log_interval_s < 0:
            raise ConfigError(f"log_interval_s: must be 0 or more, not {self.log_interval_s}")
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,63}", self.metrics_prefix):
            allowed = "must have 1 to 64 letters, digits, _ and :, and not begin with a digit"
            raise ConfigError(f"metrics_prefix: {allowed}; not {self.metrics_prefix!r}")
