"""The page of a policy training with rewards: PPO, RLOO or GRPO."""

from __future__ import annotations

from typing import Any

from rayrm import files
from rayrm.evaluation.policy_run import PolicyRun, main_reward, read_run
from rayrm.evaluation.policy_sections import build_sections
from rayrm.evaluation.policy_warnings import find_warnings
from rayrm.evaluation.report import Card, Cards, Report, Section, Text, Tile, Tone, write_report
from rayrm.runs import versions

REPORT = "report.html"
MAX_EXAMPLE_CHARS = 1200
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}


def write_policy_report(output: str) -> str:
    """Write `<output>/report.html` from what stands in the folder of a run, and give its path.

    The run may still go on, or have been stopped. Raises EvaluationError where it has measured nothing yet.
    """
    path = files.join(output, REPORT)
    write_report(path, build_report(read_run(output)))
    return path


def build_report(run: PolicyRun) -> Report:
    """The page: numbers first, what looks wrong, figures by subject, and completions of the last step."""
    warnings = find_warnings(run)
    sections = build_sections(run)
    if warnings:
        sections.insert(0, Section("What looks wrong", [Text(text) for text in warnings.values()]))
    if run.samples:
        sections.append(Section(f"Completions of step {run.samples_step:,}", [_examples(run)]))
    return Report("Policy training", _lead(run), _tiles(run, warnings), list_settings(run), sections)


def list_settings(run: PolicyRun) -> dict[str, str]:
    """What was set, in words first and then field by field; fingerprints of what was read; versions."""
    training = run.training
    found: dict[str, str] = {}
    if training:
        sampling = training.get("sampling", {})
        found = {
            "algorithm": _name(run),
            "scorers": ", ".join(f"{_scorer(each)} ({each.get('type')})" for each in training.get("scorers", [])),
            "reward": _tell_rewarding(training.get("rewarding", {})),
            "divergence": _tell_divergence(training.get("kl", {})),
            "completions": f"{sampling.get('num_candidates')} for each of {training.get('global_batch_size')} prompts a step, "
            f"at temperature {sampling.get('temperature')}, of at most {sampling.get('max_tokens')} tokens",
            "filters that the learner does not model": ", ".join(run.filters) or "none",
        }
    dotted = {f"training.{name}": str(value) for name, value in training.items()}
    others = {name: str(value) for name, value in run.config.items() if name != "training"}
    return found | run.inputs | others | dotted | versions()


def _tell_rewarding(rewarding: dict[str, Any]) -> str:
    holistic, aspects = rewarding.get("holistic"), rewarding.get("aspects", [])
    parts = [f"{part.get('weight', 1):g} · {_part(part)}" for part in [*([holistic] if holistic else []), *aspects]]
    threshold = rewarding.get("threshold")
    gate = f"; aspects count from {holistic['scorer']} ≥ {threshold:g} on" if holistic and threshold is not None else ""
    return f"{rewarding.get('type')}: {' + '.join(parts)}{gate}"


def _part(part: dict[str, Any]) -> str:
    unit, shaping = part.get("unit", "text"), part.get("shaping", "none")
    name = part["scorer"] if unit == "text" else f"{part['scorer']}.{unit}"
    return name if shaping == "none" else f"{shaping}({name})"


def _tell_divergence(kl: dict[str, Any]) -> str:
    if not kl.get("coefficient"):
        return "not counted"
    target = f", which seeks {kl['target']:g} nats a completion" if kl.get("target") else ""
    return f"a nat costs {kl['coefficient']:g}{target}; {kl.get('estimator')}, part of the {kl.get('part_of')}"


def _scorer(scorer: dict[str, Any]) -> str:
    return str(scorer.get("name") or scorer.get("type"))


def _name(run: PolicyRun) -> str:
    kind = str(run.training.get("type", ""))
    return NAMES.get(kind, kind) or "Training with rewards"


def _lead(run: PolicyRun) -> str:
    scorers = [_scorer(each) for each in run.training.get("scorers", [])]
    by = f" with rewards from {', '.join(scorers)}" if scorers else ""
    steps = f"{run.num_steps:,} step{'' if run.num_steps == 1 else 's'}"
    epochs = run.series("epoch").last
    passes = f" ({epochs:.2f} epochs)" if epochs is not None else ""
    state = "" if run.is_saved else " No model is saved yet: the run goes on, or was stopped."
    return f"{_name(run)}{by}, {steps}{passes}.{state}"


