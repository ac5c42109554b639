"""The job that asks judges, against an endpoint that speaks OpenAI's protocol, on a port, and fails as it is told."""

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from conftest import free_port
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs import judge_preferences
from rayrm.errors import CheckpointError, ConfigError, EvaluationError, OutputExistsError, SchemaError
from rayrm.evaluation import asking
from rayrm.evaluation.answers import Answer, AnswerStore, Prices
from rayrm.evaluation.asking import Asking, Call, ask_all
from rayrm.evaluation.cases import Case
from rayrm.evaluation.concurrency import Limit
from rayrm.evaluation.judging import Verdict, vote
from rayrm.evaluation.results import read_results, score_results
from rayrm.rows import Candidates, Preference
from rayrm.scoring.endpoint import EndpointConfig, EndpointError

ROOT = Path(__file__).resolve().parents[1]
HURRY = "asking={max_attempts: 2, max_failures_in_a_row: 5, max_busy_s: 5}"


class Stub:
    """Prefers the answer that has more of the letter x, and rates by their number; models differ by their names."""

    def __init__(self):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.reset()
        app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def reset(self):
        self.asked, self.keys, self.times = [], [], []
        self.failures, self.by_text, self.says = [], {}, {}
        self.running = self.most = 0
        self.latency, self.alive = 0.0, 10**9

    async def chat(self, request):
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        self.times.append(time.monotonic())
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.latency)
        self.running -= 1
        self.alive -= 1
        if self.alive < 0:
            return Response("", 500)
        failure = self.failures.pop(0) if self.failures else None
        failure = failure or next((f for text, f in self.by_text.items() if text in str(body["messages"])), None)
        if failure is not None:
            return Response(failure[2], failure[0], failure[1])
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return JSONResponse({"id": "x", "choices": [self.choice(body)], "usage": usage})

    def choice(self, body):
        text = self.says.get(body["model"])
        if text is None:
            counts = [part.count("x") for part in body["messages"][-1]["content"].split("[Begin of ")[1:]]
            text = f"[[{counts[0]}]]" if len(counts) == 1 else f"So. [[{'ABCDEFGH'[counts.index(max(counts))]}]]"
        return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def server():
    found = Stub()
    yield found
    found.stop()


@pytest.fixture
def stub(server):
    server.reset()
    return server


def preference(row_id, chosen, rejected, lang="en", **more):
    row = {"id": row_id, "group": f"g{row_id}", "prompt": [{"role": "user", "content": f"Which, {row_id}?"}]}
    sides = {"chosen": chosen, "rejected": rejected}
    row |= {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {**row, "lang": lang, "subset": None, **more}


def write(path, rows):
    if "candidates" in rows[0]:
        lists = {"chosen": pa.list_(pa.string()), "rejected": pa.list_(pa.string())}
        columns = {name: kind for name, kind in Candidates.columns.items() if name != "candidates"} | lists
        rows = [
            {
                **row,
                "chosen": row["candidates"][: row["num_correct"]],
                "rejected": row["candidates"][row["num_correct"] :],
            }
            for row in rows
        ]
    else:
        columns = Preference.columns | {"translated_from": pa.string()}
    known = {name: kind for name, kind in columns.items() if any(name in row for row in rows)}
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(known.items()))), path)
    return str(path)


def judge(stub, name="a", model="m", **more):
    return {"type": "endpoint", "name": name, "url": stub.url, "model": model, **more}


def run(tmp_path, rows, judges, *words, output="out"):
    out = tmp_path / output
    path = write(tmp_path / f"{output}.parquet", rows)
    judge_preferences.main([f"sets.0.input={path}", f"output={out}", f"judges={json.dumps(judges)}", HURRY, *words])
    return out


def metrics(out, name="a"):
    return json.loads((out / "metrics.json").read_text())[name]["preferences"]


def judged(out, name="a"):
    return {(row["id"], row["lang"]): row for row in pq.read_table(out / "rows" / f"{name}.parquet").to_pylist()}


# Three of four chosen answers have more of the letter x, in two languages.
ROWS = [
    preference(f"r{number}", chosen, rejected, lang)
    for lang in ("en", "de")
    for number, (chosen, rejected) in enumerate([("xx", "x"), ("xxx", "x"), ("x", "no"), ("x", "xxxx")])
]


