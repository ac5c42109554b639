"""The sections of the page of a policy training with rewards: figures, and tables of rewards and of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayrm.evaluation.policy_figures import Line, draw_changes, draw_lines, draw_stack
from rayrm.evaluation.policy_run import PolicyRun, Series
from rayrm.evaluation.report import Block, Figure, Figures, Section, Table, Text

MAX_LINES = 8
"""Languages that have a line each by step; more of them have their start and end only."""
PHASES = {
    "draw": "drawing",
    "score": "scoring",
    "wait": "waiting",
    "prepare": "preparing",
    "learn": "learning",
    "push": "handing over weights",
}
"""What the seconds of a step are called."""
NONE = "–"


def build_sections(run: PolicyRun) -> list[Section]:
    """The sections that the run has numbers for."""
    found = [
        Section("Reward", _reward(run)),
        Section("Held-out reward by language", _by_language(run)),
        Section("Divergence and entropy", _divergence(run)),
        Section("Drift between sampler and learner", _drift(run)),
        Section("What was left out", _left_out(run)),
        Section("What the texts are like", _text(run)),
        Section("Critic", _critic(run)),
        Section("Where the time goes", _time(run)),
    ]
    return [section for section in found if section.blocks]


def _reward(run: PolicyRun) -> list[Block]:
    whole = _lines(run, {"reward": "training"}) + _lines(run, {"reward": "held out"}, is_held_out=True)
    lengths = [f"length/{name}" for name in ("short", "middle", "long")]
    figures = [
        *_figure(whole, "reward", "Reward", "The mean over the completions that are learned from."),
        *_figure(
            _lines(run, {f"reward/{name}": name.removeprefix("length/") for name in lengths}),
            "reward",
            "Reward by length",
            "Of the shortest, the middle and the longest third of each step's completions. Lines that part say that the "
            "scorers pay for length.",
        ),
        *_figure(
            _lines(run, {f"score/{name}": name for name in run.names("score/")}),
            "part of the reward",
            "Parts of the reward",
            "What each scorer adds, behind a gate what it would add to an open one.",
        ),
        *_figure(
            _lines(run, {"gate_open_fraction": "training"})
            + _lines(run, {"gate_open_fraction": "held out"}, is_held_out=True),
            "share",
            "Open gates",
            "Share of completions whose holistic score lets the aspects in.",
        ),
        *_languages(run),
    ]
    blocks: list[Block] = [] if len(run.held_out("reward").values) else [Text("No prompts were held out.")]
    return blocks + _together(figures)


def _languages(run: PolicyRun) -> list[Figure]:
    if len(run.languages) < 2:
        return []
    if len(run.languages) <= MAX_LINES:
        lines = _lines(run, {f"reward/{name}": name for name in run.languages})
        return _figure(lines, "reward", "Reward by language", "In training.")
    found = {name: run.series(f"reward/{name}") for name in run.languages}
    there = {name: (series.start, series.end) for name, series in found.items() if len(series.values)}
    if not there:
        return []
    start, end = np.array(list(there.values()), dtype=float).T
    about = "In training; means over the first and the last tenth of a language's records."
    return [Figure(draw_changes(list(there), start, end, ("start", "end")), "Reward by language", about)]


def _by_language(run: PolicyRun) -> list[Block]:
    """The last evaluation against the first."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    rows = []
    for name, label in [("reward", "all"), *((f"reward/{lang}", lang) for lang in run.languages)]:
        before, after = first.get(name), last.get(name)
        if before is None and after is None:
            continue
        change = NONE if before is None or after is None else f"{after - before:+.3f}"
        rows.append([label, _tell(before), _tell(after), change])
    caption = (
        f"Means over the {last['num_samples']:,.0f} completions with a reward, {first['num_samples']:,.0f} in the first "
        "evaluation. Both were drawn for the same prompts with the same seeds."
    )
    header = ["language", f"step {first['step']:,}", f"step {last['step']:,}", "change"]
    return [Table(header, rows, caption)] if rows else []