def _tiles(run: PolicyRun, warnings: dict[str, str]) -> list[Tile]:
    found = [_reward_tile(run)]
    kl, coefficient = run.series("kl"), run.series("kl_coefficient").last
    if kl.end is not None and coefficient != 0:
        cost = f", {coefficient:.3g} each" if coefficient is not None else ""
        found.append(Tile("KL at the end", f"{kl.end:.3f}", f"nats a completion{cost}", _tone("kl" in warnings)))
    entropy = run.series("entropy")
    if entropy.end is not None:
        note = f"nats a token, {entropy.start:.3f} at the start"
        found.append(Tile("Entropy", f"{entropy.end:.3f}", note, _tone("entropy" in warnings)))
    drift, limit = run.series("drift").values, run.series("drift/limit").last
    if len(drift):
        note = "nats a token" + (f", limit {limit:g}" if limit else "")
        found.append(Tile("Worst drift", f"{drift.max():.2g}", note, _tone("drift" in warnings)))
    left_out = run.series("left_out_fraction")
    if left_out.mean is not None:
        note = f"of all completions, {left_out.end:.1%} at the end"
        found.append(Tile("Left out", f"{left_out.mean:.1%}", note, _tone("left_out" in warnings)))
    length = run.series("completion_length")
    if length.end is not None:
        note = f"tokens, {length.start:.1f} at the start"
        found.append(Tile("Length", f"{length.end:.1f}", note, _tone("completion_length" in warnings)))
    return found


def _reward_tile(run: PolicyRun) -> Tile:
    held_out = run.held_out("reward")
    where, start, end = main_reward(run)
    if len(held_out.values) == 1 and end is None:
        where, start, end = "held-out", None, held_out.last
    label = "Held-out reward" if where == "held-out" else "Reward in training"
    if end is None:
        return Tile(label, "–", "nothing was rewarded")
    note = "" if start is None else f"{end - start:+.3f} from {start:.3f} at the start"
    return Tile(label, f"{end:.3f}", note)


def _tone(is_wrong: bool) -> Tone:
    return "bad" if is_wrong else "plain"


def _examples(run: PolicyRun) -> Cards:
    """The best, the middle and the worst of what was rewarded, one that was too short, and one without a score."""
    rewarded = sorted(
        (each for each in run.samples if each["reward"] is not None and each["fault"] is None),
        key=lambda each: (-each["reward"], each["id"]),
    )
    chosen: dict[str, tuple[dict[str, Any], Tone]] = {}
    if rewarded:
        chosen["best"] = (rewarded[0], "good")
    if len(rewarded) > 2:
        chosen["median"] = (rewarded[len(rewarded) // 2], "plain")
    if len(rewarded) > 1:
        chosen["worst"] = (rewarded[-1], "bad")
    for fault in ("too_short", "unscored"):
        for each in run.samples:
            if (each["fault"] or "").partition("/")[0] == fault:
                chosen.setdefault(fault.replace("_", " "), (each, "bad"))
    cards = [_card(label, sample, tone) for label, (sample, tone) in chosen.items()]
    return Cards("By reward, and what was left out", cards)


def shorten(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= MAX_EXAMPLE_CHARS else text[: MAX_EXAMPLE_CHARS - 1] + "…"


def _card(label: str, sample: dict[str, Any], tone: Tone) -> Card:
    ending = "" if sample["is_finished"] else " · unfinished"
    tokens = f"{sample['num_tokens']:,} token{'' if sample['num_tokens'] == 1 else 's'}"
    title = f"{label} · {sample['lang']} · {sample['id']} · {tokens}{ending}"
    reward = sample["fault"] or f"{sample['reward']:.3f}"
    texts: list[tuple[str, str, Tone, str]] = [
        ("prompt", shorten(sample["prompt"]), "plain", ""),
        ("completion", shorten(sample["text"]) or "(no text)", tone, reward),
    ]
    if sample["parts"]:
        parts = " · ".join(f"{name} {value:+.3f}" for name, value in sample["parts"].items())
        texts.append(("parts of the reward", parts, "plain", ""))
    return Card(title, texts)