def test_verdicts_are_credited_placed_and_paid_for_by_row(stub, tmp_path, capsys):
    out = run(tmp_path, ROWS, [judge(stub, prompt_price=2.0, completion_price=10.0)])
    found = metrics(out)
    assert (found["accuracy"], found["accuracy/de"], found["num_verdicts"], found["num_failed"]) == (0.75, 0.75, 8, 0)
    rows = judged(out)
    assert [rows[f"r{n}", "en"]["winner"] for n in range(4)] == [0, 0, 0, 1]
    assert [rows[f"r{n}", "en"]["orders"] for n in range(4)] == [rows[f"r{n}", "de"]["orders"] for n in range(4)]
    firsts = [row["orders"][0][0] == row["winner"] for row in rows.values()]
    assert found["first_place_fraction"] == sum(firsts) / 8 and found["consistent_fraction"] is None
    results = read_results(str(out)).to_pylist()
    assert {row["model_type"] for row in results} == {"Generative RM"} and {row["set"] for row in results} == {
        "preferences"
    }
    assert [row["credit"] for row in results[:4]] == [1, 1, 1, 0] and results[0]["lengths"] == [2, 1]
    assert all(row["rewards"] is None and row["benchmark"] is None for row in results)
    # Nothing tells one language from the other, so four questions answer eight rows: 400 prompt and 40 answer tokens.
    assert len(stub.asked) == 4
    ledger = json.loads((out / "run.json").read_text())["ledger"]["a"]
    assert (ledger["num_calls"], ledger["prompt_tokens"], ledger["completion_tokens"]) == (4, 400, 40)
    assert ledger["cost"] == pytest.approx((400 * 2 + 40 * 10) / 1e6)
    printed = capsys.readouterr().out
    assert "0.750" in printed and "0.0012" in printed
    again = run(tmp_path, ROWS, [judge(stub, prompt_price=2.0, completion_price=10.0)])
    assert again == out and len(stub.asked) == 4 and capsys.readouterr().out == printed


def test_both_orders_show_a_judge_that_looks_at_places(stub, tmp_path):
    stub.says["biased"] = "[[A]]"
    out = run(tmp_path, ROWS, [judge(stub), judge(stub, "b", "biased")], "judging.orders=both")
    fair, biased = metrics(out), metrics(out, "b")
    assert (fair["consistent_fraction"], fair["first_place_fraction"], fair["accuracy"]) == (1, 0.5, 0.75)
    assert (biased["consistent_fraction"], biased["first_place_fraction"]) == (0, 1)
    # A contradiction is an answer without a verdict: of no benchmark, it counts nothing.
    assert (biased["accuracy"], biased["num_no_verdict"], biased["num_verdicts"]) == (None, 8, 0)


@pytest.mark.parametrize(
    ("words", "credit"),
    [((), None), (("no_verdict=half",), 0.5), (("no_verdict=quarter",), 0.25), (("benchmark=m_reward_bench",), 0.5)],
)
def test_a_failed_call_never_counts_whatever_an_answer_without_verdict_does(stub, tmp_path, words, credit):
    rows = [preference(f"r{number}", "xx", "x", subset="hep-cpp") for number in range(4)]
    stub.by_text = {"Which, r2?": (400, {}, "too long"), "Which, r1?": (200, {}, completion("Neither."))}
    out = run(tmp_path, rows, [judge(stub)], "max_failed_fraction=0.25", *words)
    found = metrics(out)
    assert (found["num_verdicts"], found["num_no_verdict"], found["num_failed"]) == (2, 1, 1)
    # Two right ones of two, or with half a point or a quarter for the third one, of three.
    assert found["accuracy"] == pytest.approx(1 if credit is None else (2 + credit) / 3)
    rows = judged(out)
    assert (rows["r2", "en"]["status"], rows["r2", "en"]["credit"]) == ("error", None)
    assert "too long" in rows["r2", "en"]["detail"] and rows["r1", "en"]["texts"] == ["Neither."]


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_too_many_failures_stop_the_run_and_are_asked_again(stub, tmp_path):
    stub.by_text = {f"Which, r{n}?": (400, {}, "not that one") for n in (0, 1)}
    with pytest.raises(EvaluationError, match="left 50.0% of the rows without an answer.*not that one"):
        run(tmp_path, ROWS, [judge(stub)])
    assert not (tmp_path / "out/run.json").exists()
    stub.by_text, before = {}, len(stub.asked)
    out = run(tmp_path, ROWS, [judge(stub)])
    # The two answers stay, the two failures are asked again.
    assert len(stub.asked) - before == 2 and metrics(out)["accuracy"] == 0.75
    ledger = json.loads((out / "run.json").read_text())["ledger"]["a"]
    assert (ledger["num_calls"], ledger["num_failures"], ledger["num_retries"]) == (4, 0, 2)


