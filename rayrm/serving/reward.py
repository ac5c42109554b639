"""The Serve application: reward and BLEURT models, each in a deployment of its own, and one gateway before them."""

# No `from __future__ import annotations` here: with it, Serve does not see the type of `args`, and checks nothing.

from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from rayrm.config import load_env
from rayrm.serving.bleurt import BleurtReplica
from rayrm.serving.config import Directory, HostedModel, RewardService
from rayrm.serving.gateway import make_app
from rayrm.serving.guard import read_keys
from rayrm.serving.metrics import Metrics
from rayrm.serving.replica import RewardReplica
from rayrm.serving.service import ServeBackend, Service

NO_ACCESS_LOG = {"enable_access_log": False}
DRAIN_S = 10.0
"""Seconds beyond the longest deadline that a replica which is taken away gets for what it has accepted."""
RETRY_AFTER_S = 5
"""Told to clients while the gateway itself is full."""


@serve.deployment
@serve.ingress()
class GatewayReplica:
    """The gateway, in front of handles to its models."""

    def __init__(self, values: dict[str, Any], handles: dict[str, DeploymentHandle]) -> None:
        load_env()
        directory = Directory.model_validate(values)
        self._service = Service(directory, {name: ServeBackend(each) for name, each in handles.items()}, Metrics())
        self._keys = read_keys(directory.gateway)

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(self._service, self._keys)


def build_app(args: RewardService) -> serve.Application:
    """Reward models behind a gateway, from the values of a file in serve_configs/."""
    load_env()
    gateway = args.gateway
    read_keys(gateway)
    drain_s = gateway.deadline_s + DRAIN_S
    # All that the gateways let in may go to one replica, whose own queue refuses by time and not by number.
    at_once = gateway.max_ongoing_requests * gateway.num_replicas
    replicas: list[tuple[HostedModel, type]] = [
        *((model, RewardReplica) for model in args.models),
        *((model, BleurtReplica) for model in args.bleurt),
    ]
    handles = {
        model.name: serve.deployment(replica)
        .options(
            name=model.name,
            max_ongoing_requests=at_once,
            graceful_shutdown_timeout_s=drain_s,
            logging_config=NO_ACCESS_LOG,
            **model.replicas.deployment(),
        )
        .bind(model.model_dump(mode="json"))
        for model, replica in replicas
    }
    options = {
        "name": "gateway",
        "num_replicas": gateway.num_replicas,
        "max_ongoing_requests": gateway.max_ongoing_requests,
        "max_queued_requests": gateway.max_ongoing_requests,
        "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        "graceful_shutdown_timeout_s": drain_s,
        "logging_config": NO_ACCESS_LOG,
        "ray_actor_options": {"num_cpus": gateway.num_cpus},
    }
    return GatewayReplica.options(**options).bind(args.directory().model_dump(mode="json"), handles)  # type: ignore[attr-defined]
