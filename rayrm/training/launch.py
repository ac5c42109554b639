"""Start a training loop on Ray Train workers, with DeepSpeed's settings for them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rayrm import cluster, errors, files
from rayrm.config import Config
from rayrm.errors import CheckpointError, RayRMError, ServiceError
from rayrm.training.memory import MICRO_BATCH

log = logging.getLogger("rayrm")
STATE = "state"
MODEL = "model"
FAULT = "fault.json"
"""File of a run whose workers have met what another attempt cannot mend."""
MARK = f"{MODEL}/{files.CHECKPOINT_MARK}"
"""Where the completion mark of a checkpoint lies below a training run's output."""


class TrainingWorkers(Config):
    """The processes that train together, and what each of them reserves."""

    num_workers: int = Field(1, ge=1)
    """Training processes; the global batch is the same for any number of them."""
    num_cpus: float = Field(1, gt=0)
    """Logical CPUs that each process reserves."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that each process reserves: 1, or 0 to train on the CPU."""
    max_failures: int = Field(3, ge=0)
    """How often the group is started again from its last state after a process or node died."""


class Parallelism(Config):
    """How DeepSpeed shares the work of one step."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO partitions: 0 nothing (bf16 takes 1 instead), 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory."""
    offload_parameters: bool = False
    """Keep parameters in the host's memory (ZeRO-3)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward and backward pass; auto is bf16 on GPUs and fp32 on CPUs. Gradients of several passes
    are added up in fp32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""

    @model_validator(mode="after")
    def _offloads_what_is_partitioned(self) -> Parallelism:
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, not {self.zero_stage}")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage 1 or more, not 0")
        return self

    def uses_bf16(self, num_gpus: float) -> bool:
        """Whether these settings mean bf16 for workers with `num_gpus` GPUs each."""
        return self.precision == "bf16" or (self.precision == "auto" and num_gpus > 0)


def deepspeed_config(
    parallelism: Parallelism, micro_batch_size: int, accumulation_steps: int, bf16: bool, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's own config for these settings. `micro_batch_size` is rows a worker and forward pass."""
    # DeepSpeed has no plain bf16: its stage 0 takes an optimizer for fp16, which takes other steps than stages 1 to 3.
    zero: dict[str, Any] = {"stage": max(parallelism.zero_stage, int(bf16))}
    if zero["stage"]:
        zero |= {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}
    if parallelism.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if parallelism.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        # Otherwise gradients of bf16 are added up in bf16, where small ones are lost beside the sum of many.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def launch(
    loop: Callable[[dict[str, Any]], dict[str, Any] | None],
    loop_config: dict[str, Any],
    output: str,
    workers: TrainingWorkers,
    what: str,
) -> dict[str, Any]:
    """Run `loop(loop_config)` on all workers and return what it returned on rank 0.

    States are reported to `<output>/state/step-N`, and the last two stay; a run that is started again finds the last
    one through `ray.train.get_checkpoint()`. Running out of memory is no failure as long as the next attempt has a
    smaller micro batch. Workers that lack a node wait for it, and a node that goes while they are placed on it counts
    as one of `max_failures`. Raises CheckpointError with the worker's own words when training fails for good,
    and ResourceError when the cluster can never hold the workers.
    """
    cluster.require(workers.num_workers, workers.num_cpus, workers.num_gpus, what)
    from ray.train import ControllerError, TrainingFailedError

    fault = files.join(output, FAULT)
    files.remove(fault)  # of a driver that was killed
    failures_left = workers.max_failures
    while True:
        before = files.read_json(files.join(output, MICRO_BATCH))
        try:
            return dict(_trainer(partial(_tell, loop, fault), loop_config, output, workers).fit().return_value or {})
        except TrainingFailedError as error:
            if files.read_json(fault) is None and files.read_json(files.join(output, MICRO_BATCH)) != before:
                continue
            # Ray Train waits for nodes by itself, and gives up only where its own calls meet one that dies.
            if not isinstance(error, ControllerError) or not failures_left:
                raise CheckpointError(f"Training into '{output}' failed: {_root_cause(error)}") from error
            failures_left -= 1
            log.warning("The training workers could not be placed, and begin again: %s", _root_cause(error))
        finally:
            files.remove(fault)


def _tell(loop: Callable[[dict[str, Any]], Any], fault: str, loop_config: dict[str, Any]) -> Any:
    """The loop, unless a former attempt of this run met what will be no better in the next one.

    Ray Train starts a group of workers again whatever it failed with. A service that was away may be back.
    """
    told = files.read_json(fault)
    if told is not None:
        raise getattr(errors, told["type"])(told["message"])
    try:
        return loop(loop_config)
    except RayRMError as error:
        if not isinstance(error, ServiceError):
            files.write_json(fault, {"type": type(error).__name__, "message": str(error)})
        raise


def _trainer(loop: Callable[..., Any], loop_config: dict[str, Any], output: str, workers: TrainingWorkers) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    return TorchTrainer(
        loop,
        train_loop_config=loop_config,
        # One may wait for services and nodes as long as these take, and the others for it.
        torch_config=TorchConfig(backend="nccl" if workers.num_gpus else "gloo", timeout_s=24 * 3600),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.num_gpus > 0,
            resources_per_worker={kind: num for kind, num in resources.items() if num},
        ),
        run_config=RunConfig(
            name=STATE,
            storage_path=output if "://" in output else str(Path(output).absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )


def fetch(references: Sequence[Any], what: str) -> list[Any]:
    """The results of Ray tasks, with a progress bar on a terminal.

    A RayRMError of a task is raised as it is, without the task's traceback.
    """
    import ray
    from ray.exceptions import RayTaskError
    from tqdm import tqdm

    waiting = list(references)
    try:
        with tqdm(total=len(waiting), desc=what, disable=not sys.stderr.isatty()) as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                bar.update(len(done))
        return list(ray.get(list(references)))
    except RayTaskError as error:
        if isinstance(error.cause, RayRMError):
            raise error.cause from None
        raise


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{type(first).__name__}: {first}"


def start_deepspeed(use_gpu: bool) -> None:
    """Join DeepSpeed's process group, on the group that Ray Train has made."""
    import deepspeed

    # On CPUs DeepSpeed compiles an all-reduce of its own at the first use. A worker that is killed meanwhile leaves a
    # lock that every later one waits for, and a worker whose peer dies in that all-reduce waits too. Gloo does neither.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if use_gpu else "gloo")


def prepare_worker(num_cpus: float, use_gpu: bool) -> None:
    """Settings that a training process needs before torch or DeepSpeed look for them."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch

    if not use_gpu:
        torch.set_num_threads(max(1, int(num_cpus)))