def test_a_panel_goes_by_the_majority_of_all_its_members(stub, tmp_path):
    stub.says |= {"unsure": "Hm.", "first": "[[A]]"}
    judges = [judge(stub, "a"), judge(stub, "b", "first"), judge(stub, "c", "unsure")]
    out = run(tmp_path, ROWS, judges, "panel=[a, b, c]")
    rows, members = judged(out, "panel"), [judged(out, name) for name in "abc"]
    for key, row in rows.items():
        votes = [member[key]["winner"] for member in members]
        agree = votes[0] == votes[1]
        assert (row["winner"], row["status"]) == ((votes[0], "ok") if agree else (None, "error"))
        assert row["verdicts"] == votes and (row["credit"] is None) == (not agree)
    assert {row["status"] for row in rows.values()} == {"ok", "error"}
    results = [row for row in read_results(str(out)).to_pylist() if row["model"] == "panel"]
    assert {row["model_type"] for row in results} == {"Generative RM PoLL"} and len(results) == 8


@pytest.mark.parametrize(
    ("winners", "expected"),
    [
        ([0, 0, 1], (0, "ok", 1.0)),
        ([1, None, 1], (1, "ok", 0.0)),
        ([0, None, None], (None, "error", None)),
        ([0, 1, None], (None, "error", None)),
        ([0, 1, 2], (None, "error", None)),
        ([None] * 3, (None, "error", None)),
        ([0, 0, 1, 2, 3], (None, "error", None)),
    ],
)
def test_votes(winners, expected):
    case = Case("s", "r", "g", "en", None, 1, [], ["a", "b", "c", "d"], (None, None), None)
    found = vote(case, [Verdict(winner, "ok" if winner is not None else "timeout") for winner in winners], "half")
    assert (found.winner, found.status, found.credit) == expected


def best_of(row_id, candidates, num_correct=1, subset="Math"):
    prompt = [{"role": "user", "content": f"Best, {row_id}?"}]
    more = {"lang": "en", "subset": subset, "num_correct": num_correct}
    return {"id": row_id, "group": row_id, "prompt": prompt, "candidates": candidates, **more}


def test_four_way_judges_name_one_and_rate_where_several_are_right(stub, tmp_path):
    rows = [
        best_of("m1", ["xxxx", "x", "xx", "xxx"]),
        best_of("m2", ["x", "xx", "xxx", "xxxx"]),
        best_of("m3", ["xxxxunsure", "x", "xx", "xxx"]),
        best_of("ref:1", ["xxxxx", "x", "xx"], subset="Ties"),
        best_of("tied:1", ["xxxxxx", "xxxxx", "x", "xx"], 2, subset="Ties"),
    ]
    stub.by_text = {"unsure": (200, {}, completion("All of them."))}
    words = ("judging.kind=four_way", "benchmark=reward_bench_2", "judging.rule=reward_bench")
    out = run(tmp_path, rows, [judge(stub)], *words)
    found = judged(out)
    assert [found[name, "en"]["credit"] for name in ("m1", "m2", "m3")] == [1, 0, 0.25]
    assert [found[name, "en"]["status"] for name in ("m1", "m2", "m3")] == ["ok", "ok", "parse_error"]
    # Under the rule of RewardBench a rating is the number that ends the words, and no brackets stand behind it.
    assert (found["ref:1", "en"]["ratings"], found["tied:1", "en"]["ratings"]) == ([None] * 3, [None] * 4)
    assert {body["messages"][0]["content"][:11] for body in stub.asked} == {"You compare", "You rate th"}


def test_ties_are_rated_and_scored(stub, tmp_path):
    rows = [
        best_of("m1", ["xxxx", "x", "xx", "xxxx y"]),
        best_of("ref:1", ["xxxxx", "x", "xx"], subset="Ties"),
        best_of("tied:1", ["xxxxxx", "xxxxx", "x", "xx"], 2, subset="Ties"),
        best_of("tied:2", ["xxxxxx", " ", "x"], 1, subset="Ties"),
    ]
    out = run(tmp_path, rows, [judge(stub)], "judging.kind=rating", "benchmark=reward_bench_2")
    found = judged(out)
    # Two of four share the highest rating.
    assert (found["m1", "en"]["ratings"], found["m1", "en"]["credit"]) == ([4, 1, 2, 4], 0.5)
    assert (found["tied:1", "en"]["ratings"], found["tied:1", "en"]["credit"]) == ([6, 5, 1, 2], None)
    score = score_results(read_results(str(out)).to_pylist())
    # Gaps 3 and 3 above the spread of 1: all shares are 1, and the margin is tanh(3 - 1).
    assert score.subsets == {"Math": 0.5, "Ties": pytest.approx(1 + 0.01 * 0.9640275801)}
    assert len(stub.asked) == 4 + 3 + 4 and ("tied:2", "en") not in found and score.num_unscored == 0
    (counts,) = json.loads((out / "run.json").read_text())["rows"].values()
    assert counts["dropped"] == {"empty_content": 1}


