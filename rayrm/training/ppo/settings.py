"""What may be set for policy training with rewards: PPO, and its critic-free relatives RLOO and GRPO."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrm.composing import Composition
from rayrm.config import Config
from rayrm.models.vllm import DecodingConfig
from rayrm.scoring import Scoring
from rayrm.training.ppo.kl import Estimator, KLConfig
from rayrm.training.ppo.rollouts import RolloutConfig
from rayrm.training.settings import Training, TrainingJob

FP32_DRIFT, DRIFT = 0.001, 0.05
"""Most nats a token between sampler and learner, where both are in fp32 and where they are not."""
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]


class LengthRule(Config):
    """What becomes of a completion whose length is not as wanted."""

    then: Literal["keep", "drop", "penalise"] = "keep"
    """keep: it gets the reward of its scores; drop: it is left out of the update, and counted; penalise: its whole
    reward is `reward`, whatever its scores are."""
    reward: float | None = None
    """With penalise, the reward, in the unit of the composed one."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.then == "penalise") != (self.reward is not None):
            raise ValueError("reward belongs to then=penalise, and is needed there")
        return self


class PolicyGradient(Training):
    """Draw completions from the policy, reward them, and make the better ones likelier; step by step.

    A step draws `sampling.num_candidates` completions for each of `global_batch_size` prompts, and learns from them in
    passes of `micro_batch_size` completions.
    """

    scorers: list[Scoring] = Field(min_length=1)
    """What scores completions, in process or over HTTP (`type: service`), each in actors of its own."""
    rewarding: Composition
    """How the scores become one reward, and on which tokens it stands."""
    sampling: DecodingConfig = DecodingConfig()
    """How completions are drawn. What filters the distribution (top_k, top_p, min_tokens) is not what the policy learns
    with: it is off unless set, shows as drift between sampler and learner, and is named in the report."""
    rollouts: RolloutConfig = RolloutConfig()
    """What draws them, and where."""
    overlap: bool = False
    """Draw and score the next step's completions while this one is learned from: they come from the weights of one
    step before, and the importance ratio is taken against those. Needs memory for one more copy of the weights."""
    kl: KLConfig = KLConfig()
    """What keeps the policy near the model that it started from."""
    shared_prefix: bool = False
    """Compute a prompt once for all of its completions, and no padding; for decoder-only models with an attention that
    can be told. Parts of a step then hold whole prompts."""
    num_updates: int = Field(1, ge=1)
    """Passes over the completions of a step."""
    num_mini_batches: int = Field(1, ge=1)
    """Parts of the completions of a step; the weights change after each of them."""
    clip_range: float = Field(0.2, gt=0)
    """The ratio of new to old probabilities that bears a gradient lies within 1 ± this."""
    whiten_advantages: bool = True
    """Give the advantages of a step mean 0 and variance 1, over all of its tokens."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the mean entropy, which is made larger."""
    reduction: Reduction = "token_mean"
    """How the losses of tokens make that of a batch: token_mean takes all tokens alike; sequence_mean the mean over a
    completion's tokens, then over completions; sequence_sum the sum over a completion's tokens, then the mean."""
    max_update_kl: float | None = Field(None, gt=0)
    """Mean nats a token between the policy that drew and the one that learns (k3) at which a step's updates end early;
    null for never."""
    min_length: int = Field(1, ge=1)
    """Tokens, the end token left out, below which `too_short` holds; as it does for white space alone."""
    too_short: LengthRule = LengthRule(then="drop")
    """What becomes of a completion that has fewer tokens. An empty one is never scored: keep leaves it unscored."""
    unfinished: LengthRule = LengthRule()
    """What becomes of a completion that was cut at max_tokens."""
    eval_rows: int = Field(256, ge=1)
    """Most held-out rows that an evaluation draws completions for."""
    max_unscored_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the last completions without a reward above which the run ends; they are those of two steps, and 64 at
    the least."""
    max_drift: float | None = Field(None, gt=0)
    """Mean difference in nats between the sampler's and the learner's log-probabilities of the drawn tokens above which
    the run ends; null for 0.001 where both compute in fp32, of which some 1e-5 are usual, else 0.05, where some 0.01
    are."""

    @model_validator(mode="after")
    def _can_learn(self) -> Self:
        names = [scorer.name for scorer in self.scorers]
        if len(set(names)) < len(names):
            raise ValueError(f"scorers are named {', '.join(names)}; give each a name of its own")
        if grown := [scorer.name for scorer in self.scorers if scorer.workers.max_workers is not None]:
            raise ValueError(
                f"max_workers is set for {', '.join(grown)}, and scorers have a fixed number; set num_workers"
            )
        used = {part.scorer for part in self.rewarding.parts}
        if unused := sorted(set(names) - used):
            raise ValueError(f"the scorers {', '.join(unused)} are no part of rewarding; remove them, or use them")
        if unknown := sorted(used - set(names)):
            raise ValueError(f"rewarding names {', '.join(unknown)}, and the scorers are {', '.join(names)}")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0, and equal completions teach nothing")
        if self.sampling.stop:
            raise ValueError("sampling.stop ends completions in a way that the policy cannot learn; leave it empty")
        if self.lora is not None and self.lora.dropout:
            raise ValueError("lora.dropout makes other probabilities at each look at a completion; set it to 0")
        num = self.global_batch_size * (1 if self.shared_prefix else self.sampling.num_candidates)
        if num < self.num_mini_batches:
            raise ValueError(f"num_mini_batches {self.num_mini_batches} is more than the {num} parts that a step has")
        if self.shared_prefix and self.attn_implementation is not None:
            raise ValueError(f"shared_prefix has an attention of its own; leave out {self.attn_implementation}")
        if self.sampling.max_tokens >= self.max_length:
            raise ValueError(
                f"sampling.max_tokens {self.sampling.max_tokens} leaves no room for a prompt within max_length "
                f"{self.max_length}"
            )
        return self

    @property
    def filters(self) -> list[str]:
        """The settings of `sampling` that the policy does not learn with, as they read in a config."""
        on = {
            "top_k": self.sampling.top_k is not None,
            "top_p": self.sampling.top_p < 1,
            "min_tokens": self.sampling.min_tokens > 0,
        }
        return [f"{name}={getattr(self.sampling, name)}" for name, is_on in on.items() if is_on]


class PPO(PolicyGradient):
    """Proximal policy optimisation (arXiv 1707.06347) with a value head on the policy's last hidden state."""

    type: Literal["ppo"] = "ppo"
    """What kind of training this is."""
    num_updates: int = Field(2, ge=1)
    """Passes over the completions of a step."""
    num_mini_batches: int = Field(2, ge=1)
    """Parts of the completions of a step; the weights change after each of them."""
    gamma: float = Field(1.0, gt=0, le=1)
    """What a reward counts one token earlier."""
    lam: float = Field(0.95, ge=0, le=1)
    """λ of GAE: 1 trusts the rewards alone, 0 the values of the next token alone."""
    value_clip_range: float | None = Field(None, gt=0)
    """How far a value may move from that of the beginning of the step before its gradient ends, in units of the reward;
    null for any distance."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the loss of values: how strongly it moves the layers below the value head, which has `value_lr`."""
    value_lr: float = Field(1e-3, gt=0)
    """Learning rate of the value head, the same in all steps: it is new, and follows rewards of any size, so `lr` would
    be far too low for it."""
    value_warmup_steps: int = Field(0, ge=0)
    """First steps in which only the values are learned: a new value head says nothing of use. The schedule of `lr`
    begins behind them."""


