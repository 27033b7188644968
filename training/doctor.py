"""Find why a drafter accepts less than it should, between the trainer that made it and the server that runs it.

    ppow doctor --target TARGET --drafter DRAFTER --output doctor.json

First comes what needs no forward pass: shapes, records, special tokens, the draft vocabulary, positions. Then the
target answers a few prompts greedily, some of them with this drafter, and what it drafts is read along these answers,
as given and as if the pair were put together in other ways (symptoms.py). docs/doctor.md explains the page.
"""

import dataclasses
import shlex
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

from ppow import PPOWConfig, PPOWDrafter
from ppow.drafting_ppow import DraftOptions
from ppow.target_ppow import misfits, names_another

from . import provenance
from .config import DoctorConfig
from .files import write_json
from .fingerprints import fingerprint
from .foreign_files import find_file, read_json
from .loading import is_gguf, load_model, load_tokenizer, named, place_of, positions
from .prompts import first_turn, load_prompts, prompt_sets
from .remedies import IN_ORDER, Finding, beside, command, fixed, imported_again, trained
from .samples import RESULTS
from .smollm2 import PROMPTS
from .symptoms import Case, Prompts, measure
from .target import FrozenTarget

POOR = 0.4  # share of first drafts that must stand, and 0.8 of what the drafter's own metrics.json has (ours)
METRICS = RESULTS[0]


def main(config: DoctorConfig) -> dict:
    """Examine a pair and print the page.

    Returns:
        What ``output`` is to hold: ``records``, ``figures``, ``findings`` (most important first), ``next``.

    Raises:
        ValueError: names that lead to no model or prompts, a target or drafter that ``generate`` refuses, fewer than
            two answers to draft for, an ``output`` that is a folder.
        OSError: what cannot be read or written.
    """
    if config.output and Path(config.output).is_dir():
        raise ValueError(f"--output {config.output} is a folder; name a .json file in it.")
    if config.threads:
        torch.set_num_threads(config.threads)
    records, figures, findings = examine(config)
    findings.sort(key=lambda finding: (not finding.first, -finding.gain))
    report = {"records": records, "figures": figures, "findings": [finding._asdict() for finding in findings]}
    healthy = command(config, "evaluate", "--output-dir", beside(config, "figures"))
    report["next"] = findings[0].next if findings else healthy
    print(page(report))
    if config.output:
        write_json(Path(config.output), report | provenance.record(config))
    return report


@torch.no_grad()
def examine(config: DoctorConfig) -> tuple[dict, dict, list[Finding]]:
    """What the records say, what was measured, and what is wrong, in no order."""
    with named("target", config.target):
        target_config = AutoConfig.from_pretrained(**place_of(config.target))
    with named("drafter", config.drafter):
        ours = PPOWConfig.get_config_dict(config.drafter)[0].get("model_type") == PPOWConfig.model_type
        own = PPOWConfig.from_pretrained(config.drafter) if ours else None
    if own and (wrong := misfits(target_config, own)):  # another trainer's is held against its target by the import
        words = f"The drafter was made for another target: {'; '.join(wrong)}. generate() refuses this pair."
        fresh = shlex.join(["ppow", "train", "--target", config.target, "--output-dir", "run"])
        right = command(dataclasses.replace(config, target=own.target_name_or_path or config.target), "doctor")
        found = Finding("another target", words, right if own.target_name_or_path else fresh, first=True)
        return {"shapes": "; ".join(wrong)}, {}, [found]
    sets = prompt_sets(config.data, config.prompts_dir, config.limit).values()
    prompts = [prompt for chosen in sets for prompt in chosen] or load_prompts(str(PROMPTS))[: config.limit]
    with named("target", config.target):
        tokenizer = load_tokenizer(config.target)
        model = load_model(config.target, dtype=getattr(torch, config.dtype))
    with named("drafter", config.drafter):
        drafter = PPOWDrafter.from_pretrained(config.drafter, dtype=model.dtype, target=model.config)
    records, findings, doubts = read_records(config, model.config, drafter)
    if any(finding.first for finding in findings):
        return records, {}, findings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, drafter = model.to(device), drafter.to(device).eval()
    drafter.config.target_name_or_path = None  # whatever it records, the two are tried together
    size = config.window_size or DraftOptions.resolve(drafter.generation_config).longest
    asked: Prompts = []
    for prompt in prompts:
        bare = prompt.raw_completion or tokenizer.chat_template is None
        prompt = dataclasses.replace(prompt, turns=prompt.turns[:1], raw_completion=bare)
        asked.append((first_turn(tokenizer, prompt), None if bare else prompt.turns[0]))
    with tqdm(total=5 * len(asked) + 1, leave=False) as bar:
        case = Case(config, FrozenTarget(model, []), tokenizer, drafter, size, bar)
        figures, measured = measure(case, asked, records["trained_length"])
    findings += measured
    stand, known = figures["first_draft"], records["first_drafts"]
    poor, gains = figures["draft vocabulary"]["length"], [finding.gain for finding in findings]
    if stand < max(POOR, 0.8 * min(known, default=0.0)):
        words = f"Only {stand:.0%} of its first drafts stand"
        words += f"; its own {METRICS} has {min(known):.0%} to {max(known):.0%}." if known else "."
        if doubts:
            words = f"The drafter was made for another target: {'; '.join(doubts)}. {words}"
            findings.append(Finding("another target", words, trained(config), first=True))
        elif not any(finding.first for finding in findings) and poor + max(gains, default=0.0) < 1 / (1 - POOR):
            words += " No known fault explains it: it was trained too little, or for another target of these shapes."
            findings.append(Finding("low acceptance", words, trained(config), first=True))
    return records, figures, findings