def test_ratings_of_pairs_want_both_and_a_difference(stub, tmp_path):
    rows = [
        preference("r1", "xxx", "x"),
        preference("r2", "xx", "xx no"),
        preference("r3", "silent", "x"),
        preference("r4", "x", "xxxx"),
    ]
    stub.by_text = {"silent": (200, {}, completion(None))}
    out = run(tmp_path, rows, [judge(stub)], "judging.kind=rating", "no_verdict=half")
    found = judged(out)
    assert [found[f"r{n}", "en"]["credit"] for n in range(1, 5)] == [1, 0.5, 0.5, 0]
    assert [found[f"r{n}", "en"]["ratings"] for n in range(1, 5)] == [[3, 1], [2, 2], [None, 1], [1, 4]]
    assert [found[f"r{n}", "en"]["status"] for n in range(1, 5)] == ["ok", "ok", "parse_error", "ok"]
    assert found["r1", "en"]["orders"] == [[0], [1]]
    assert [row["rewards"] for row in read_results(str(out)).to_pylist()][2] == [None, 1.0]


def test_the_judge_sees_all_turns_and_is_told_the_languages(stub, tmp_path):
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Translate this.")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    rows = [
        preference("r1", "xx", "x", "de", prompt=prompt, src_lang="en", tgt_lang="de"),
        preference("r2", "xx", "x", "fr", prompt=prompt, src_lang=None, tgt_lang=None),
        preference("r3", "xx", "x", "it", prompt=prompt, src_lang="en", tgt_lang="de", translated_from="en"),
    ]
    run(tmp_path, rows, [judge(stub, max_in_flight=1)], "tell_languages=true", "judging.kind=rating")
    system = {
        body["messages"][0]["content"].partition("conversation is in ")[2].partition(".")[0] for body in stub.asked
    }
    assert system == {"English", "French", "Italian"}
    assert "answer is in German." in stub.asked[0]["messages"][0]["content"]
    assert "user: Hello\nassistant: Hi\nuser: Translate this." in stub.asked[0]["messages"][1]["content"]


def test_ties_of_two_languages_and_sets_are_scored_apart(stub, tmp_path):
    paths = []
    for lang, answers in (("en", ["xxxx", "x", "xx", "y"]), ("de", ["x", "xxxx", "xx", "y"])):
        rows = [best_of("m1", answers), best_of("ref:1", ["xxxxx", "x"], subset="Ties")]
        rows.append(best_of("tied:1", ["xxxxxx", "xxxxx", "x"], 2, subset="Ties"))
        paths.append(write(tmp_path / f"{lang}.parquet", [{**row, "lang": lang} for row in rows]))
    given = {"judges": [judge(stub)], "sets": [{"input": path} for path in paths], "output": str(tmp_path / "out")}
    words = ["judging.kind=four_way", "benchmark=reward_bench_2", HURRY]
    judge_preferences.main([*(f"{name}={json.dumps(value)}" for name, value in given.items()), *words])
    found = metrics(tmp_path / "out")
    # Of several languages the score is that of those that are not English.
    assert found["sections"]["Math"] == 0 and found["accuracy/en"] == 1 and found["accuracy/de"] == 0
    flat = json.loads((tmp_path / "out" / "exports" / "eng_Latn" / "eval-set" / "a.json").read_text())
    assert flat["Math"] == 1 and flat["Ties"] > 0.9


def test_halves_of_characters_and_judges_that_are_cut_short(stub, tmp_path):
    half, cut = completion("So \ud83d. [[A]]"), json.loads(completion(None))
    cut["choices"][0]["finish_reason"] = "length"
    stub.by_text = {"Which, r0?": (200, {}, half), "Which, r1?": (200, {}, json.dumps(cut))}
    out = run(tmp_path, ROWS, [judge(stub)], "no_verdict=half", "max_failed_fraction=1")
    told = {key[0]: row for key, row in judged(out).items()}
    assert told["r0"]["texts"][0].startswith("So ?") and told["r0"]["status"] == "ok"
    # It thought too long, and has said nothing that half a point could be for.
    assert (told["r1"]["status"], told["r1"]["credit"]) == ("error", None)
    assert "finish_reason length" in told["r1"]["detail"]


def test_the_request_is_as_the_endpoint_wants_it(stub, tmp_path):
    request = "judging.request={max_tokens: null, max_completion_tokens: 99, temperature: 1}"
    run(tmp_path, ROWS[:1], [judge(stub)], request, "judging.system_prompt=false")
    (body,) = stub.asked
    assert "max_tokens" not in body and (body["max_completion_tokens"], body["temperature"]) == (99, 1)
    assert [turn["role"] for turn in body["messages"]] == ["user"]
    assert "compare two answers" in body["messages"][0]["content"] and "Which, r0?" in body["messages"][0]["content"]


