"""Replicas behind Ray Serve: ``serve run server.ray_app:build model=wordnet replicas=2``."""

from collections.abc import Mapping
from typing import Any

from server.config import environment_api_keys
from server.replicas.options import ReplicaOptions
from server.replicas.settings import ApplicationSettings, application_settings

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    message = f"replicas need Ray Serve ({error}): install memplus[ray]"
    raise ImportError(message) from None

from server.replicas.ingress import Ingress
from server.replicas.replica import Replica

# a name, so that handles in other processes import the class; it needs Ray
_ROUTER = "server.replicas.router:PrefixRouter"
_MOST_PERCENT = 100
# between two looks at whether a replica's requests have ended
_WAIT_LOOP_S = 0.5
# autoscaling's averaging window in seconds: at least 10.5, because Ray counts every 10 s
_LEAST_LOOK_BACK_S, _LOOK_BACK_S = 10.5, 30.0
_HEALTH_CHECK_PERIOD_S = 5.0
# Ray would log every request twice; access_log has one line for each
_LOGGING = LoggingConfig(enable_access_log=False)


def build(arguments: Mapping[str, Any]) -> "serve.Application":
    """The application for Ray Serve, with the options of ``memplus serve`` and of replicas.

    Raises:
        ConfigError: an argument is unknown, refused, of another type or out of range.
    """
    settings = application_settings(arguments, environment_api_keys())
    return _ingress(settings, _replicas(settings))


def _replicas(settings: ApplicationSettings) -> Any:
    options = settings.options
    router = RequestRouterConfig(
        request_router_class=_ROUTER, request_router_kwargs={"slack": options.prefix_slack}
    )
    deployment = serve.deployment(Replica).options(
        name="Replica",
        **_number(options, settings.replica.engine.max_num_seqs),
        max_ongoing_requests=settings.max_requests,
        max_queued_requests=settings.replica.http.max_queued_requests or 1,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": options.replica_gpus},
        request_router_config=router,
        graceful_shutdown_timeout_s=options.replica_drain_timeout_s,
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        max_surge_percent=options.surge_percent,
        logging_config=_LOGGING,
    )
    return deployment.bind(settings.replica)


def _number(options: ReplicaOptions, max_num_seqs: int) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    # Ray counts requests that run, and those that wait in a replica or for one: more than a
    # replica runs at a time means a queue
    config = AutoscalingConfig(
        min_replicas=options.replicas,
        max_replicas=options.max_replicas,
        target_ongoing_requests=options.target_requests or max_num_seqs,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        look_back_period_s=min(_LOOK_BACK_S, max(options.upscale_delay_s, _LEAST_LOOK_BACK_S)),
    )
    return {"autoscaling_config": config}


def _ingress(settings: ApplicationSettings, replicas: Any) -> Any:
    options, limits = settings.options, settings.ingress.limits
    deployment = serve.deployment(serve.ingress()(Ingress)).options(
        name="Ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=limits.max_connections,
        max_queued_requests=limits.max_connections,
        ray_actor_options={"num_cpus": 0},
        # its requests last as long as those of the replicas
        graceful_shutdown_timeout_s=options.replica_drain_timeout_s,
        graceful_shutdown_wait_loop_s=_WAIT_LOOP_S,
        max_surge_percent=_MOST_PERCENT,
        logging_config=_LOGGING,
    )
    return deployment.bind(settings.ingress, replicas)
