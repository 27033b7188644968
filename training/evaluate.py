"""Measure a drafter on its target: acceptance, tokens per second, speedup over the plain target, and losslessness.

    ppow evaluate --target TARGET --drafter DRAFTER --prompts gsm8k --prompts-dir PROMPTS --output-dir runs/figures

With ``--endpoint URL`` instead, a drafter that a server runs is measured by the server's own counters (``served``).
With ``--baseline STAGE1`` a second drafter is measured on the same prompts, and the difference with its interval.

Protocol: batch 1, prefill included, the systems take turns prompt by prompt so that the machine's drift hits all alike,
after ``warmup`` untimed generations. Tokens are the ids produced, counted the same way on both sides (never
re-tokenised text). Tokens per second are the mean over prompts, as in Spec-Bench, and the speedup is the ratio of those
means; the acceptance length is pooled over all verifications, bonus included: tokens that stand in the text, by which
drafters are compared, and beside it as engines count, with drafts that were accepted behind a text's end. Intervals are
95% bootstrap intervals over prompts. How it drafted is read back from what ran.

At temperature 0 every answer is compared with stock ``generate``'s, and where they part the target's own precise
scores say whether that is a near tie or a fault (``ppow.lossless_ppow``). With ``reference`` it is also compared,
untimed, with the same loop without drafts; of chains on the fast path, whose shapes never change, every token must
agree. A fault ends the command with an error, after everything was written.

Every prompt is kept in ``samples.jsonl`` as soon as it is measured; ``--resume`` goes on after the last one.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppow import PPOWDrafter
from ppow.drafting_ppow import DraftOptions, call_config, what_was_drafted
from ppow.lossless_ppow import Difference, first_difference, without_drafts

from . import provenance, served
from .config import DraftingConfig, EvaluateConfig
from .figures import ends_in_a_loop, faults, gain, plot, summarize, table
from .files import claim_folder, write_json
from .fingerprints import fingerprint
from .loading import load_model, load_tokenizer, named
from .prompts import Prompt, prompt_sets, sampling_options, turn_ids
from .samples import Sample, SampleLog

_FREE_TO_CHANGE = ("output_dir", "resume", "bootstrap")  # what the samples do not depend on


def main(config: EvaluateConfig) -> float:
    """Measure into ``config.output_dir``, which is this run's alone meanwhile.

    Returns:
        The seconds that measuring took, without loading the models, and without warming up (a server's is in it).

    Raises:
        ValueError: names that lead to no model or prompts, a folder that holds something else, a drafting option
            without effect, and, once all is written, answers at temperature 0 that are not the target's own.
        OSError: what cannot be read or written.
    """
    with claim_folder(config.output_dir):
        return served.evaluate(config) if config.endpoint else evaluate(config)


def evaluate(config: EvaluateConfig) -> float:
    """The command itself, once the output folder is this run's alone."""
    assert config.target is not None and config.drafter is not None
    if config.threads:
        torch.set_num_threads(config.threads)
    prompts = prompt_sets(config.prompts, config.prompts_dir, config.limit)
    dtype, folder = getattr(torch, config.dtype), Path(config.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with named("target", config.target):
        tokenizer = load_tokenizer(config.target)
        target = load_model(config.target, dtype=dtype).to(device)
    drafters, weights = [], {"target": fingerprint(config.target)}
    for option, name in (("drafter", config.drafter), ("baseline", config.baseline)):
        if name:
            with named(option, name):
                drafters.append(PPOWDrafter.from_pretrained(name, dtype=dtype).to(device))
            weights[option] = fingerprint(name, whole=True)
    record = provenance.record(config)
    sets, began = {}, time.perf_counter()
    with contextlib.closing(SampleLog(folder, made_with(record, weights, prompts), config.resume)) as log:
        for name, chosen in prompts.items():
            for temperature in config.temperatures:
                title = f"{name} T={temperature:g}"
                sets[title] = measure(target, tokenizer, drafters, chosen, config, temperature, title, log)

    seconds = time.perf_counter() - began - log.warming
    results, baseline = {}, {}
    for title, measured in sets.items():
        figures = [summarize(samples, config.bootstrap, config.seed) for samples in measured]
        results[title] = figures[0]
        if config.baseline:
            figures[0]["gain"] = gain(measured[0], measured[1], config.bootstrap, config.seed)
            baseline[title] = figures[1]
    ran = [drafted_by(each) for each in zip(*sets.values())]
    metrics = {"results": results, "drafting": ran[0], "weights": weights}
    if config.baseline:
        metrics |= {"baseline": baseline, "baseline_drafting": ran[1]}
    write_json(folder / "metrics.json", metrics | record)
    plot(results, folder / "acceptance.png")
    print(f"{table(results)}\n\ndrafting: {DraftOptions(**ran[0])}")
    if config.baseline:
        print(f"\nbaseline {Path(config.baseline).name}:\n{table(baseline)}\n")
        for title, result in results.items():
            low, high = result["gain"]["acceptance_length_95"]
            print(f"{title}: acceptance length {result['gain']['acceptance_length']:+.2f} ({low:+.2f} to {high:+.2f})")
    if found := [line for title, measured in sets.items() for samples in measured for line in faults(title, samples)]:
        count = sum(result["faults"] for result in (*results.values(), *baseline.values()))
        raise ValueError(
            f"{count} of these answers are NOT the target's own, and rounding does not explain it: this must not "
            f"happen; please report it with {folder / 'samples.jsonl'}.\n" + "\n".join(found[:20])
        )
    return seconds


def made_with(record: dict, weights: dict, prompts: dict[str, list[Prompt]]) -> dict:
    """What samples of one evaluation have in common, by names that a user knows."""
    texts = {title: [dataclasses.asdict(prompt) for prompt in chosen] for title, chosen in prompts.items()}
    options = {name: value for name, value in record["config"].items() if name not in _FREE_TO_CHANGE}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    common = {
        "weights": weights,
        "prompt texts": digest,
        "versions": record["versions"],
        "hardware": record["hardware"],
    }
    return options | common


def measure(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: list[PPOWDrafter],
    prompts: list[Prompt],
    config: EvaluateConfig,
    temperature: float,
    title: str,
    log: SampleLog,
) -> list[list[Sample]]:
    """Answer every prompt (and the second turns of two-turn ones) with all systems: -> the samples of each drafter.

    Raises:
        ValueError: when a drafting option had no effect, or prompts were not all drafted for in one way.
    """
    drafting = drafting_options(config)
    plain, ours = generation_configs(target, temperature, config.max_new_tokens, drafting)
    check = temperature == 0 and config.reference
    work = [(number, turn) for number, prompt in enumerate(prompts) for turn in range(len(prompt.turns))]

    @functools.lru_cache(maxsize=4)
    def ids_of(number: int) -> list[torch.Tensor]:
        return turns(target, tokenizer, prompts[number], config.max_new_tokens)

    def answer(place: int, seed: int) -> list[Sample]:
        number, turn = work[place]
        found = compare(target, drafters, number, ids_of(number)[turn], plain, ours, seed, drafting, check)
        for which, sample in enumerate(found):
            way = ways.setdefault((which, title.endswith(" T=0")), sample.drafting)
            if sample.drafting != way:
                raise ValueError(
                    f"{title}: the answer to prompt {number + 1} was drafted with {sample.drafting}, those before with "
                    f"{way}. Choose one path with --cuda-graphs or --no-cuda-graphs."
                )
        return found

    places = [
        (r * len(work) + i, i, config.seed + 1000 * r + i) for r in range(config.repetitions) for i in range(len(work))
    ]
    # by drafter and verification: sampling has a schedule of its own
    ways = {(w, name.endswith(" T=0")): s.drafting for (name, _), row in log.found.items() for w, s in enumerate(row)}
    if any(log.get(title, index) is None for index, _, _ in places):
        began = time.perf_counter()
        for place in range(min(config.warmup, len(work))):
            answer(place, config.seed)
        log.warming += time.perf_counter() - began
    for index, place, seed in tqdm(places, desc=title, leave=False):
        if log.get(title, index) is None:
            log.add(title, index, answer(place, seed))
    return [list(column) for column in zip(*(log.get(title, index) for index, _, _ in places))]


def drafted_by(sets: Sequence[Sequence[Sample]]) -> dict:
    """How one drafter drafted in all sets; "auto" where greedy and sampled answers had different schedules."""
    found = [samples[0].drafting or {} for samples in sets]
    alike = len({way.get("window_schedule") for way in found}) == 1
    return found[0] if alike else {**found[0], "window_schedule": "auto"}


def drafting_options(config: DraftingConfig) -> dict:
    """The drafting options that a command was given."""
    values = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(DraftOptions)}
    return {name: value for name, value in values.items() if value is not None}


def generation_configs(
    target: PreTrainedModel, temperature: float, max_new_tokens: int, drafting: dict
) -> tuple[GenerationConfig, GenerationConfig]:
    """Generation configs of the plain target and of the target with a drafter."""
    settings = sampling_options(temperature) | {"max_new_tokens": max_new_tokens}
    plain = call_config(target.generation_config, **settings)
    return plain, call_config(plain, **drafting, return_dict_in_generate=True)


def turns(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_new_tokens: int
) -> list[torch.Tensor]:
    """Prompt ids (1, P) of every turn; a later turn follows the plain target's greedy answers to the earlier ones."""
    found: list[torch.Tensor] = []
    answers: list[str] = []
    for number in range(len(prompt.turns)):
        found.append(torch.tensor([turn_ids(tokenizer, prompt, answers)], device=target.device))
        if number + 1 < len(prompt.turns):
            out = target.generate(found[-1], do_sample=False, max_new_tokens=max_new_tokens)
            answers.append(tokenizer.decode(out[0, found[-1].shape[1] :], skip_special_tokens=True))
    return found


def compare(
    target: PreTrainedModel,
    drafters: list[PPOWDrafter],
    prompt: int,
    ids: torch.Tensor,
    plain: GenerationConfig,
    ours: GenerationConfig,
    seed: int,
    drafting: dict,
    check: bool,
) -> list[Sample]:
    """One prompt: stock generate, then each drafter; with ``check`` also without drafts. -> a sample per drafter."""
    mask, samples = torch.ones_like(ids), []
    references: dict[DraftOptions, list[int]] = {}
    expected, plain_seconds = timed(target, seed, ids, attention_mask=mask, generation_config=plain)
    expected = expected[0, ids.shape[1] :].tolist()
    for drafter in drafters:
        out, seconds = timed(target, seed, ids, attention_mask=mask, generation_config=ours, assistant_model=drafter)
        figures, ran = out.acceptance, what_was_drafted(out, drafting)
        answer = out.sequences[0, ids.shape[1] :].tolist()
        sample = Sample(
            prompt,
            len(expected),
            plain_seconds,
            len(answer),
            seconds,
            figures.gained[0],
            figures.accepted[0],
            figures.drafted[0],
            answer == expected,
            ends_in_a_loop(answer),
            drafting={name: value for name, value in dataclasses.asdict(ran).items() if name != "accept_drafts"},
            verified=figures.verified[0] if figures.verified else None,
        )
        if not plain.do_sample:
            sample.difference = _recorded(first_difference(target, ids, answer, expected, plain))
        if check:
            if ran not in references:
                references[ran], _ = without_drafts(target, drafter, ids, ours)
            found = first_difference(target, ids, answer, references[ran], plain, exact=ran.repeats_exactly)
            sample.reference = _recorded(found) or {}
        samples.append(sample)
    return samples


def _recorded(difference: Difference | None) -> dict | None:
    """As a :class:`ppow.training.samples.Sample` keeps it."""
    return None if difference is None else dataclasses.asdict(difference)


def timed(target: PreTrainedModel, seed: int, ids: torch.Tensor, **arguments: Any) -> tuple[Any, float]:
    """Generate and time it on the wall clock; -> (output, seconds)."""
    torch.manual_seed(seed)
    _synchronize(ids.device)
    started = time.perf_counter()
    out = target.generate(ids, **arguments)
    _synchronize(ids.device)
    return out, time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