def test_an_endpoint_that_will_have_no_request_is_soon_left_alone(stub, tmp_path):
    stub.by_text = {"Which": (400, {}, "no such parameter")}
    rows = [preference(f"r{n}", "xx", "x") for n in range(80)]
    with pytest.raises(EvaluationError, match="no answer to 5 calls in a row.*no such parameter"):
        run(tmp_path, rows, [judge(stub, max_in_flight=1)])
    assert len(stub.asked) < 10


def test_templates_that_cannot_be_filled_in_are_refused(tmp_path, stub):
    for text, told in (
        ("{% if %}\n=====\n", "cannot be filled in"),
        ("a\n=====\n{{ answer }}", "'answer' is undefined"),
    ):
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(ConfigError, match=told):
            run(tmp_path, ROWS, [judge(stub)], f"judging.template={tmp_path}/own.jinja")


def test_rows_that_nobody_can_compare_are_counted_and_not_asked_about(stub, tmp_path):
    rows = [preference("r1", "xx", "x"), preference("r2", " ", "x"), preference("r3", "x", "x"), ROWS[0]]
    out = run(tmp_path, rows, [judge(stub)], "no_verdict=half")
    found = metrics(out)
    assert (found["num_rows"], found["num_not_asked"], found["num_failed"], found["accuracy"]) == (2, 0, 0, 1)
    (counts,) = json.loads((out / "run.json").read_text())["rows"].values()
    assert counts["dropped"] == {"empty_content": 1, "identical_responses": 1}
    same = best_of("m1", ["xxxx", "x", "xxxx", "xxx"])
    out = run(tmp_path, [same, best_of("m2", ["xx", "x"])], [judge(stub)], "judging.kind=four_way", output="lists")
    told = {key[0]: (row["status"], row["credit"], row["detail"]) for key, row in judged(out).items()}
    assert told["m1"] == ("error", None, "a right and a wrong answer are the same") and told["m2"][0] == "ok"
    assert metrics(out)["num_not_asked"] == 1


def test_results_do_not_hang_on_how_many_calls_run_at_once(stub, tmp_path):
    stub.latency = 0.005
    texts = ["x" * (n % 5 + 1) for n in range(60)]
    rows = [preference(f"r{n}", text + "y", "xxx") for n, text in enumerate(texts)]
    outs = []
    for most in (1, 32):
        stub.most = 0
        outs.append(run(tmp_path, rows, [judge(stub, max_in_flight=most)], "judging.orders=both", output=f"out{most}"))
        assert stub.most <= most and (stub.most > 8) == (most == 32)
    one, many = (judged(out) for out in outs)
    assert one == many and metrics(outs[0]) == metrics(outs[1])
    assert len({tuple(row["orders"][0]) for row in one.values()}) == 2


def test_a_killed_run_goes_on_and_asks_nothing_twice(stub, tmp_path):
    stub.latency = 0.05
    rows = [preference(f"r{n}", "x" * (n % 3 + 1), "xx no") for n in range(120)]
    path, out = write(tmp_path / "rows.parquet", rows), tmp_path / "out"
    words = [f"sets.0.input={path}", f"output={out}", f"judges={json.dumps([judge(stub, max_in_flight=4)])}"]
    command = [sys.executable, "-m", "jobs.judge_preferences", *words]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = out / "answers/a.jsonl"
    while first.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < 40):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # A kill may cut the line that is being written.
    whole = answers.read_bytes()
    answers.write_bytes(whole + b'{"key": "to')
    num_stored = whole.count(b"\n")
    time.sleep(0.2)
    before = Counter(body["messages"][1]["content"] for body in stub.asked)
    assert 40 <= num_stored < 120 and len(before) - num_stored <= 4
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    after = Counter(body["messages"][1]["content"] for body in stub.asked)
    # Only what was on its way when the run was killed is asked a second time.
    twice = [text for text, num in after.items() if num > 1]
    assert len(after) == 120 and len(twice) <= 4 and sum(after.values()) == 120 + len(twice)
    assert metrics(out)["num_verdicts"] == 120
    # Rows have one, two or three x against two: a third is right, and equal ones go to the first place.
    firsts = [row for row in judged(out).values() if int(row["id"][1:]) % 3 == 1]
    assert all(row["winner"] == row["orders"][0][0] for row in firsts)


def test_a_busy_endpoint_is_asked_again_when_it_says(stub, tmp_path):
    stub.failures = [(429, {"retry-after": "0.4"}, "slow down"), (503, {}, "")]
    out = run(tmp_path, ROWS[:1], [judge(stub)])
    assert metrics(out)["num_verdicts"] == 1 and len(stub.asked) == 3
    assert stub.times[1] - stub.times[0] >= 0.4 and stub.times[2] - stub.times[1] >= 0.5
    (line,) = (out / "answers/a.jsonl").read_text().splitlines()
    assert json.loads(line)["attempts"] == 3
    assert json.loads((out / "run.json").read_text())["ledger"]["a"]["num_retries"] == 2


