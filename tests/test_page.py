"""The page, clicked through in a real Chromium, against a real server with a real model and a judge."""

import shutil

import pytest
import test_gateway as base
import test_judgements
from test_client import Server
from test_gateway import TEXTS

from rayrm.config import build_config
from rayrm.serving.config import RewardService
from rayrm.serving.gateway import make_app
from rayrm.serving.metrics import Metrics
from rayrm.serving.service import Service

replica, expected, stub, server = base.replica, base.expected, test_judgements.stub, test_judgements.server


@pytest.fixture
def address(replica, stub):
    judges = [{"name": "critic", "url": stub.url, "model": "m"}]
    models = [{"name": "small", "model": "unused"}, {"name": "twin", "model": "unused"}]
    config = build_config(RewardService, {"models": models, "judges": judges}, "the test")
    service = Service(config.directory(), {"small": replica, "twin": replica}, Metrics())
    found = Server(make_app(service, {"s3cret": "me"}))
    yield found.url
    found.stop()


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.problems.append(request.url) if address not in request.url else None)
        page.goto(address)
        yield page
        assert page.problems == []
        browser.close()


def test_answers_are_scored_side_by_side(page, expected, tmp_path):
    page.wait_for_function("document.getElementById('message').textContent.includes('valid key')")
    page.fill("#key", "s3cret")
    page.locator("#key").blur()
    page.wait_for_selector("#models input[value=critic]")
    page.check("input[value=twin]")
    page.check("input[value=critic]")
    page.fill("#prompt", "the cat")
    page.click("#more")
    for number, text in enumerate([TEXTS[0], TEXTS[1] + " xx", ""]):
        page.fill(f"textarea[aria-label='Answer {number + 1}']", text)
    page.click("#score")
    page.wait_for_selector("#verdicts summary")
    numbers = page.locator(".number").all_inner_texts()
    assert len(numbers) == 4 and numbers[0] == numbers[1] == f"{expected[0]:.3f}"
    assert "empty: there is no text" in page.locator(".answer").nth(2).inner_text()
    assert page.locator(".answer.best").count() == 1 and page.locator(".bar").count() == 4
    assert page.locator("#verdicts summary").inner_text() == "critic: answer 2 is better"
    page.locator("#verdicts summary").click()
    assert "I see." in page.locator("#verdicts p").first.inner_text()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_what_is_wrong_is_told(page):
    page.fill("#key", "wrong")
    page.click("#score")
    page.wait_for_function("document.getElementById('message').textContent.includes('no valid key')")
    assert page.locator(".number").count() == 0 and page.locator("#score").is_enabled()
