"""The model card of a drafter: recorded facts only, and no figures of other weights."""

import dataclasses
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import GenerationConfig

from ppow.drafting_ppow import DraftOptions
from ppow.model_cards import render

from . import provenance
from .figures import identical, without_drafts
from .fingerprints import fingerprint
from .samples import RESULTS
from .sources import ENDINGS

METRICS, PICTURE = RESULTS
# options that say only where something lay on the machine of a run, and those whose folders have another name to others
_PLACES = {"output", "prompts-dir", "config", "resume", "push-to-hub"}
_NAMES = {"target": "TARGET", "drafter": "STAGE1", "baseline": "BASELINE", "output-dir": "OUT"}


def card(folder: Path, repo: str, revision: str | None, license: str | None) -> str:
    """The model card of an assembled folder, from its own files alone.

    Args:
        folder: with config.json and, where there are any, metrics.json, provenance.json and the picture.
        repo: what the snippets load; with ``revision`` None a folder beside this package instead of a Hub repository.
        revision: of ``repo``.
        license: of the weights, as the Hub names it.

    Raises:
        ValueError: for figures that were measured with other weights, or that do not say with which.
    """
    config, drafting, metrics, record = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for name in ("config.json", "generation_config.json", METRICS, provenance.FILE)
    )
    stages = provenance.stages(record)
    if metrics:
        check_figures(metrics, folder, config.get("target_name_or_path"), stages)
    facts = {
        "config": config,
        "drafting": dataclasses.asdict(DraftOptions.resolve(GenerationConfig(**drafting))),
        "metrics": metrics,
        "identical": identical,
        "without_drafts": without_drafts,
        "stages": stages,
        "trained": how_trained(stages),
        "data_of": lambda stage: data_name(str(stage["config"]["data"])),
        "command_of": lambda argv, **names: public_command(
            argv, {"target": config.get("target_name_or_path"), **names}
        ),
        "baseline_is_stage1": began_with_baseline(metrics, stages),
        "repo": repo,
        "title": repo.rpartition("/")[2] if revision else f"The {repo.rpartition('/')[2]} in {repo.partition('/')[0]}/",
        "revision": revision,
        "picture": (folder / PICTURE).is_file(),
        "metadata": metadata(config, metrics, stages, repo, license),
    }
    return render("drafter", facts)


def check_figures(metrics: dict, folder: Path, target: str | None, stages: list[dict]) -> None:
    """Raise a ValueError unless figures were measured with the drafter in ``folder`` and with its target.

    The target's weights are those that the last stage recorded, and those of ``target`` where they are on this
    machine; figures of a GGUF file, a quantized copy that the card names, are held against the stage's record alone.
    """
    again = "Measure this drafter with `ppow evaluate` and name that folder with --metrics"
    weights = metrics.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"{METRICS} does not say which weights it was measured with, as an older version's. {again}.")
    own = fingerprint(folder, whole=True)
    if weights.get("drafter") != own:
        whose = "its baseline" if weights.get("baseline") == own else "another one"
        raise ValueError(
            f"{METRICS} holds the figures of other weights ({str(weights.get('drafter'))[:12]}) than this drafter's "
            f"({str(own)[:12]}), which are {whose} there. {again}, or move {METRICS} away."
        )
    recorded = [stage["weights"]["target"] for stage in stages if stage.get("weights", {}).get("target")]
    copied = str(metrics.get("config", {}).get("target")).endswith(".gguf")
    here = fingerprint(target) if target and not copied else None
    for made_for in (*recorded[-1:], here):
        if made_for and weights.get("target") != made_for:
            raise ValueError(
                f"{METRICS} was measured on a target with other weights ({str(weights.get('target'))[:12]}) than this "
                f"drafter's target has ({made_for[:12]}). {again}."
            )


def data_name(name: str) -> str:
    """A data set as others know it: a Hub id, or the name of a file without its folders."""
    return Path(name).name if name.endswith(tuple(ENDINGS)) else name


def public_command(argv: list[str], names: dict[str, str | None]) -> str:
    """A recorded command line as others can give it: no folder of the run, models under their public ``names``.

    A GGUF file keeps its own name, since it is another copy of the weights.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        key, joined, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            words.append(word)
            continue
        if not joined and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if key in _PLACES:
            continue
        if key in _NAMES and not value.endswith(".gguf"):
            value = names.get(key) or _NAMES[key]
        elif value.endswith(tuple(ENDINGS)):
            value = data_name(value)
        words.append(f"--{key}{joined or (' ' if value else '')}{value}")
    return " ".join(words)


def began_with_baseline(metrics: dict, stages: list[dict]) -> bool:
    """Whether the figures' baseline is the drafter that the last stage started from."""
    measured = metrics.get("weights", {}).get("baseline") if isinstance(metrics.get("weights"), dict) else None
    return bool(measured) and any(stage.get("weights", {}).get("drafter") == measured for stage in stages[-1:])


def how_trained(stages: list[dict]) -> str | None:
    """What the last stage of a drafter's training was; None where that was not recorded.

    "exact" and "rollout" are PPOW's two estimators, "supervised" is stage 1, "control" another objective.
    """
    last = stages[-1] if stages else {}
    options = last.get("config", {})
    if last.get("command") != "reinforce":
        return "supervised" if last.get("command") == "supervised" else None
    return options.get("estimator") if options.get("objective", "ppow") == "ppow" else "control"


def metadata(config: dict, metrics: dict, stages: list[dict], repo: str, license: str | None) -> str:
    """The card's YAML header, with the measured figures in the Hub's form."""
    target = config.get("target_name_or_path")
    data = {stage["config"]["data"] for stage in stages if stage.get("config", {}).get("data")}
    data = {name for name in data if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(tuple(ENDINGS))}
    figures = [
        EvalResult(
            task_type="text-generation",
            task_name="speculative decoding",
            dataset_type=name.rpartition(" ")[0],
            dataset_name=name,
            dataset_config=name.split(" ")[-1],
            metric_type=key,
            metric_name=key.replace("_", " "),
            metric_value=round(result[key], 4),
        )
        for name, result in metrics.get("results", {}).items()
        for key in ("acceptance_length", "speedup")
    ]
    kind = "block-drafter" if config.get("architecture") == "block" else "eagle-3"
    fields = {
        "library_name": "transformers",
        "license": license,
        "base_model": target,
        "base_model_relation": "adapter" if target else None,
        "datasets": sorted(data),
        "tags": ["ppow", "speculative-decoding", kind, "assistant-model"],
        "model_name": repo if figures else None,
        "eval_results": figures,
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value}).to_yaml()