def test_an_endpoint_that_dies_stops_the_run_which_goes_on_later(stub, tmp_path):
    rows = [preference(f"r{n}", "xx", "x") for n in range(60)]
    stub.alive = 20
    with pytest.raises(EvaluationError, match="gave no answer to 5 calls in a row .*500.*the same command goes on"):
        run(tmp_path, rows, [judge(stub, max_in_flight=4)])
    kept = [json.loads(line) for line in (tmp_path / "out/answers/a.jsonl").read_text().splitlines()]
    assert sum(line["status"] == "ok" for line in kept) == 20 and len(stub.asked) < 50
    stub.alive, before = 10**9, len(stub.asked)
    out = run(tmp_path, rows, [judge(stub, max_in_flight=4)])
    assert len(stub.asked) - before == 40 and metrics(out)["accuracy"] == 1


def test_an_endpoint_that_is_not_there_is_one_clear_sentence(stub, tmp_path):
    gone = judge(stub) | {"url": f"http://127.0.0.1:{free_port()}/v1"}
    rows = [preference(f"r{n}", "xx", "x") for n in range(8)]
    with pytest.raises(EvaluationError, match="Judge 'a' gave no answer to 5 calls in a row .*connection"):
        run(tmp_path, rows, [gone])


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("<html>Bad gateway</html>", "error"),
        ("", "error"),
        ("[1, 2]", "error"),
        ('{"choices": []}', "error"),
        ('{"choices": [{"message": {"content": ["x"]}}]}', "error"),
        (completion(""), "parse_error"),
        (completion(None), "parse_error"),
        (completion("I like both."), "parse_error"),
        (completion("[[A]] or [[B]]"), "parse_error"),
    ],
)
def test_nonsense_is_an_error_and_words_without_a_verdict_are_none(stub, tmp_path, said, status):
    stub.by_text = {"Which": (200, {}, said)}
    out = run(tmp_path, ROWS[:2], [judge(stub)], "max_failed_fraction=1", "no_verdict=half")
    assert {row["status"] for row in judged(out).values()} == {status}
    assert metrics(out)["accuracy"] == (0.5 if status == "parse_error" else None)
    assert len(stub.asked) == (2 if status == "parse_error" else 4)


def test_an_endpoint_without_probabilities_is_not_asked_for_them_again_and_again(stub, tmp_path):
    rows = [preference(f"r{n}", "xx", "x") for n in range(30)]
    with pytest.raises(EvaluationError, match="does not answer what it was asked: .*logprobs"):
        run(tmp_path, rows, [judge(stub, max_in_flight=1)], "judging.method=labels")
    assert len(stub.asked) == 5


def test_a_benchmark_has_its_score_and_a_file_for_each_language(stub, tmp_path):
    rows = [preference(f"r{n}", "xx", "x" * (1 + 2 * (n == 2)), "de", subset="xstest-should-respond") for n in range(3)]
    run(tmp_path, rows, [judge(stub, name=name) for name in "abc"], "benchmark=m_reward_bench", "panel=[a, b, c]")
    folder = tmp_path / "out/exports/deu_Latn"
    assert sorted(path.name for path in folder.iterdir()) == [
        "PoLL___a_b_c-deu_Latn.json",
        *(f"{name}-deu_Latn.json" for name in "abc"),
    ]
    found = json.loads((folder / "a-deu_Latn.json").read_text())
    assert found["scores"] == {"accuracy": pytest.approx(2 / 3), "num_correct": 2, "num_total": 3, "results": [1, 1, 0]}
    assert found["leaderboard"]["Safety"] == pytest.approx(2 / 3) and found["subset"]["model_type"] == "Generative RM"
    assert metrics(tmp_path / "out")["sections"]["Safety"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["judges=[]"], "judges"),
        (["panel=[a, b]"], "an odd number of different judges, 3 or more; found a, b"),
        (["panel=[a, a, b]"], "different judges"),
        (["panel=[a, b, z]"], "the panel names 'z', and the judges are a, b, c"),
        (["panel=[a, b, c]", "judging.kind=rating"], "ratings name none"),
        (["judges.1.name=a"], "several judges are called a"),
        (["judges.1.name=panel"], "several judges are called panel"),
        (["judges.1.name=../a"], "judges.1"),
        (["judges.1.type=other"], "judges.1.type"),
        (["judging.template=nowhere"], "none of four_way, pairwise, rating"),
        (["judges.0.key_variable=NO_SUCH_KEY"], "NO_SUCH_KEY holds none"),
        (["output=memory://out"], "cannot append to files"),
        (["sets.0.input=nowhere"], "nothing at"),
    ],
)
def test_bad_configs_are_one_sentence(stub, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, ROWS, [judge(stub, name=name) for name in "abc"], *words)
    assert not stub.asked and not (tmp_path / "out").exists()


