"""The scoring service under load, against the same forward passes offline, a plain server, and vLLM's pooling server.

One model of some 20 million parameters in fp32, texts of real answers, none of them twice, no caches. Clients send one
row a request and keep 256 in flight. Offline, one process runs the service's own forward passes over the same texts in
batches by token budget, sorted by length; padded and packed batches are both measured, and the faster one counts. The
plain server is FastAPI with each request's forward pass on the event loop. vLLM serves `/classify` with both cores
bound, without chunked prefill, in fp32.

    python benchmarks/serving.py [preferences.jsonl] [rows] [minutes of overload, 0 for none]
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

PREFERENCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "preferences" / "qa_feedback_train.jsonl"
SIZES = {"vocab_size": 8192, "hidden_size": 448, "intermediate_size": 1184, "num_layers": 7, "num_heads": 7}
MAX_LENGTH = 1024
TOKEN_BUDGET = 2048
IN_FLIGHT = 256
THREADS = 2
IDLE_REQUESTS = 50
SERVE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Ray Serve's own switches for more requests a second; they have to be set before it starts."""


def main() -> None:
    """Make model and texts, run all sides in turn, print the ratios."""
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(RUNS[sys.argv[2]](*sys.argv[3:])))
        return
    path = sys.argv[1] if len(sys.argv) > 1 else str(PREFERENCES)
    num_rows = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 10.0
    os.environ.update(SERVE)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(path, folder, num_rows)
        offline = {kind: run("offline", folder, kind) for kind in ("packed", "padded")}
        best = max(found["rows_s"] for found in offline.values())
        for kind, found in offline.items():
            print(f"offline, {kind:6}     {found['rows_s']:7.1f} rows/s, {found['tokens_s']:8,.0f} tokens/s")
        sides = {"ours": our_server, "plain FastAPI": plain_server, "vLLM": vllm_server}
        rates: dict[str, float] = {}
        for name, server in sides.items():
            with server(folder) as (url, path_):
                if name == "ours":
                    idle = asyncio.run(idle_ms(url, path_, rows[:IDLE_REQUESTS]))
                asyncio.run(load(url, path_, [f"{row} again" for row in rows[:IN_FLIGHT]]))
                found = asyncio.run(load(url, path_, rows[IDLE_REQUESTS:]))
                rates[name] = found["rows_s"]
                print(f"{name:16}    {rates[name]:7.1f} rows/s, {found['scored']} of {found['asked']} scored")
                if name == "ours":
                    alone = run("alone", folder, str(IDLE_REQUESTS))["ms"]
                    print(f"one idle request: p50 {idle:.1f} ms, its forward pass {alone:.1f} ms (at most 10 ms above)")
                    if minutes:
                        print(asyncio.run(overload(url, path_, rows, rates[name], 60 * minutes)))
    print(f"ours against offline: ratio {rates['ours'] / best:.2f} (at least 0.9 is asked)")
    print(f"ours against plain FastAPI: ratio {rates['ours'] / rates['plain FastAPI']:.2f} (at least 2 is asked)")
    print(f"ours against vLLM: ratio {rates['ours'] / rates['vLLM']:.2f} (1.5 is the aim)")


