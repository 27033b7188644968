"""Figures of an evaluation, from its samples: means, bootstrap intervals, the table and the plot."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppow.lossless_ppow import FAULT, NEAR_TIE, Difference
from ppow.transcript_ppow import Acceptance

from .files import whole
from .samples import Sample

_COUNTS = ("drafted", "accepted", "gained")


def ends_in_a_loop(tokens: list[int], repeats: int = 3, longest: int = 24) -> bool:
    """Whether the last tokens are one block of at most ``longest`` tokens, ``repeats`` times in a row."""
    for size in range(1, min(longest, len(tokens) // repeats) + 1):
        if all(tokens[-size:] == tokens[-size * (r + 1) : len(tokens) - size * r] for r in range(1, repeats)):
            return True
    return False


def summarize(samples: list[Sample], resamples: int, seed: int) -> dict:
    """Figures of one prompt set, each interval [low, high] at 95%; ``samples`` counts turns and repetitions."""
    straight = [s for s in samples if not s.loops]
    return {
        "prompts": len({s.prompt for s in samples}),
        "samples": len(samples),
        "acceptance_length": acceptance_length(samples),
        "acceptance_length_95": interval(acceptance_length, resamples, seed, samples),
        "engine_acceptance_length": engine_acceptance_length(samples),
        "acceptance_length_without_loops": acceptance_length(straight) if straight else None,
        "loops": len(samples) - len(straight),
        "per_position": Acceptance(*([getattr(s, n) for s in samples] for n in _COUNTS)).per_position(),
        "tokens_per_second": rate(samples, "tokens", "seconds"),
        "plain_tokens_per_second": rate(samples, "plain_tokens", "plain_seconds"),
        "speedup": speedup(samples),
        "speedup_95": interval(speedup, resamples, seed, samples),
        "identical": sum(s.identical for s in samples),
        "near_ties": sum(not is_fault(s) and verdict(s.difference) == NEAR_TIE for s in samples),
        "faults": sum(map(is_fault, samples)),
        "reference": sum(s.reference is not None for s in samples),
        "reference_agrees": sum(s.reference == {} for s in samples),
    }


def verdict(difference: dict | None) -> str | None:
    """What a difference is, "near tie" or "fault"; None where there is none, or nothing was compared."""
    return difference["verdict"] if difference else None


def is_fault(sample: Sample) -> bool:
    """Whether an answer is not the target's own, by stock ``generate`` or by the reference."""
    return FAULT in (verdict(sample.difference), verdict(sample.reference))


def faults(title: str, samples: list[Sample]) -> list[str]:
    """A line for every fault."""
    lines = []
    for number, sample in enumerate(samples):
        for against, found in (("stock generate", sample.difference), ("the loop without drafts", sample.reference)):
            if found and found["verdict"] == FAULT:
                place = f"{title}, sample {number + 1}, prompt {sample.prompt + 1}, against {against}"
                lines.append(f"{place}: {Difference(**found)}")
    return lines


def acceptance_length(samples: Sequence[Sample]) -> float:
    """Tokens gained per verification, bonus included, pooled; 1 when nothing was verified."""
    verifications = sum(len(s.gained) for s in samples)
    return sum(sum(s.gained) for s in samples) / verifications if verifications else 1.0


def pooled(answers: Sequence[Any], count: Callable[[Any], int]) -> float:
    """``count`` of every answer over their ``verifications``, pooled; 0 when nothing was verified."""
    verifications = sum(answer.verifications for answer in answers)
    return sum(map(count, answers)) / verifications if verifications else 0.0


def engine_acceptance_length(samples: Sequence[Sample]) -> float:
    """1 + drafts accepted per verification, those behind a text's end, too: what vLLM reports of a server."""
    verifications = sum(len(s.gained) for s in samples)
    accepted = sum(sum(s.accepted if s.verified is None else s.verified) for s in samples)
    return 1 + accepted / verifications if verifications else 1.0