def test_bad_rows_are_one_sentence(stub, tmp_path):
    with pytest.raises(SchemaError, match="no columns chosen and rejected, or messages"):
        run(tmp_path, [{"id": "a", "prompt": []}], [judge(stub)])
    with pytest.raises(ConfigError, match="judging.kind is 'pairwise', and the sets hold best_of rows"):
        run(tmp_path, [best_of("m1", ["xx", "x"])], [judge(stub)], output="other")
    with pytest.raises(EvaluationError, match="No subset of reward_bench was measured"):
        run(tmp_path, ROWS, [judge(stub)], "benchmark=reward_bench", output="fourth")
    with pytest.raises(CheckpointError, match="no model at"):
        local = {"type": "local", "name": "l", "model": str(tmp_path / "none")}
        run(tmp_path, ROWS, [local], output="third")
    assert not stub.asked


def test_other_judging_into_the_same_output_is_refused_and_other_speed_is_not(stub, tmp_path):
    out = run(tmp_path, ROWS, [judge(stub)])
    assert run(tmp_path, ROWS, [judge(stub, max_in_flight=2)], "max_failed_fraction=0.5") == out
    with pytest.raises(OutputExistsError, match="judging.orders"):
        run(tmp_path, ROWS, [judge(stub)], "judging.orders=both")


def test_keys_stand_in_no_file(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "secret-1234")
    stub.by_text = {"Which, r1?": (401, {}, "no such key: secret-1234")}
    words = [judge(stub, key_variable="THEIR_KEY")], "max_failed_fraction=0.5"
    out = run(tmp_path, ROWS, *words)
    assert set(stub.keys) == {"Bearer secret-1234"} and metrics(out)["num_failed"] == 2
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files and not any(b"secret-1234" in path.read_bytes() for path in files)