def _divergence(run: PolicyRun) -> list[Block]:
    kl = run.training.get("kl", {})
    coefficients = run.series("kl_coefficient")
    is_fixed = len(set(coefficients.values.tolist())) < 2
    told = f"A nat costs {coefficients.last:.3g}." if is_fixed and coefficients.last else ""
    if is_fixed and coefficients.last == 0:
        blocks: list[Block] = [Text("No divergence from the start model was measured: its coefficient is 0.")]
        figures = []
    else:
        blocks = []
        target = {"target": kl["target"]} if kl.get("target") else {}
        figures = _figure(
            _lines(run, {"kl": "KL"}),
            "nats a completion",
            "Divergence from the start model",
            f"The mean log-ratio of completions, which is 0 at first. {told}".rstrip(),
            limits=target,
        )
    if not is_fixed:
        figures += _figure(
            _lines(run, {"kl_coefficient": "coefficient"}), "reward a nat", "What a nat costs", "It seeks the target."
        )
    limit = run.training.get("max_update_kl")
    figures += [
        *_figure(
            _lines(run, {"entropy": "entropy"}),
            "nats a token",
            "Entropy",
            "Of the policy that drew, before the update.",
        ),
        *_figure(
            _lines(run, {"clip_fraction": "policy", "value_clip_fraction": "values"}),
            "share of tokens",
            "Clipped",
            "Tokens whose ratio of new to old probabilities, or whose value, has left the range that bears a gradient.",
        ),
        *_figure(
            _lines(run, {"update_kl": "update"}),
            "nats a token",
            "Size of the updates",
            "How far a step's updates take the policy from the one that drew (k3).",
            limits={"updates end early": limit} if limit else {},
        ),
    ]
    return blocks + _together(figures)


def _drift(run: PolicyRun) -> list[Block]:
    lines = _lines(run, {"drift": "mean", "drift/max": "worst token"})
    if not lines:
        return []
    if not any((line.series.values > 0).any() for line in lines):
        return [Text("The sampler's and the learner's log-probabilities are the same to the last digit.")]
    limit = run.series("drift/limit").last
    caption = "Difference of the log-probabilities of drawn tokens, sampler against learner. A mean beyond the limit ends the run."
    drawn = draw_lines(lines, "nats a token", {"limit of the mean": limit} if limit else {}, log=True)
    return [Figures([Figure(drawn, "Drift", caption)])]


def _left_out(run: PolicyRun) -> list[Block]:
    reasons = run.names("left_out/")
    shares = {reason: run.shares(f"left_out/{reason}") for reason in reasons}
    shares = {reason: series for reason, series in shares.items() if series.values.any()}
    if not shares:
        return [Text("Every completion was learned from.")] if run.records else []
    rows = [[reason, f"{series.mean:.1%}", f"{series.end:.1%}"] for reason, series in shares.items()]
    caption = "Shares of all completions of a step. What has no score is left out; it never counts as a reward of 0."
    figure = Figure(
        draw_stack(shares, "share of completions"),
        "By reason",
        "unscored names the part of the reward and what its scorer said; alone: no other completion of the prompt is left.",
    )
    return [Table(["reason", "mean", "at the end"], rows, caption), Figures([figure])]


def _text(run: PolicyRun) -> list[Block]:
    lengths = {"completion_length": "mean", "completion_length/max": "longest"}
    figures = [
        *_figure(_lines(run, lengths), "tokens", "Length", "Of all completions of a step."),
        *_figure(
            _lines(run, {"unfinished_fraction": "training"})
            + _lines(run, {"unfinished_fraction": "held out"}, is_held_out=True),
            "share",
            "Unfinished",
            "Completions that were cut at max_tokens.",
        ),
        *_figure(
            _lines(run, {"distinct_1": "words", "distinct_2": "pairs of words"}),
            "share",
            "Different words",
            "Different words, and pairs of words, by all of those of a step. It also falls where texts get longer.",
        ),
    ]
    return _together(figures)