def read_records(
    config: DoctorConfig, target: PreTrainedConfig, drafter: PPOWDrafter
) -> tuple[dict, list[Finding], list[str]]:
    """What files and configurations say, the faults in them, and reasons to doubt that this is the drafter's target."""
    own, text = drafter.config, target.get_text_config(decoder=True)
    findings, doubts = [], []
    files = (find_file(config.drafter, name) for name in (METRICS, provenance.FILE))
    metrics, record = (read_json(file) if file else {} for file in files)
    parts = metrics, *(stages := provenance.stages(record))
    if names_another(target, own):
        doubts.append(f"it records {own.target_name_or_path}")
        words = f"The drafter records {own.target_name_or_path} as its target, so that generate() refuses this one."
        fix = f"drafter.config.target_name_or_path = {target._name_or_path!r}"
        findings.append(Finding("name of the target", words, fixed(config, fix)))
    recorded = [part["weights"]["target"] for part in parts if part.get("weights", {}).get("target")]
    copied = any(is_gguf(part.get("config", {}).get("target") or "") for part in parts) or is_gguf(config.target)
    here = fingerprint(config.target)
    weights = "those that it records" if here in recorded else "others than it records" if recorded else "not recorded"
    if recorded and here not in recorded and (copied or here is None):
        weights = "not comparable with those that it records (GGUF, or files of another kind)"
    elif recorded and here not in recorded:
        doubts.append(f"it records a target of other weights ({recorded[-1][:12]}) than these ({str(here)[:12]})")
    special = {name: (getattr(own, name), getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id")}
    differing = {name: pair for name, pair in special.items() if None not in pair and pair[0] != pair[1]}
    if differing:
        told = ", ".join(f"{name} {mine} instead of {theirs}" for name, (mine, theirs) in differing.items())
        fix = "; ".join(f"drafter.config.{name} = {theirs}" for name, (_, theirs) in differing.items())
        words = f"The drafter's special tokens are not the target's ({told}); a pipeline takes the two for strangers."
        findings.append(Finding("special tokens", words, fixed(config, fix)))
    room, most = own.max_position_embeddings, positions(target)
    if most and room < most:
        words = f"The drafter has {room} positions, the target {most}: after them servers draft badly or not at all."
        fix = fixed(config, f"drafter.config.max_position_embeddings = {most}")
        findings.append(Finding("positions", words, fix))
    held = own.draft_vocab_size
    try:
        drafter.check_draft_vocabulary()
    except ValueError as error:
        words = str(error).partition(";")[0] + "."
        fix = fixed(config, IN_ORDER) if int(drafter.t2d.sum()) == held else imported_again(config)
        findings.append(Finding("draft vocabulary", words, fix, first=True))
    longest = max((stage.get("config", {}).get("max_length") or 0 for stage in stages), default=0)
    greedy = [result for name, result in metrics.get("results", {}).items() if name.endswith("T=0")]
    records = {
        "shapes": f"fit: hidden size {text.hidden_size}, vocabulary {text.vocab_size}, {text.num_hidden_layers} layers",
        "the target's weights": weights,
        "special tokens": "not the target's" if differing else "the target's",
        "draft vocabulary": f"{held} of {own.vocab_size} tokens",
        "positions": f"{room}, the target's {most}" + (f"; trained up to {longest}" if longest else ""),
        "trained_length": min(longest or room, room),
        "first_drafts": [result["per_position"][0] for result in greedy if result.get("per_position")],
    }
    return records, findings, doubts


def page(report: dict) -> str:
    """What was found, for people."""
    figures, shown = report["figures"], "{:<28}{:>6.2f}  {}".format
    lines = [f"{name:<28}{value}" for name, value in report["records"].items() if isinstance(value, str)]
    if figures:
        held, far = figures["draft vocabulary"], figures["far"]
        lines += ["", f"along {figures['prompts']} answers of the target, chains of {figures['window_size']}"]
        lines += [f"{'':<28}length  chance of the first draft"]
        lines += [shown(name, way["length"], f"{way['first_draft']:.0%}") for name, way in figures["ways"].items()]
        lines += ["", f"{'greedy':<28}length  drafts 1, 2, ... that stand, given all before"]
        decoded = figures["decoding"]
        titles = {"generate": f"generate, {decoded['answers']} answers", "along the text": "along their text"}
        for name, title in titles.items():
            rates = " ".join(f"{rate:.2f}" for rate in decoded[name]["per_position"])
            lines.append(shown(title, decoded[name]["length"], rates))
        lines += [shown("ceiling", held["ceiling"], f"{held['coverage']:.0%} of the tokens can be drafted")]
        if "first_draft" in far:
            alone = f"{far['first_draft']:.2f}; in the same answers alone {far['first_draft_alone']:.2f}"
            lines += [f"{'after ' + str(far['limit']) + ' tokens':<36}{alone}"]
    lines.append("")
    for number, finding in enumerate(report["findings"], 1):
        lines += [f"{number}. {finding['fault']}: {finding['words']}", f"   Next: {finding['next']}"]
    if not report["findings"]:
        lines += ["Nothing is wrong.", f"Next: {report['next']}"]
    return "\n".join(lines)
