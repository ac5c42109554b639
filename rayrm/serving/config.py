"""What the serving applications are built from: the values under `args:` in serve_configs/."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rayrm.config import Config, Workers
from rayrm.scoring.bleurt import BleurtScoring
from rayrm.scoring.endpoint import EndpointConfig
from rayrm.scoring.reward_model import RewardModelScoring


class Replicas(Config):
    """How many copies of a model run, and what each of them reserves."""

    min_replicas: int = Field(1, ge=0)
    """Replicas at the least; with 0, the first request after a rest waits until one has started."""
    max_replicas: int = Field(1, ge=1)
    """Replicas at the most."""
    target_wait_s: float = Field(1.0, gt=0)
    """Seconds that a request should wait in the queue: above it, replicas are added, and below it taken away."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Seconds for which more replicas must be wanted before they are started."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Seconds for which fewer replicas must be wanted before some are stopped."""
    num_cpus: float = Field(1, ge=0)
    """Logical CPUs that each replica reserves, and threads that its model uses."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that each replica reserves."""

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self

    def deployment(self) -> dict[str, Any]:
        """Options of the Serve deployment."""
        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

        policy = AutoscalingPolicy(
            policy_function="rayrm.serving.autoscaling:WaitPolicy", policy_kwargs={"target_wait_s": self.target_wait_s}
        )
        autoscaling = AutoscalingConfig(
            min_replicas=self.min_replicas,
            initial_replicas=max(1, self.min_replicas),
            max_replicas=self.max_replicas,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
            policy=policy,
        )
        return {
            "autoscaling_config": autoscaling,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }


class ModelNames(Config):
    """What a gateway knows of a model: nothing that a new version of the model changes."""

    name: str = Field(min_length=1)
    """What requests call it."""
    aliases: tuple[str, ...] = ()
    """Further names."""
    is_always_on: bool = True
    """Whether it runs all the time, so that the server is not ready without it."""


class HostedModel(Config):
    """A model that replicas of ours hold."""

    name: str = Field(min_length=1)
    """What requests call it."""
    aliases: tuple[str, ...] = ()
    """Further names."""
    model: str
    """Folder or hub id of the model."""
    max_length: int | None = Field(None, ge=8)
    """Most tokens of an item, for models that do not say; null for the model's positions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the network; auto is bfloat16 on a GPU and float32 on a CPU. A reward model's head is always
    float32."""
    token_budget: int = Field(8192, ge=1)
    """Most tokens of a forward pass, padding included; a longer item runs alone. CPUs do best with 1,024 to 2,048."""
    cache_size: int = Field(0, ge=0)
    """Results that each replica remembers, by the content of what was asked."""
    replicas: Replicas = Replicas()
    """Copies of the model."""

    def names(self) -> ModelNames:
        """What the gateway knows of it."""
        return ModelNames(name=self.name, aliases=self.aliases, is_always_on=self.replicas.min_replicas > 0)


class ServedModel(HostedModel):
    """A reward model behind the gateway."""

    chat_template: str | None = None
    """For checkpoints that do not say how they are rendered: a template's name or path, or none."""

    def scoring(self) -> RewardModelScoring:
        """The same model as the offline jobs know it."""
        return RewardModelScoring(
            name=self.name,
            model=self.model,
            chat_template=self.chat_template,
            max_length=self.max_length,
            dtype=self.dtype,
        )


class ServedBleurt(HostedModel):
    """A BLEURT model behind the gateway, for `/v1/bleurt`."""

    def scoring(self) -> BleurtScoring:
        """The same model as the offline jobs know it."""
        workers = Workers(num_cpus=self.replicas.num_cpus, num_gpus=self.replicas.num_gpus)
        return BleurtScoring(
            model=self.model,
            max_length=self.max_length,
            dtype=self.dtype,
            token_budget=self.token_budget,
            workers=workers,
        )


class JudgeModel(EndpointConfig):
    """A language model that judges: one of ours, or an outside one."""

    name: str = Field(min_length=1)
    """What requests call it."""
    aliases: tuple[str, ...] = ()
    """Further names."""


class Gateway(Config):
    """The HTTP server before the models."""

    auth: Literal["keys", "none"] = "keys"
    """Whether requests need a key of the environment variable RAYRM_API_KEYS (`name=key,…`), as a bearer token or as
    the first part of the path, `/key/<key>/…`, for clients that can send no header; or nothing."""
    deadline_s: float = Field(60.0, gt=0, le=600)
    """Seconds for a request that names no deadline of its own; it is also the longest that one may name."""
    max_items: int = Field(4096, ge=1)
    """Most items of a request."""
    max_body_bytes: int = Field(16 * 2**20, ge=1)
    """Most bytes of a request's body."""
    max_ongoing_requests: int = Field(1024, ge=1)
    """Requests that a copy of the gateway has in work at the same time; as many more wait for it, and the rest are
    answered with 503."""
    num_replicas: int = Field(1, ge=1)
    """Copies of the gateway."""
    num_cpus: float = Field(0, ge=0)
    """Logical CPUs that each copy reserves; it waits most of its time."""
    quotas: dict[str, int] = Field(default_factory=dict)
    """Requests a minute for a key, by its name; a key without one has no quota."""


class Directory(Config):
    """What a gateway is built from."""

    models: tuple[ModelNames, ...]
    """The models; requests that name none go to the first one."""
    bleurt: tuple[ModelNames, ...] = ()
    """BLEURT models."""
    judges: tuple[JudgeModel, ...] = ()
    """The judges; judgements that name none come from the first one."""
    gateway: Gateway
    """The HTTP server."""


class RewardService(Config):
    """Reward models and judges behind one gateway."""

    models: tuple[ServedModel, ...] = ()
    """The reward models; requests that name none go to the first one."""
    bleurt: tuple[ServedBleurt, ...] = ()
    """BLEURT models; requests to `/v1/bleurt` that name none go to the first one."""
    judges: tuple[JudgeModel, ...] = ()
    """The judges; judgements that name none come from the first one."""
    gateway: Gateway = Gateway()
    """The HTTP server."""

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> RewardService:
        served: list[HostedModel | JudgeModel] = [*self.models, *self.bleurt, *self.judges]
        if not served:
            raise ValueError("there is nothing to serve; name models, bleurt or judges")
        names = [name for model in served for name in (model.name, *model.aliases)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several models are called {', '.join(twice)}")
        return self

    def directory(self) -> Directory:
        """What the gateway is built from."""
        names, bleurt = (tuple(model.names() for model in models) for models in (self.models, self.bleurt))
        return Directory(models=names, bleurt=bleurt, judges=self.judges, gateway=self.gateway)
