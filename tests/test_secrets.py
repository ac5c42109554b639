"""What stands in `.env` reaches a job's environment and nothing that the job writes or prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_reward_model import data

from rayrm.config import load_env

SECRETS = {"HF_TOKEN": "hf_that-nobody-may-read", "OPENAI_API_KEY": "sk-that-nobody-may-read"}
pairs = data


@pytest.fixture
def folder(tmp_path):
    """A working folder with secrets."""
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
    return tmp_path


def test_the_environment_wins_over_the_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    monkeypatch.setenv("OPENAI_API_KEY", "to be removed")
    monkeypatch.delenv("OPENAI_API_KEY")
    load_env()
    assert os.environ["HF_TOKEN"] == "of the environment"
    assert os.environ["OPENAI_API_KEY"] == SECRETS["OPENAI_API_KEY"]


@pytest.mark.ray
def test_secrets_stand_in_no_output(pairs, folder):
    words = [
        f"input={pairs}/preferences.parquet",
        "output=out",
        f"training.model={pairs}/policy",
        "training.max_length=96",
        "training.max_steps=4",
        "training.held_out_fraction=0.2",
        "save_steps=2",
        "log_steps=1",
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name not in SECRETS}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train_reward_model", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in Path(folder, "out").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"rayrm.json", "started.json", "metrics.jsonl"} <= names
    assert any(name.startswith("events") for name in names)
    written = [path.read_bytes() for path in files] + [(done.stdout + done.stderr).encode()]
    assert not [value for value in SECRETS.values() for text in written if value.encode() in text]