def run(mode: str, *words: str) -> dict[str, Any]:
    """What a process of its own measures."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "run", mode, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{mode} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(path: str, folder: str, num_rows: int) -> list[str]:
    """A reward model, and so many different conversations, rendered, in `<folder>/rows.json`."""
    from rayrm.models.creation import CreationConfig, create_model
    from rayrm.models.loading import load_padding_tokenizer
    from rayrm.models.reward_model import NewHead, load_reward_model
    from rayrm.models.rewarder import Rendering, load_rewarder

    pairs = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    texts = [pair[name] for pair in pairs for name in ("prompt", "chosen", "rejected")]
    settings = CreationConfig.model_validate({**SIZES, "max_length": MAX_LENGTH})
    facts = create_model(texts, settings, f"{folder}/policy")
    tokenizer = load_padding_tokenizer(f"{folder}/policy")
    network = load_reward_model(f"{folder}/policy", new_head=NewHead(0)).network
    network.config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    renderer = load_rewarder(f"{folder}/model", Rendering(max_length=MAX_LENGTH)).renderer
    rows: dict[str, None] = {}
    for pair in pairs:
        prompt: Any = [{"role": "user", "content": pair["prompt"]}]
        for name in ("chosen", "rejected"):
            rows[renderer.prompt_text(prompt) + renderer.completion_text(prompt, pair[name])] = None
    found = list(rows)[:num_rows]
    Path(folder, "rows.json").write_text(json.dumps(found))
    tokens = sum(map(len, renderer.encode_all(found))) / len(found)
    print(f"{len(found):,} rows of {tokens:.0f} tokens, a model of {facts['num_parameters']:,} parameters, fp32")
    return found


def load_model(folder: str) -> Any:
    """The rewarder of a process."""
    import torch

    from rayrm.models.rewarder import Rendering, load_rewarder

    torch.set_num_threads(THREADS)
    return load_rewarder(f"{folder}/model", Rendering(max_length=MAX_LENGTH), device="cpu")


def read_rows(folder: str) -> list[str]:
    """What `prepare` wrote."""
    rows: list[str] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def encode(rewarder: Any, rows: list[str]) -> list[Any]:
    """Rows as the service reads them."""
    from rayrm.models.readouts import Encoded

    return [Encoded(ids, [len(ids) - 1], "ok") for ids in rewarder.renderer.encode_all(rows)]


def run_offline(folder: str, kind: str) -> dict[str, Any]:
    """Rows and tokens a second of forward passes alone."""
    from rayrm.batching import token_batches

    rewarder = load_model(folder)
    if kind == "packed":
        rewarder.pack()
    rows = encode(rewarder, read_rows(folder)[IDLE_REQUESTS:])
    batches = list(token_batches([len(row.ids) for row in rows], TOKEN_BUDGET))
    rewarder.read_trees([[rows[index]] for index in batches[-1]])
    began = time.monotonic()
    for batch in batches:
        rewarder.read_trees([[rows[index]] for index in batch])
    taken = time.monotonic() - began
    return {"rows_s": len(rows) / taken, "tokens_s": sum(len(row.ids) for row in rows) / taken}


def run_alone(folder: str, num_rows: str) -> dict[str, Any]:
    """Median milliseconds of a row's forward pass, by itself."""
    rewarder = load_model(folder)
    rewarder.pack()
    rows = encode(rewarder, read_rows(folder)[: int(num_rows)])
    taken = []
    for row in rows:
        began = time.monotonic()
        rewarder.read_trees([[row]])
        taken.append(1000 * (time.monotonic() - began))
    return {"ms": median(taken)}


def run_plain(folder: str, port: str) -> dict[str, Any]:
    """A server as it is written first: a forward pass a request, on the event loop."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    app = FastAPI()

    @app.post("/classify")
    async def classify(body: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            inputs = tokenizer(body["input"], return_tensors="pt", add_special_tokens=False)
            reward = model(input_ids=inputs["input_ids"]).logits[0, 0].item()
        return {"data": [{"probs": [reward]}]}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error")
    return {}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def process(words: list[str], port: int, environment: dict[str, str] | None = None) -> Any:
    """A server in processes of its own, from when it answers until it is ended."""
    import httpx

    given = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"} | (environment or {})
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(words, env=given, stdout=output, stderr=output, start_new_session=True)
        try:
            for _ in range(300):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code < 500:
                        break
                except httpx.TransportError:
                    time.sleep(1)
                if server.poll() is not None:
                    break
            else:
                raise SystemExit(f"{words} does not answer")
            if server.poll() is not None:
                output.seek(0)
                raise SystemExit(f"{words} ended:\n{output.read()[-3000:].decode()}")
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def our_server(folder: str) -> Any:
    """The service on Ray Serve."""
    import ray
    from ray import serve

    from rayrm import cluster
    from rayrm.config import build_config
    from rayrm.serving.config import RewardService
    from rayrm.serving.reward import build_app

    port = free_port()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    cluster.connect()
    model = {"name": "m", "model": f"{folder}/model", "max_length": MAX_LENGTH, "token_budget": TOKEN_BUDGET}
    model |= {"dtype": "float32", "replicas": {"num_cpus": THREADS}}
    config = build_config(RewardService, {"models": [model], "gateway": {"auth": "none"}}, "the benchmark")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(config), name="rayrm", route_prefix="/")
        yield f"http://127.0.0.1:{port}", "/classify"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def plain_server(folder: str) -> Any:
    """`run_plain` in a process."""
    port = free_port()
    with process([sys.executable, __file__, "run", "plain", folder, str(port)], port):
        yield f"http://127.0.0.1:{port}", "/classify"


@contextmanager
def vllm_server(folder: str) -> Any:
    """vLLM's own server for pooling models."""
    port = free_port()
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{folder}/model"]
    words += ["--runner", "pooling", "--dtype", "float32", "--max-model-len", str(MAX_LENGTH)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(IN_FLIGHT)]
    words += ["--max-num-batched-tokens", str(TOKEN_BUDGET)]
    words += ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
    with process(words, port, environment):
        yield f"http://127.0.0.1:{port}", "/classify"