def _critic(run: PolicyRun) -> list[Block]:
    figures = [
        *_figure(
            _lines(run, {"explained_variance": "explained"}),
            "share of the variance",
            "Explained variance",
            "How much of the variance of the returns the values tell before they learn: 1 is all of it, 0 what a constant "
            "does.",
        ),
        *_figure(_lines(run, {"value_loss": "loss"}), "loss", "Loss of the values", "Half the squared error, clipped."),
    ]
    return _together(figures)


def _time(run: PolicyRun) -> list[Block]:
    seconds = {name: run.series(f"seconds/{name}") for name in PHASES}
    whole = run.series("step_s")
    if any(len(series.values) != len(whole.values) for series in seconds.values()) or not len(whole.values):
        return []
    overlaps = bool(run.training.get("overlap"))
    busy = {
        "learner": 1 - seconds["wait"].values / whole.values,
        "samplers": seconds["draw"].values / whole.values,
        "scorers": run.series("seconds/scorers").values / whole.values,
    }
    idle = {role: Series(whole.steps, np.clip(1 - share, 0, 1)) for role, share in busy.items()}
    if not overlaps:
        rest = seconds["wait"].values - seconds["draw"].values - seconds["score"].values
        seconds["wait"] = Series(whole.steps, np.maximum(rest, 0))
    rows = [[PHASES[name], f"{series.mean:.2f}", _percent(series, whole)] for name, series in seconds.items()]
    rows.append(["whole step", f"{whole.mean:.2f}", "100.0%"])
    caption = "Means over the steps. Scoring is what is left of it when drawing has ended. " + (
        "Both go on while the learner learns, which waits for the rest of them."
        if overlaps
        else "Waiting is what the learner waits for besides."
    )
    about = (
        "Share of a step in which each has nothing to do; of several scorers it is the mean. What is scored over HTTP "
        "counts as their work."
    )
    roles = [Line(role, series) for role, series in idle.items()]
    figures = [
        _draw_step(seconds, whole, overlaps),
        Figure(draw_lines(roles, "share of a step", top=1.02), "Idle", about),
    ]
    waits = [[role, f"{series.mean:.1%}"] for role, series in idle.items()]
    return [
        Figures(figures),
        Table(["part of a step", "seconds", "share"], rows, caption),
        Table(["who", "idle"], waits, "Means over the steps."),
    ]


def _draw_step(seconds: dict[str, Series], whole: Series, overlaps: bool) -> Figure:
    """A step's seconds, each of them once."""
    stacked, behind = seconds, None
    if overlaps:
        stacked = {name: series for name, series in seconds.items() if name not in ("draw", "score")}
        meanwhile = Series(whole.steps, seconds["draw"].values + seconds["score"].values)
        behind = Line("drawing + scoring", meanwhile)
    totals = np.sum([series.values for series in stacked.values()], axis=0)
    top, caption = None, ""
    if len(totals) > 3 and totals.max() > 3 * np.median(totals):
        top = 2 * float(np.median(totals))
        caption = "A step that starts engines, or loses an actor, reaches beyond the drawing."
    named = {PHASES[name]: series for name, series in stacked.items()}
    return Figure(draw_stack(named, "seconds", top, behind), "Seconds of a step", caption)


def _lines(run: PolicyRun, names: dict[str, str], is_held_out: bool = False) -> list[Line]:
    """The metrics that are there, by their labels."""
    found = {label: run.held_out(name) if is_held_out else run.series(name) for name, label in names.items()}
    return [Line(label, series, is_held_out) for label, series in found.items() if len(series.values)]


def _figure(
    lines: Sequence[Line], ylabel: str, title: str, caption: str, limits: dict[str, float] | None = None
) -> list[Figure]:
    """A figure of lines; none without lines."""
    return [Figure(draw_lines(lines, ylabel, limits), title, caption)] if lines else []


def _together(figures: list[Figure]) -> list[Block]:
    return [Figures(figures)] if figures else []


def _percent(series: Series, whole: Series) -> str:
    return f"{series.values.sum() / whole.values.sum():.1%}"


def _tell(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"
