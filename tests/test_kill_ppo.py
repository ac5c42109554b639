"""Policy training with rewards goes on when any of its roles is killed, and uses no sample twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import test_ppo
import torch
import yaml
from conftest import free_port
from safetensors.torch import load_file
from test_kills import descendants, kill_group, run_job, start_job, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
data = test_ppo.data
NUM_STEPS = 24
SAVE_STEPS = 3
KILLED = {
    "transformers": ["driver", "RolloutActor", "ScorerActor", "RayTrainWorker", "RayTrainWorker"],
    "vllm": ["RolloutActor"],
}
"""What dies in a run, one after the other, by what draws; of the two learners first the one, then the other. A vLLM
engine lives in its actor's process."""
CONFIG = Path(__file__).resolve().parents[1] / "serve_configs" / "reward.yaml"


@pytest.fixture(scope="module")
def prompts(data):
    """The prompts and the policy, and one with a head as wide as vLLM wants it on a CPU."""
    sizes = test_ppo.SIZES.model_copy(update={"num_heads": 1})
    test_ppo.create_model(["one two three good bad"] * 9, sizes, f"{data}/policy_of_one_head")
    test_ppo.teach(f"{data}/policy_of_one_head")
    return data


def words(prompts, output, engine, *more):
    """How the job is called; states are frequent enough to be killed between two."""
    return [
        f"input={prompts}/prompts.parquet",
        f"output={output}",
        "training.type=ppo",
        f"training.model={prompts}/{'policy' if engine == 'transformers' else 'policy_of_one_head'}",
        "training.chat_template=none",
        "training.max_length=64",
        "training.lr=1e-4",
        # A policy that says nothing at all would leave nothing to learn from.
        "training.too_short.then=penalise",
        "training.too_short.reward=-0.5",
        "training.global_batch_size=4",
        "training.micro_batch_size=3",
        f"training.max_steps={NUM_STEPS}",
        "training.overlap=true",
        "training.sampling.num_candidates=2",
        "training.sampling.max_tokens=12",
        f"training.rollouts.engine={engine}",
        "training.rollouts.settings.kv_cache_gib=0.25",
        "training.rollouts.workers.num_cpus=0.4",
        *(more or ["training.scorers.0.type=grammar", "training.scorers.0.workers.num_cpus=0.2"]),
        f"training.rewarding.holistic.scorer={'service' if more else 'grammar'}",
        "training.rewarding.holistic.weight=0.1",
        "workers.num_workers=2",
        "workers.num_cpus=0.5",
        "parallelism.zero_stage=2",
        f"save_steps={SAVE_STEPS}",
        "log_steps=1",
        "report_to=none",
    ]


def samples_of(output):
    return {p.name: [json.loads(line) for line in p.open()] for p in sorted(Path(output).glob("samples/*.jsonl"))}


def states(output):
    return list(Path(output).glob("state/step-*"))


def assert_equal_runs(output, expected):
    weights = [load_file(path / "model" / "model.safetensors") for path in (output, expected)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=0)
    found, wanted = samples_of(output), samples_of(expected)
    assert found == wanted and len(found) == NUM_STEPS
    ids = [sample["id"] for rows in found.values() for sample in rows]
    assert len(ids) == len(set(ids)) == NUM_STEPS * 8
    histories = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (output, expected)]
    for found, wanted in zip(*(test_ppo.without_times(history) for history in histories), strict=True):
        assert found == pytest.approx(wanted, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_goes_on_whatever_of_it_is_killed(prompts, tmp_path, engine):
    # Nobody disturbs this one. Resumed runs without overlap are compared in test_ppo.py.
    run_job("train_policy", words(prompts, tmp_path / "undisturbed", engine))
    disturbed = tmp_path / "disturbed"
    process = start_job("train_policy", words(prompts, disturbed, engine))
    for number, role in enumerate(KILLED[engine]):
        # Of two steps after a death, the samples may have been drawn before it.
        num_before = len(samples_of(disturbed))
        wait_for(lambda num=num_before: len(samples_of(disturbed)) >= num + 3 and states(disturbed), process)
        if role == "driver":
            kill_group(process)
            process = start_job("train_policy", words(prompts, disturbed, engine))
        else:
            victims = sorted(descendants(process, role), key=lambda victim: victim.pid)
            assert len(victims) == (2 if role == "RayTrainWorker" else 1), f"there is a {role} in the middle of it"
            victims[KILLED[engine][:number].count(role)].kill()
        assert not (disturbed / "model").exists() and len(samples_of(disturbed)) < NUM_STEPS
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert ("resuming" in output) == ("driver" in KILLED[engine])
    assert_equal_runs(disturbed, tmp_path / "undisturbed")


def serve_on(port, model, folder):
    """`serve run` on the project's config, with another model and port, on a Ray of its own."""
    values = yaml.safe_load(CONFIG.read_text())
    values["http_options"]["port"] = port
    values["applications"][0]["args"]["models"][0]["model"] = model
    (folder / "serve.yaml").write_text(yaml.safe_dump(values))
    temporary = Path("/tmp") / f"rayrm-{port}-{time.monotonic_ns()}"
    temporary.mkdir()
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(temporary), "RAYRM_API_KEYS": "me=secret"}
    command = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")]
    with open(folder / "serve.log", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def is_ready(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_run_waits_for_a_reward_server_that_was_killed(prompts, served_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYRM_API_KEY", "secret")
    port = free_port()
    server = serve_on(port, served_model, tmp_path)
    try:
        wait_for(lambda: is_ready(port), server)
        service = ["training.scorers.0.type=service", f"training.scorers.0.endpoint=http://127.0.0.1:{port}"]
        service += ["training.scorers.0.timeout_s=240", "training.scorers.0.workers.num_cpus=0.1"]
        process = start_job("train_policy", words(prompts, tmp_path / "run", "transformers", *service))
        wait_for(lambda: len(states(tmp_path / "run")) >= 2, process)
        doomed = [server.pid, *(child.pid for child in descendants(server, ""))]
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        server.wait()
        time.sleep(5)
        assert process.poll() is None and not (tmp_path / "run" / "model").exists()
        num_before = len(samples_of(tmp_path / "run"))
        server = serve_on(port, served_model, tmp_path)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(120)
        except subprocess.TimeoutExpired:
            # On a busy machine; nothing hangs on how it ends.
            for process in [*descendants(server, ""), server]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    found = samples_of(tmp_path / "run")
    assert num_before < len(found) == NUM_STEPS
    samples = [sample for rows in found.values() for sample in rows]
    # The policy is free to say nothing that could be scored.
    scored = [sample for sample in samples if sample["text"].strip()]
    assert all(sample["fault"] is None and sample["reward"] is not None for sample in scored) and scored
    ids = [sample["id"] for sample in samples]
    assert len(ids) == len(set(ids))
