"""Judges: 5,000 calls to an endpoint with limits, against the wall time that those limits allow at best.

The endpoint is a stub in a process of its own, which speaks OpenAI's protocol over HTTP: a call takes one second, 64
may run at once, further ones come back with 429 at once, and so does a twentieth of all calls, at random. The job's own
asking is measured, with every answer stored; the ideal is 5,000 / 64 seconds. A baseline has a plain bound of 64 calls
and the same pauses; another one halves the number of calls at every 429 and adds one a second, as TCP does with what
it loses.

    python benchmarks/judging.py [calls]
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from rayrm.evaluation import asking
from rayrm.evaluation.answers import AnswerStore, Prices
from rayrm.evaluation.asking import Asking, Call, ask_all
from rayrm.evaluation.concurrency import Limit
from rayrm.scoring.endpoint import EndpointConfig

AT_ONCE = 64
LATENCY_S = 1.0
BUSY_FRACTION = 0.05
REQUIRED = 1.2
SHORT, SHORTER = 1000, 200
"""Calls of the baselines: their ratios show in fewer, and one of them is slow."""


class Halving(Limit):
    """Half as many calls after each 429, and one more for each round without."""

    def note(self, number: int, came_back: bool) -> None:
        """Halve at once, or count towards one more."""
        if came_back:
            self._size = max(1.0, self._size / 2)
        else:
            self._size = min(float(self.most), self._size + 1 / self._size)
            self._let_in()


class Fixed(Limit):
    """As many calls as the endpoint takes, known beforehand."""

    def __init__(self, most: int) -> None:
        super().__init__(AT_ONCE)
        self._size = float(AT_ONCE)

    def note(self, number: int, came_back: bool) -> None:
        """Learn nothing."""


def main() -> None:
    """Start the stub, ask it in turn, print the ratios to the ideal wall time."""
    num_calls = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    stub = subprocess.Popen([sys.executable, __file__, "stub", str(port)])
    try:
        wait_for(port)
        print(f"{LATENCY_S:g} s a call, {AT_ONCE} at once, {BUSY_FRACTION:.0%} of all come back with 429:")
        for most in (AT_ONCE, 4 * AT_ONCE):
            report(f"ours, at most {most} at once", measure(port, num_calls, most, Limit), num_calls)
        print(f"  at most {REQUIRED:g} times the ideal is asked")
        report("baseline that knows the 64", measure(port, SHORT, AT_ONCE, Fixed), SHORT)
        report("baseline that halves at each 429", measure(port, SHORTER, 4 * AT_ONCE, Halving), SHORTER)
    finally:
        stub.terminate()
        stub.wait()


def measure(port: int, num_calls: int, most: int, limit: type[Limit]) -> tuple[float, int, int]:
    """Seconds, requests beyond the first one of each call, and calls without an answer."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 2000}], "temperature": 0.0}
    calls = {str(number): Call(str(number), lambda: body, len) for number in range(num_calls)}
    config = EndpointConfig(url=f"http://127.0.0.1:{port}/v1", model="m", max_in_flight=most)
    asking.Limit = limit  # type: ignore[attr-defined, misc]
    with tempfile.TemporaryDirectory() as folder, AnswerStore(f"{folder}/a.jsonl", Prices(None, None)) as store:
        began = time.perf_counter()
        ask_all(config, "stub", calls, store, Asking())
        return time.perf_counter() - began, store.ledger().num_retries, store.ledger().num_failures


def report(name: str, measured: tuple[float, int, int], num_calls: int) -> None:
    """Print one side."""
    seconds, num_retries, num_failures = measured
    ideal = num_calls / AT_ONCE * LATENCY_S
    told = f"{num_retries:,} calls came back, {num_failures:,} without an answer"
    print(
        f"  {name}: {num_calls:,} calls in {seconds:.1f} s, {seconds / ideal:.2f} times the ideal {ideal:.1f} s ({told})"
    )
    sys.stdout.flush()


def wait_for(port: int) -> None:
    """Wait until the stub listens."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)


def serve_stub(port: int) -> None:
    """Answer until the process ends."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    chance, running = random.Random(0), 0
    usage = {"prompt_tokens": 500, "completion_tokens": 50}

    async def chat(request: Request) -> Response:
        nonlocal running
        await request.body()
        if running >= AT_ONCE or chance.random() < BUSY_FRACTION:
            return Response("too many requests", 429)
        running += 1
        await asyncio.sleep(LATENCY_S)
        running -= 1
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": "[[A]]"}}], "usage": usage})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stub"]:
        serve_stub(int(sys.argv[2]))
    else:
        main()
