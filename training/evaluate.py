"""Measure a drafter on its target: acceptance, tokens per second, speedup over the plain target.

    ppow evaluate --target TARGET --drafter DRAFTER --prompts gsm8k --prompts-dir PROMPTS --output-dir runs/figures

With ``--baseline STAGE1`` a second drafter is measured on the same prompts, and the difference with its interval.

Protocol: batch 1, prefill included, the systems take turns prompt by prompt so that the machine's drift hits all alike,
after ``warmup`` untimed generations. Tokens are the ids produced, counted the same way on both sides (never
re-tokenised text). Tokens per second are the mean over prompts, as in Spec-Bench, and the speedup is the ratio of those
means; the acceptance length is pooled over all verifications, bonus included. Intervals are 95% bootstrap intervals
over prompts.
"""

import dataclasses
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppow import PPOWDrafter
from ppow.drafting_ppow import DraftOptions
from ppow.transcript_ppow import Acceptance

from . import provenance
from .config import DraftingConfig, EvaluateConfig
from .files import write_json
from .loading import named
from .prompts import first_turn, prompt_sets, sampling_options, turn_ids


@dataclass
class Sample:
    """One prompt answered by the plain target and with a drafter.

    Attributes:
        prompt: number of the prompt; the turns and repetitions of one prompt belong together.
        plain_tokens, plain_seconds: of stock ``generate``; tokens, seconds: with the drafter.
        gained, accepted, drafted: per verification, as in :class:`ppow.transcript_ppow.Acceptance`.
        identical: whether the ids are the same (meaningful at temperature 0 only).
        loops: whether the answer ends in an exact repetition.
    """

    prompt: int
    plain_tokens: int
    plain_seconds: float
    tokens: int
    seconds: float
    gained: list[int]
    accepted: list[int]
    drafted: list[int]
    identical: bool
    loops: bool


