"""Options of replicas: their number, autoscaling, resources and how they are replaced."""

import math
from dataclasses import dataclass, fields

from engine.errors import ConfigError
from engine.sampling.params import option

_AUTOSCALING = ("target_requests", "upscale_delay_s", "downscale_delay_s")


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of replicas behind Ray Serve.

    Raises:
        ConfigError: a field is out of range.
    """

    replicas: int = option(1, "replicas; with max_replicas, the least")
    max_replicas: int | None = option(
        None, "add replicas up to this number while requests wait (default: replicas)"
    )
    target_requests: float | None = option(
        None, "requests per replica that autoscaling aims at (default: max_num_seqs)"
    )
    upscale_delay_s: float = option(10.0, "add replicas after this long above the target")
    downscale_delay_s: float = option(300.0, "remove replicas after this long below the target")
    prefix_slack: int = option(
        8,
        "requests that a replica with a longer known prefix may have more than the least loaded"
        " one",
    )
    replica_cpus: float | None = option(
        None, "Ray's CPUs per replica (default: threads, which is 1 by default)"
    )
    replica_gpus: float = option(0.0, "Ray's GPUs per replica; a fraction lets replicas share one")
    replica_drain_timeout_s: float = option(
        300.0, "time for a replica that is replaced or removed to finish its requests"
    )
    surge_percent: int = option(
        100, "additional replicas during a rolling update; 0: stop an old one first"
    )
    ingresses: int = option(1, "processes that pass requests to replicas")

    def __post_init__(self) -> None:
        for name in ("replicas", "ingresses"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            number = self.max_replicas
            raise ConfigError(f"max_replicas: {number} is less than replicas, {self.replicas}")
        for name in ("target_requests", "replica_cpus", "replica_drain_timeout_s"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ConfigError(f"{name}: must be greater than 0, not {number}")
        for name in ("upscale_delay_s", "downscale_delay_s", "prefix_slack", "replica_gpus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: must be 0 or more, not {getattr(self, name)}")
        if self.replica_gpus > 1 and self.replica_gpus != int(self.replica_gpus):
            raise ConfigError(
                f"replica_gpus: above 1 it must be a whole number, not {self.replica_gpus}"
            )
        if not 0 <= self.surge_percent <= 100:
            raise ConfigError(f"surge_percent: {self.surge_percent} is outside [0, 100]")
        for one in fields(self):
            is_set = getattr(self, one.name) != one.default
            if one.name in _AUTOSCALING and is_set and self.max_replicas is None:
                raise ConfigError(f"{one.name}: needs max_replicas")