async def ask(client: Any, path: str, row: str) -> float | None:
    """The reward of a row, or None for a 503; anything else ends the benchmark."""
    async with client.post(path, json={"input": row, "use_activation": False}) as reply:
        if reply.status == 503:
            return None
        if reply.status != 200:
            raise SystemExit(f"{reply.status}: {(await reply.text())[:500]}")
        reward: float = (await reply.json())["data"][0]["probs"][0]
        return reward


async def load(url: str, path: str, rows: list[str]) -> dict[str, Any]:
    """Rows a second with IN_FLIGHT requests at a time."""
    import aiohttp

    limit = asyncio.Semaphore(IN_FLIGHT)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=IN_FLIGHT)) as client:

        async def one(row: str) -> float | None:
            async with limit:
                return await ask(client, path, row)

        began = time.monotonic()
        found = await asyncio.gather(*map(one, rows))
        taken = time.monotonic() - began
    scored = sum(reward is not None for reward in found)
    return {"rows_s": scored / taken, "asked": len(rows), "scored": scored}


async def idle_ms(url: str, path: str, rows: list[str]) -> float:
    """Median milliseconds of one request at a time."""
    import aiohttp

    taken = []
    async with aiohttp.ClientSession(url) as client:
        for row in rows:
            began = time.monotonic()
            await ask(client, path, row)
            taken.append(1000 * (time.monotonic() - began))
    return median(taken)


async def overload(url: str, path: str, rows: list[str], rows_s: float, seconds: float) -> str:
    """Twice the rate that the service can do, sent at a steady pace; what came back, and what the memory did."""
    import aiohttp
    import psutil

    def memory_mib() -> float:
        own = [p for p in psutil.process_iter(["cmdline"]) if "ServeReplica" in " ".join(p.info["cmdline"] or [])]
        return float(sum(p.memory_info().rss for p in own)) / 2**20

    counts = {"scored": 0, "refused": 0}
    tasks: set[asyncio.Task[None]] = set()
    memory: list[float] = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as client:

        async def one(number: int) -> None:
            # A number behind the text makes it another one, so that equal requests in flight are none.
            reward = await ask(client, path, f"{rows[number % len(rows)]} {number}")
            counts["scored" if reward is not None else "refused"] += 1

        began, number = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            if number >= 2 * rows_s * now:
                await asyncio.sleep(0.01)
                continue
            task = asyncio.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            if len(memory) < now / seconds * 10:
                memory.append(memory_mib())
        await asyncio.gather(*tasks)
    return (
        f"{seconds / 60:g} minutes at twice that rate: {number:,} sent, {counts['scored']:,} scored, "
        f"{counts['refused']:,} refused with 503, nothing else; memory of the replicas, MiB: "
        f"{', '.join(f'{each:.0f}' for each in memory)}"
    )


RUNS = {"offline": run_offline, "alone": run_alone, "plain": run_plain}
"""What runs in processes of its own, by mode."""


if __name__ == "__main__":
    main()