def main(config: EvaluateConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    prompts = prompt_sets(config.prompts, config.prompts_dir, config.limit)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # what cannot be written is better known now
    dtype = getattr(torch, config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with named("target", config.target):
        tokenizer = AutoTokenizer.from_pretrained(config.target)
        target = AutoModelForCausalLM.from_pretrained(config.target, dtype=dtype).to(device)
    drafters = []
    for option, name in (("drafter", config.drafter), ("baseline", config.baseline)):
        if name:
            with named(option, name):
                drafters.append(PPOWDrafter.from_pretrained(name, dtype=dtype).to(device))
    drafting = drafting_options(config)

    results, baseline = {}, {}
    for name, chosen in prompts.items():
        for temperature in config.temperatures:
            title = f"{name} T={temperature:g}"
            measured = measure(target, tokenizer, drafters, chosen, config, temperature, drafting, title)
            figures = [summarize(samples, config.bootstrap, config.seed) for samples in measured]
            results[title] = figures[0]
            if config.baseline:
                figures[0]["gain"] = gain(*measured, config.bootstrap, config.seed)
                baseline[title] = figures[1]
    options = [DraftOptions.resolve(GenerationConfig(**drafting), drafter.generation_config) for drafter in drafters]
    record = {"results": results, "drafting": dataclasses.asdict(options[0])}
    if config.baseline:
        record |= {"baseline": baseline, "baseline_drafting": dataclasses.asdict(options[1])}
    write_json(Path(config.output_dir) / "metrics.json", record | provenance.record("evaluate", config))
    print(table(results))
    if config.baseline:
        print(f"\nbaseline {Path(config.baseline).name}:\n{table(baseline)}\n")
        for title, result in results.items():
            low, high = result["gain"]["acceptance_length_95"]
            print(f"{title}: acceptance length {result['gain']['acceptance_length']:+.2f} ({low:+.2f} to {high:+.2f})")
    plot(results, Path(config.output_dir) / "acceptance.png")


def measure(
    target, tokenizer, drafters: list, prompts, config, temperature: float, drafting: dict, title: str
) -> list[list[Sample]]:
    """Answer every prompt (and the second turns of two-turn ones) with all systems: -> the samples of each drafter."""
    plain, ours = generation_configs(target, temperature, config.max_new_tokens, drafting)
    work = [
        (number, ids)
        for number, prompt in enumerate(prompts)
        for ids in turns(target, tokenizer, prompt, config.max_new_tokens)
    ]
    for number, ids in work[: config.warmup]:
        compare(target, drafters, number, ids, plain, ours, config.seed)
    samples = []
    for repetition in range(config.repetitions):
        for i, (number, ids) in enumerate(tqdm(work, desc=title, leave=False)):
            samples.append(compare(target, drafters, number, ids, plain, ours, config.seed + 1000 * repetition + i))
    return [list(column) for column in zip(*samples)]


def drafting_options(config: DraftingConfig) -> dict:
    """The drafting options that a command was given."""
    names = (field.name for field in dataclasses.fields(DraftOptions))
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def generation_configs(target, temperature: float, max_new_tokens: int, drafting: dict):
    """Generation configs of the plain target and of the target with a drafter."""
    settings = target.generation_config.to_diff_dict() | sampling_options(temperature)
    settings |= {"max_new_tokens": max_new_tokens}
    return GenerationConfig(**settings), GenerationConfig(**settings, **drafting, return_dict_in_generate=True)


def turns(target, tokenizer, prompt, max_new_tokens: int) -> list[torch.Tensor]:
    """Prompt ids (1, P) of every turn; a later turn follows the plain target's greedy answers to the earlier ones."""
    if len(prompt.turns) == 1:
        return [torch.tensor([first_turn(tokenizer, prompt)], device=target.device)]
    found, answers = [], []
    for number in range(len(prompt.turns)):
        found.append(torch.tensor([turn_ids(tokenizer, prompt, answers)], device=target.device))
        if number + 1 < len(prompt.turns):
            out = target.generate(found[-1], do_sample=False, max_new_tokens=max_new_tokens)
            answers.append(tokenizer.decode(out[0, found[-1].shape[1] :], skip_special_tokens=True))
    return found


def compare(target, drafters: list, prompt: int, ids, plain, ours, seed: int) -> list[Sample]:
    """One prompt: stock generate, then each drafter; -> a sample per drafter."""
    mask, samples = torch.ones_like(ids), []
    expected, plain_seconds = timed(target, seed, ids, attention_mask=mask, generation_config=plain)
    for drafter in drafters:
        out, seconds = timed(target, seed, ids, attention_mask=mask, generation_config=ours, assistant_model=drafter)
        figures = out.acceptance
        answer = out.sequences[0, ids.shape[1] :].tolist()
        sample = Sample(
            prompt,
            expected.shape[1] - ids.shape[1],
            plain_seconds,
            len(answer),
            seconds,
            figures.gained[0],
            figures.accepted[0],
            figures.drafted[0],
            torch.equal(expected, out.sequences),
            ends_in_a_loop(answer),
        )
        samples.append(sample)
    return samples


def timed(target, seed: int, ids, **arguments):
    """Generate and time it on the wall clock; -> (output, seconds)."""
    torch.manual_seed(seed)
    _synchronize(ids.device)
    started = time.perf_counter()
    out = target.generate(ids, **arguments)
    _synchronize(ids.device)
    return out, time.perf_counter() - started


def _synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ends_in_a_loop(tokens: list[int], repeats: int = 3, longest: int = 24) -> bool:
    """Whether the last tokens are one block of at most ``longest`` tokens, ``repeats`` times in a row."""
    for size in range(1, min(longest, len(tokens) // repeats) + 1):
        if all(tokens[-size:] == tokens[-size * (r + 1) : len(tokens) - size * r] for r in range(1, repeats)):
            return True
    return False


# -- figures -----------------------------------------------------------------------------------------------------------


def summarize(samples: list[Sample], resamples: int, seed: int) -> dict:
    """Figures of one prompt set, each interval [low, high] at 95%; ``samples`` counts turns and repetitions."""
    straight = [s for s in samples if not s.loops]
    return {
        "prompts": len({s.prompt for s in samples}),
        "samples": len(samples),
        "acceptance_length": acceptance_length(samples),
        "acceptance_length_95": interval(samples, acceptance_length, resamples, seed),
        "acceptance_length_without_loops": acceptance_length(straight) if straight else None,
        "loops": len(samples) - len(straight),
        "per_position": Acceptance([s.drafted for s in samples], [s.accepted for s in samples]).per_position(),
        "tokens_per_second": rate(samples, "tokens", "seconds"),
        "plain_tokens_per_second": rate(samples, "plain_tokens", "plain_seconds"),
        "speedup": speedup(samples),
        "speedup_95": interval(samples, speedup, resamples, seed),
        "identical": sum(s.identical for s in samples),
    }


def acceptance_length(samples: list[Sample]) -> float:
    """Tokens gained per verification, bonus included, pooled; 1 when nothing was verified."""
    verifications = sum(len(s.gained) for s in samples)
    return sum(sum(s.gained) for s in samples) / verifications if verifications else 1.0


def rate(samples: list[Sample], tokens: str, seconds: str) -> float:
    return sum(getattr(s, tokens) / getattr(s, seconds) for s in samples) / len(samples)


def speedup(samples: list[Sample]) -> float:
    return rate(samples, "tokens", "seconds") / rate(samples, "plain_tokens", "plain_seconds")


def gain(samples: list[Sample], baseline: list[Sample], resamples: int, seed: int) -> dict:
    """Acceptance length over a baseline's on the same prompts, with the interval of the paired difference."""

    def difference(pairs: list[tuple[Sample, Sample]]) -> float:
        ours, others = zip(*pairs)
        return acceptance_length(ours) - acceptance_length(others)

    pairs = list(zip(samples, baseline))
    return {
        "acceptance_length": difference(pairs),
        "acceptance_length_95": interval(pairs, difference, resamples, seed, prompt=lambda pair: pair[0].prompt),
    }


def interval(samples: list, figure, resamples: int, seed: int, prompt=lambda sample: sample.prompt) -> list[float]:
    """95% percentile bootstrap over prompts, each with all its samples."""
    draw, prompts = random.Random(seed), {}
    for sample in samples:
        prompts.setdefault(prompt(sample), []).append(sample)
    groups = list(prompts.values())
    drawn = ([s for group in draw.choices(groups, k=len(groups)) for s in group] for _ in range(resamples))
    values = sorted(map(figure, drawn))
    return [values[int(0.025 * resamples)], values[min(resamples - 1, int(0.975 * resamples))]]


def table(results: dict) -> str:
    """The figures as a Markdown table."""
    columns = ["prompts", "n", "acceptance length (95%)", "not looping", "plain tok/s", "drafter tok/s"]
    columns += ["speedup (95%)", "identical"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, r in results.items():
        straight, sampled = r["acceptance_length_without_loops"], not name.endswith("T=0")
        low, high = r["acceptance_length_95"]
        slow, fast = r["speedup_95"]
        lines.append(
            f"| {name} | {r['prompts']} | {r['acceptance_length']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {'-' if straight is None else f'{straight:.2f}'} | {r['plain_tokens_per_second']:.0f} "
            f"| {r['tokens_per_second']:.0f} | {r['speedup']:.2f}x ({slow:.2f}-{fast:.2f}) "
            f"| {'-' if sampled else str(r['identical']) + ' of ' + str(r['samples'])} |"
        )
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Per-position acceptance, one line per prompt set and temperature; without matplotlib, nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, result in results.items():
        rates = result["per_position"]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
    axes.set(xlabel="position in the window", ylabel="accepted, given all before", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
