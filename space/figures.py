"""Figures of a visitor's own runs, defined as ``ppow evaluate`` defines them (a test compares the two).

A record is one race as plain values: ``{"label", "drafting", "window", "temperature", "identical", "systems": {name:
{"tokens", "seconds", "verdicts", "drafted", "accepted", "gained", "drafting"}}}``; ``verdicts`` say why greedy tokens
differ, ``drafting`` what ran.
"""

from dataclasses import dataclass

from race import PLAIN, Run, Settings, identical


def record(settings: Settings, runs: list[Run]) -> dict:
    """What the figures keep of a finished race."""
    systems = {}
    for run in runs:
        systems[run.name] = {"tokens": len(run.tokens), "seconds": run.seconds}
        systems[run.name]["verdicts"] = [found["verdict"] for found in run.differences]
        systems[run.name] |= {"drafted": run.drafted, "accepted": run.accepted, "gained": run.gained}
        systems[run.name]["drafting"] = run.drafting
    return {
        "label": settings.label,
        "drafting": settings.drafting,
        "window": settings.window_size if settings.drafting == "chain" else settings.tree_depth,
        "temperature": settings.temperature,
        "identical": identical(runs, settings.temperature),
        "systems": systems,
    }


@dataclass(frozen=True)
class Figures:
    """Of one system over races with one label; the acceptance length counts the bonus and is pooled."""

    races: int
    acceptance_length: float
    per_position: list[float]
    histogram: list[int]
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    identical: int
    near_ties: int
    faults: int


def summarize(records: list[dict], name: str, acceptance_class) -> Figures:
    """Pool races. ``acceptance_class`` is ``Acceptance`` of the drafter's own code, which defines its figures."""
    runs = [record["systems"][name] for record in records]
    acceptance = acceptance_class(*([run[key] for run in runs] for key in ("drafted", "accepted", "gained")))
    gained = [tokens for run in runs for tokens in run["gained"]]
    rate, plain = mean_rate(runs), mean_rate([record["systems"][PLAIN] for record in records])
    return Figures(
        len(records),
        acceptance.acceptance_length if gained else 1.0,
        acceptance.per_position(),
        [gained.count(tokens) for tokens in range(1, max(gained, default=0) + 1)],
        rate,
        plain,
        rate / plain,
        sum(bool(record["identical"]) for record in records),
        sum("near tie" in run["verdicts"] and "fault" not in run["verdicts"] for run in runs),
        sum("fault" in run["verdicts"] for run in runs),
    )


def mean_rate(runs: list[dict]) -> float:
    """Tokens per second, mean over runs."""
    return sum(run["tokens"] / run["seconds"] for run in runs) / len(runs)