def rate(samples: Sequence[Any], tokens: str, seconds: str) -> float:
    """Tokens per second, the mean over samples, by the names of the two fields."""
    return sum(getattr(s, tokens) / getattr(s, seconds) for s in samples) / len(samples)


def speedup(samples: Sequence[Sample]) -> float:
    """Tokens per second with the drafter over those of stock ``generate``."""
    return rate(samples, "tokens", "seconds") / rate(samples, "plain_tokens", "plain_seconds")


def gain(samples: list[Sample], baseline: list[Sample], resamples: int, seed: int) -> dict:
    """Acceptance length over a baseline's on the same prompts, with the interval of the paired difference."""

    def difference(ours: Sequence[Sample], others: Sequence[Sample]) -> float:
        return acceptance_length(ours) - acceptance_length(others)

    return {
        "acceptance_length": difference(samples, baseline),
        "acceptance_length_95": interval(difference, resamples, seed, samples, baseline),
    }


def interval(figure: Callable[..., float], resamples: int, seed: int, *systems: Sequence[Any]) -> list[float]:
    """95% percentile bootstrap over prompts, each with all its samples; ``figure`` is given those of every system."""
    draw = random.Random(seed)
    prompts: dict[int, list[tuple[Any, ...]]] = {}
    for row in zip(*systems):
        prompts.setdefault(row[0].prompt, []).append(row)
    groups = list(prompts.values())
    drawn = ([row for group in draw.choices(groups, k=len(groups)) for row in group] for _ in range(resamples))
    values = sorted(figure(*zip(*rows)) for rows in drawn)
    return [values[int(0.025 * resamples)], values[min(resamples - 1, int(0.975 * resamples))]]


def table(results: dict) -> str:
    """The figures as a Markdown table; "-" where a figure was not measured, as of a server."""
    columns = ["prompts", "n", "acceptance length (95%)", "not looping", "plain tok/s", "drafter tok/s"]
    columns += ["speedup (95%)", "identical", "as without drafts"]
    counted = any("engine_acceptance_length" in r for r in results.values())  # not by earlier versions
    columns += ["as engines count"] * counted
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, r in results.items():
        sampled = not name.endswith("T=0")
        cells = [name, str(r["prompts"]), _with_interval(r, "acceptance_length", "")]
        cells += [_number(r, "acceptance_length_without_loops", ".2f"), _number(r, "plain_tokens_per_second", ".0f")]
        cells += [_number(r, "tokens_per_second", ".0f"), _with_interval(r, "speedup", "x")]
        cells += ["-" if sampled or "identical" not in r else identical(r), without_drafts(r)]
        cells += [_number(r, "engine_acceptance_length", ".2f")] * counted
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(figures: dict, name: str, form: str) -> str:
    value = figures.get(name)
    return "-" if value is None else format(value, form)


def _with_interval(figures: dict, name: str, unit: str) -> str:
    if name not in figures:
        return "-"
    low, high = figures[f"{name}_95"]
    return f"{figures[name]:.2f}{unit} ({low:.2f}-{high:.2f})"


def identical(figures: dict) -> str:
    """How many greedy answers are stock ``generate``'s, and what the others are: "9 of 10, 1 near tie"."""
    text = f"{figures['identical']} of {figures['samples']}"
    if ties := figures.get("near_ties"):
        text += f", {ties} near tie{'s' if ties > 1 else ''}"
    if faults := figures.get("faults"):
        text += f", **{faults} FAULT{'S' if faults > 1 else ''}**"
    return text


def without_drafts(figures: dict) -> str:
    """How many greedy answers are those of the loop without drafts: "10 of 10"."""
    compared = figures.get("reference")
    return f"{figures['reference_agrees']} of {compared}" if compared else "-"


def plot(results: dict, path: Path) -> None:
    """Per-position acceptance, one line per prompt set and temperature; without matplotlib, nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        rates = result["per_position"]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
    axes.set(xlabel="position in the window", ylabel="accepted, given all before", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