def test_answers_survive_torn_and_broken_lines(tmp_path):
    path = str(tmp_path / "answers/a.jsonl")
    reply = {
        "id": "x",
        "choices": [{"message": {"content": "é"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    with AnswerStore(path, Prices(1e6, 1e6)) as store:
        store.add(Answer("k1", "ok", reply, None, 2, 0.5))
        store.add(Answer("k2", "timeout", None, "late", 6, 1.0))
        assert store.find("k1").reply == {"choices": reply["choices"], "usage": reply["usage"]}
        with pytest.raises(ConfigError, match="Another run writes to"), AnswerStore(path, Prices(None, None)):
            pass
    with open(path, "ab") as handle:
        handle.write(b'nonsense\n{"key": "k3", "sta')
    with AnswerStore(path, Prices(1e6, 1e6)) as store:
        assert store.is_answered("k1") and not store.is_answered("k2") and store.find("k3") is None
        # 1 more request for k1 and 5 for k2; 3 + 2 tokens at 1 each.
        assert store.ledger() == (2, 1, 6, 3, 2, 0, 5.0)
        store.add(Answer("k2", "ok", {"choices": []}, None, 1, 0.1))
        # The second round of k2 is one more request, and it has no usage, so that nobody knows the cost.
        assert store.ledger() == (2, 0, 7, 3, 2, 1, None)
    assert Path(path).read_bytes().endswith(b"\n") and b'"k3"' not in Path(path).read_bytes()


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in which seconds pass at once."""

    def __init__(self):
        super().__init__()
        self.now, select = 0.0, self._selector.select

        def skip(timeout=None):
            self.now += timeout or 0
            return select(0)

        self._selector.select = skip

    def time(self):
        return self.now


class SlowEndpoint:
    """Takes a second for an answer and 64 requests at once; further ones and a twentieth of all come back."""

    num_sent = most = running = 0

    def __init__(self, config, name):
        self.random = random.Random(0)

    async def try_once(self, path, body, timeout_s):
        cls = type(self)
        cls.num_sent += 1
        if cls.running >= 64 or self.random.random() < 0.05:
            raise EndpointError("busy.", "busy")
        cls.running += 1
        cls.most = max(cls.most, cls.running)
        await asyncio.sleep(1.0)
        cls.running -= 1
        return json.loads(completion("[[A]]"))

    async def close(self):
        pass


@pytest.mark.parametrize("most", [64, 128, 1000])
def test_five_thousand_calls_take_no_more_than_a_fifth_above_the_ideal(tmp_path, monkeypatch, most):
    seconds = []

    def run_virtually(work):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(work)
            seconds.append(runner.get_loop().time())

    endpoint = type("Endpoint", (SlowEndpoint,), {})
    monkeypatch.setattr(asking, "Endpoint", endpoint)
    monkeypatch.setattr(asking.asyncio, "run", run_virtually)
    random.seed(0)
    calls = {str(number): Call(str(number), dict, len) for number in range(5000)}
    with AnswerStore(str(tmp_path / "a.jsonl"), Prices(None, None)) as store:
        ask_all(EndpointConfig(url="http://x", model="m", max_in_flight=most), "a", calls, store, Asking())
        assert store.ledger().num_failures == 0 and len(store._lines) == 5000
    assert 5000 / 64 <= seconds[0] <= 1.2 * 5000 / 64
    assert endpoint.most == 64 and endpoint.num_sent < 1.3 * 5000


def test_the_limit_tells_chance_from_too_many():
    limit = Limit(1000)

    async def play(num_back):
        """One round, of which so many come back."""
        size = limit.size
        numbers = [await limit.enter() for _ in range(size)]
        for place, number in enumerate(numbers):
            limit.note(number, place < num_back)
            limit.leave()
        return limit.size

    async def rounds():
        # One of 16 and three of 32 are chance; sizes double until the first round of which too many come back.
        assert [await play(1), await play(3), await play(2)] == [32, 64, 128]
        assert await play(100) == 64
        assert await play(14) == 57
        assert await play(0) == 63
        for _ in range(40):
            await play(limit.size)
        assert limit.size == 1

    asyncio.run(rounds())
    assert limit.in_flight == 0


def test_places_are_given_in_order_and_never_too_many():
    limit, running, most, order = Limit(3), 0, 0, []

    async def one(number):
        nonlocal running, most
        await limit.enter()
        running += 1
        most = max(most, running)
        order.append(number)
        await asyncio.sleep(0)
        running -= 1
        limit.leave()

    async def all_of_them():
        tasks = [asyncio.create_task(one(number)) for number in range(20)]
        await asyncio.sleep(0)
        tasks[10].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    assert most == 3 and order == [n for n in range(20) if n != 10] and limit.in_flight == 0


@pytest.mark.api
def test_an_outside_endpoint_judges(tmp_path):
    """RAYRM_TEST_API_URL, RAYRM_TEST_API_MODEL and RAYRM_TEST_API_KEY name the endpoint, which is paid for."""
    missing = [name for name in ("URL", "MODEL", "KEY") if not os.environ.get(f"RAYRM_TEST_API_{name}")]
    if missing:
        pytest.skip(f"the environment lacks {', '.join(f'RAYRM_TEST_API_{name}' for name in missing)}")
    outside = {
        "type": "endpoint",
        "name": "outside",
        "url": os.environ["RAYRM_TEST_API_URL"],
        "model": os.environ["RAYRM_TEST_API_MODEL"],
        "key_variable": "RAYRM_TEST_API_KEY",
    }
    rows = [preference("r1", "The capital of France is Paris.", "The capital of France is Rome.")]
    rows[0]["prompt"][0]["content"] = "What is the capital of France?"
    out = run(tmp_path, rows, [outside], "judging.orders=both")
    assert metrics(out, "outside")["accuracy"] == 1


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_local_model_is_brought_up_and_taken_down(tmp_path, shared_data):
    """In a process of its own, with a Ray of its own, on real questions and answers."""
    from rayrm.models.creation import CreationConfig, create_model

    source = shared_data / "preferences/qa_feedback_test.jsonl"
    if not source.exists():
        pytest.skip(f"there is no {source}")
    found = [json.loads(line) for line in itertools.islice(source.open(encoding="utf-8"), 4)]
    rows = [preference(row["id"], row["chosen"], row["rejected"]) for row in found]
    path = write(tmp_path / "rows.parquet", rows)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
    settings = CreationConfig.model_validate({**sizes, "max_length": 4096})
    create_model(["which answer is better, A or B? say why"], settings, str(tmp_path / "model"))
    local = {"type": "local", "name": "small", "model": str(tmp_path / "model"), "engine": {"max_model_len": 4096}}
    words = [
        f"sets.0.input={path}",
        f"output={tmp_path}/out",
        f"judges={json.dumps([local])}",
        "judging.method=constrained",
    ]
    temporary = Path("/tmp") / f"rayrm-{free_port()}"
    temporary.mkdir()
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.judge_preferences", *words, "judging.orders=both"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    judged_rows = judged(tmp_path / "out", "small")
    assert len(judged_rows) == 4 and {row["status"] for row in judged_rows.values()} == {"ok"}
    assert all(sorted(row["orders"]) == [[0, 1], [1, 0]] for row in judged_rows.values())
    ledger = json.loads((tmp_path / "out/run.json").read_text())["ledger"]["small"]
    assert ledger["num_calls"] == 8 and ledger["prompt_tokens"] > 800 and ledger["cost"] is None
