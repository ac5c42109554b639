"""Requests that a machine makes up from the OpenAPI description: none of them may break the server."""

from contextlib import suppress

import pytest
import schemathesis
import test_gateway as base
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from rayrm.config import build_config
from rayrm.serving.config import RewardService
from rayrm.serving.gateway import make_app
from rayrm.serving.metrics import Metrics
from rayrm.serving.service import Service

replica = base.replica


@pytest.fixture(scope="module")
def api(replica):
    """The description of the whole application; its judge is an address where nobody listens."""
    judge = {"name": "judge", "url": "http://127.0.0.1:9/v1", "model": "m"}
    gateway = {"auth": "none", "deadline_s": 0.2}
    values = {"models": [{"name": "small", "model": "unused"}], "judges": [judge], "gateway": gateway}
    config = build_config(RewardService, values, "the test")
    return schemathesis.openapi.from_asgi(
        "/openapi.json", make_app(Service(config.directory(), {"small": replica}, Metrics()), {})
    )


def check(case):
    reply = case.call()
    assert reply.status_code < 500 or reply.status_code == 503, case.as_curl_command()
    if reply.status_code >= 400 and reply.content:
        assert reply.json()["error"]["code"] == reply.status_code and reply.json()["error"]["message"]
    if reply.status_code == 503 and case.path != "/ready":
        assert int(reply.headers["retry-after"][0]) >= 1


def try_all(strategy):
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=strategy)
    def run(case):
        check(case)

    run()


def test_no_request_breaks_the_server(api):
    seen = set()
    for found in api.get_all_operations():
        operation = found.ok()
        seen.add(operation.path)
        try:
            try_all(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        except Unsatisfiable:
            print("UNSAT", operation.method, operation.path)
            raise
        # Where anything is valid, nothing is invalid.
        with suppress(Unsatisfiable):
            try_all(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    assert {"/v1/rewards", "/get_reward", "/classify", "/v1/judgements", "/tokenize", "/v1/models/{name}"} <= seen
