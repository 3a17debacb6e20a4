"""Settings of an application of replicas, from the arguments that Ray Serve passes."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.access import AccessOptions
from server.api_keys import ApiKeys
from server.config import HttpOptions, SupervisionOptions, ThreadOptions
from server.limits import LimitOptions
from server.model_options import ModelOptions
from server.monitoring import MonitoringOptions
from server.patch_options import PatchOptions
from server.replicas.options import ReplicaOptions
from weights.nearest_name import suggestion
from weights.toml_file import typed_value

Options = TypeVar("Options")
_GROUPS: tuple[type, ...] = (
    *(ModelOptions, EngineConfig, PatchOptions, ThreadOptions, HttpOptions, LimitOptions),
    *(AccessOptions, MonitoringOptions, SupervisionOptions, ReplicaOptions),
)
_HTTP = "is an option of Ray's proxy: set it in http_options of Ray Serve's configuration"
_NONE = "has no counterpart in Ray's proxy, which accepts the connections"
_REFUSED = {
    **dict.fromkeys(("host", "port", "tls_cert", "tls_key"), _HTTP),
    "keep_alive_timeout_s": _HTTP,
    **dict.fromkeys(("uds", "header_timeout_s", "max_header_kib", "stream_write_timeout_s"), _NONE),
    "drain_timeout_s": "use replica_drain_timeout_s",
}


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings of one replica."""

    model: ModelOptions
    engine: EngineConfig
    patches: PatchOptions
    threads: ThreadOptions
    http: HttpOptions
    limits: LimitOptions
    supervision: SupervisionOptions
    monitoring: MonitoringOptions


@dataclass(frozen=True)
class IngressSettings:
    """Settings of the ingress.

    Attributes:
        access: without API keys.
    """

    access: AccessOptions
    keys: ApiKeys
    http: HttpOptions
    limits: LimitOptions
    monitoring: MonitoringOptions


@dataclass(frozen=True)
class ApplicationSettings:
    """Settings of replicas, their ingress, and their number."""

    replica: ReplicaSettings
    ingress: IngressSettings
    options: ReplicaOptions

    @property
    def replica_cpus(self) -> float:
        """Ray's CPUs per replica."""
        return self.options.replica_cpus or float(self.replica.threads.threads or 1)

    @property
    def max_requests(self) -> int:
        """Requests that a replica takes; it answers those beyond its queue with 503 itself."""
        return self.replica.engine.max_num_seqs + self.replica.http.max_queued_requests + _OTHERS


# requests without a prompt, and those that are to be refused
_OTHERS = 64


def application_settings(
    arguments: Mapping[str, Any], environment_keys: str
) -> ApplicationSettings:
    """The settings of the arguments of ``serve run`` (texts) or of a configuration file.

    Args:
        arguments: values by the names of the options, with dashes or underscores.
        environment_keys: the value of MEMPLUS_API_KEYS.

    Raises:
        ConfigError: an argument is unknown, refused, of another type or out of range.
    """
    given = _typed(arguments)
    access, http = _options(AccessOptions, given), _options(HttpOptions, given)
    limits, monitoring = _options(LimitOptions, given), _options(MonitoringOptions, given)
    limits.check_bodies(http.max_body_mib)
    options, threads = _options(ReplicaOptions, given), _options(ThreadOptions, given)
    model = _options(ModelOptions, given)
    engine = _options(EngineConfig, given)
    _check_device(model.device, options.replica_gpus)
    if 0 < options.replica_gpus < 1 and engine.kv_cache_gib is None:
        shared = f"replicas share a GPU (replica_gpus {options.replica_gpus:g})"
        raise ConfigError(f"kv_cache_gib: must be set if {shared}")
    if threads.threads is None:
        # replicas of one machine must not compute with all of its cores each
        threads = ThreadOptions(max(1, int(options.replica_cpus or 1)))
    replica = ReplicaSettings(
        model,
        engine,
        _options(PatchOptions, given),
        threads,
        http,
        limits,
        _options(SupervisionOptions, given),
        monitoring,
    )
    keys = access.keys(environment_keys)
    ingress = IngressSettings(replace(access, api_key=()), keys, http, limits, monitoring)
    return ApplicationSettings(replica, ingress, options)


def _check_device(device: str, replica_gpus: float) -> None:
    """Raise ConfigError if replicas could not use their device, or would all use the same one."""
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device: Ray chooses the GPUs of each replica; use cuda instead of {device}"
        )
    if device == "cuda" and not replica_gpus:
        raise ConfigError("replica_gpus: must be above 0 with device cuda")
    if device == "cpu" and replica_gpus:
        raise ConfigError(f"replica_gpus: must be 0 with device cpu, not {replica_gpus:g}")


def _options(group: type[Options], given: Mapping[str, Any]) -> Options:
    names = {one.name for one in fields(group)}  # type: ignore[arg-type]
    return group(**{name: value for name, value in given.items() if name in names})


def _typed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the arguments as the fields have them; ConfigError names a bad one."""
    hints = {name: hint for kind in _GROUPS for name, hint in typing.get_type_hints(kind).items()}
    known = {one.name: one for kind in _GROUPS for one in fields(kind) if "help" in one.metadata}
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{key}: unknown option{suggestion(name, known)}")
        if name in _REFUSED:
            raise ConfigError(f"{key}: {_REFUSED[name]}")
        if name in found:
            raise ConfigError(f"{key}: is given twice")
        read = _from_text(value, hints[name]) if isinstance(value, str) else value
        found[name] = typed_value(key, read, hints[name], known[name].metadata.get("choices"))
    return found


def _from_text(text: str, hint: Any) -> Any:
    """A text of ``serve run`` as a value: numbers and true or false; lists have commas."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if isinstance(hint, types.GenericAlias):
        return [part for part in text.split(",") if part]
    if hint is str:
        return text
    try:
        return json.loads(text.lower())
    except ValueError:
        return text