class LossKLConfig(KLConfig):
    """The same, with GRPO's defaults."""

    coefficient: float = Field(0.04, ge=0)
    """What one nat costs, in units of the reward; with a target, at the start. 0 turns the reference off."""
    estimator: Estimator = "k3"
    """What a drawn token tells of the divergence: k1 the log-ratio, k2 half its square, k3 exp(−d) − 1 + d, abs |d|."""
    part_of: Literal["reward", "loss"] = "loss"
    """Whether each token's cost is taken from its reward, or added to the loss, with a gradient of its own."""


class CriticFree(PolicyGradient):
    """Against the other completions of the same prompt; at least two of each are needed."""

    whiten_advantages: bool = False
    """Give the advantages of a step mean 0 and variance 1, over all of its tokens."""

    @model_validator(mode="after")
    def _has_groups(self) -> Self:
        if self.sampling.num_candidates < 2:
            raise ValueError("sampling.num_candidates is 1, and a completion is compared with others of its prompt")
        return self


class RLOO(CriticFree):
    """REINFORCE against the mean of a prompt's other completions (arXiv 2402.14740)."""

    type: Literal["rloo"] = "rloo"
    """What kind of training this is."""
    reduction: Reduction = "sequence_sum"
    """How the losses of tokens make that of a batch."""


class GRPO(CriticFree):
    """Rewards relative to those of the same prompt (arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    """What kind of training this is."""
    reduction: Reduction = "sequence_mean"
    """How the losses of tokens make that of a batch."""
    kl: LossKLConfig = LossKLConfig()
    """What keeps the policy near the model that it started from."""
    scale_by_deviation: bool = True
    """Divide by the standard deviation of a prompt's rewards."""


RewardedTraining = Annotated[PPO | RLOO | GRPO, Field(discriminator="type")]
"""The config of any training with rewards, told apart by `type`."""


class RewardedJob(TrainingJob):
    """From Prompt rows and scorers to a policy's checkpoint."""

    training: RewardedTraining
    """What is trained, and how."""

    @property
    def max_drift(self) -> float:
        """`training.max_drift`, or what stands for null."""
        if self.training.max_drift is not None:
            return self.training.max_drift
        sampler = self.training.rollouts.settings
        in_fp32 = sampler.dtype == "float32" or (
            sampler.dtype == "auto" and not self.training.rollouts.workers.num_gpus
        )
        if in_fp32 and sampler.quantization is None and not self.parallelism.uses_bf16(self.workers.num_gpus):
            return FP32_DRIFT
        return DRIFT
