"""Sample n candidates a prompt in one request, against the published recipe's n passes of one candidate each.

The recipe's passes run twice: with vLLM's prefix cache, and with the cache emptied before each pass, as in the
versions of vLLM that it was written for. All run on one engine, in turns, from an empty cache; the ratio is that of
the median times.
Usage: `python -m benchmarks.sampling [model=<folder or hub id>] [num_prompts=…] …`; without a model, a small one with
random weights is made.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable

from pydantic import Field

from rayrm.config import Config, parse_args, run_job
from rayrm.models.creation import CreationConfig, create_model
from rayrm.models.folders import load_tokenizer, local_model
from rayrm.models.rendering import Renderer, load_template
from rayrm.models.vllm import Completion, DecodingConfig, Engine, EngineConfig
from rayrm.prompts import direct_prompt

SENTENCE = (
    "a red house stands near the old river where two small dogs run across wet grass while children play with some "
    "blue boats and an old man in his green coat reads about the weather"
)
WORDS = SENTENCE.split()
Samples = list[list[Completion]]


class SamplingBenchmark(Config):
    """What is sampled."""

    model: str | None = None
    """Folder or hub id of a causal language model; null for one with random weights."""
    chat_template: str | None = None
    """Name or path of a chat template, or none; null for the tokenizer's own."""
    num_prompts: int = Field(256, ge=1)
    """Prompts, each of 8 to 40 words with its instruction."""
    num_candidates: int = Field(4, ge=2)
    """Candidates for each prompt."""
    max_tokens: int = Field(24, ge=1)
    """Tokens of each candidate."""
    repeats: int = Field(3, ge=1)
    """Runs of either way."""
    num_threads: int = Field(2, ge=1)
    """Cores that vLLM uses on a CPU."""


def main() -> None:
    """Print the time and the computed prompt tokens of both ways, and the ratio."""
    config = parse_args(SamplingBenchmark)
    with tempfile.TemporaryDirectory() as folder:
        model = config.model or make_model(folder)
        engine = Engine(local_model(model), EngineConfig(), config.num_threads)
        tokenizer = load_tokenizer(model)
    renderer = Renderer(tokenizer, load_template(config.chat_template, tokenizer, model))
    texts = make_texts(config.num_prompts)
    prompts = [renderer.prompt_ids([{"role": "user", "content": direct_prompt(t, "en", "de")}]) for t in texts]
    decoding = DecodingConfig(
        num_candidates=config.num_candidates, max_tokens=config.max_tokens, min_tokens=config.max_tokens
    )
    ways = {
        f"one request of n={config.num_candidates}": lambda: together(engine, prompts, decoding),
        f"{config.num_candidates} passes of n=1": lambda: in_passes(engine, prompts, decoding, keeps_cache=True),
        f"{config.num_candidates} passes of n=1 without a prefix cache": lambda: in_passes(
            engine, prompts, decoding, keeps_cache=False
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    computed: dict[str, int] = {}
    together(engine, prompts[:8], decoding)
    for _ in range(config.repeats):
        for name, sample in ways.items():
            seconds, computed[name] = measure(engine, sample)
            times[name].append(seconds)
    total = sum(map(len, prompts))
    print(f"{len(prompts)} prompts with {total:,} tokens, {config.max_tokens} tokens a candidate")
    for name in ways:
        share = computed[name] / total
        print(
            f"{name}: {statistics.median(times[name]):.2f} s, {computed[name]:,} prompt tokens computed ({share:.2f}×)"
        )
    ours, *theirs = [statistics.median(seconds) for seconds in times.values()]
    print("ratios: " + ", ".join(f"{seconds / ours:.2f}×" for seconds in theirs))


def together(engine: Engine, prompts: list[list[int]], decoding: DecodingConfig) -> Samples:
    """All candidates of all prompts in one call."""
    return engine.generate(prompts, range(0, len(prompts) * 100, 100), decoding)


def in_passes(engine: Engine, prompts: list[list[int]], decoding: DecodingConfig, keeps_cache: bool) -> Samples:
    """As the recipe does: over all prompts, sorted by length, once for each candidate."""
    once = decoding.model_copy(update={"num_candidates": 1})
    prompts = sorted(prompts, key=len)
    passes = []
    for number in range(decoding.num_candidates):
        if not keeps_cache:
            engine.llm.reset_prefix_cache()
        passes.append(engine.generate(prompts, range(number, len(prompts) * 100, 100), once))
    return [[item for group in groups for item in group] for groups in zip(*passes, strict=True)]


def measure(engine: Engine, sample: Callable[[], Samples]) -> tuple[float, int]:
    """Seconds and computed prompt tokens of one way, from an empty prefix cache."""
    engine.llm.reset_prefix_cache()
    before, start = engine.prompt_tokens().computed, time.perf_counter()
    sample()
    return time.perf_counter() - start, engine.prompt_tokens().computed - before


def make_texts(num: int) -> list[str]:
    """`num` texts of 8 to 40 words, always the same."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(8, 40))) for _ in range(num)]


def make_model(folder: str) -> str:
    """A model of about 3 million parameters."""
    create_model([direct_prompt(text, "en", "de") for text in make_texts(500)], CreationConfig(max_length=512), folder)
    return folder


if __name__ == "__main__":
    run_job(main)
