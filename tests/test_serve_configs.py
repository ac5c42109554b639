"""Every file in serve_configs/ is one that Serve takes, with values that its builder takes."""

import typing
from importlib import import_module
from pathlib import Path

import pytest
import yaml

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "serve_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_serve_config_is_what_serve_and_its_builders_take(path):
    from ray.serve.schema import ServeDeploySchema

    given = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert given.applications
    for application in given.applications:
        module, _, name = application.import_path.partition(":")
        if module == "ray.serve.llm":
            from ray.serve.llm import LLMServingArgs as kind
        else:
            kind = typing.get_type_hints(getattr(import_module(module), name))["args"]
        assert kind.model_validate(application.args)
