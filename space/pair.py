"""The models that race: a target, its PPOW drafter and, if there is one, the drafter of stage 1.

Named, first match wins, by the environment (``PPOW_TARGET``, ``PPOW_DRAFTER``, ``PPOW_BASELINE``; ``ppow space`` sets
them) or by ``pair.json`` beside this file (Hub ids and pinned revisions).
"""

import importlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

HERE = Path(__file__).resolve().parent
RECORD = "provenance.json"


@dataclass(frozen=True)
class Names:
    """Hub ids or folders; a revision pins a Hub id to a commit."""

    target: str
    drafter: str
    baseline: str | None = None
    target_revision: str | None = None
    drafter_revision: str | None = None
    baseline_revision: str | None = None


def find_names(environment=os.environ, file: Path = HERE / "pair.json") -> Names:
    """Which pair to load.

    Raises:
        ValueError: a target without a drafter or the other way round, a ``pair.json`` of another form, or no pair.
    """
    target, drafter, baseline = (environment.get(f"PPOW_{part}") or None for part in ("TARGET", "DRAFTER", "BASELINE"))
    if bool(target) != bool(drafter):
        raise ValueError("A drafter belongs to one target: set both PPOW_TARGET and PPOW_DRAFTER, or neither.")
    if target:
        return Names(target, drafter, baseline)
    if file.exists():
        try:
            return Names(**json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{file.name} must be an object with target, drafter and their revisions: {error}."
            ) from error
    raise ValueError(
        "No pair to load: put pair.json beside app.py, set PPOW_TARGET and PPOW_DRAFTER, or start this by `ppow space`."
    )


@dataclass(frozen=True)
class Pair:
    """Loaded models. ``drafters`` maps a name to show ("PPOW", "stage 1") to a drafter."""

    target: torch.nn.Module
    tokenizer: object
    drafters: dict
    names: Names
    trained: dict | None = None  # the record of the drafter's last stage, if its repository keeps one

    @property
    def longest(self) -> int:
        """Tokens that the target can read and write together."""
        return self.target.config.get_text_config(decoder=True).max_position_embeddings

    @property
    def drafting(self):
        """The ``DraftOptions`` of a call that names none, as ``ppow demo`` makes it."""
        options = self.part("drafting_ppow").DraftOptions
        return options.resolve(self.target.generation_config, self.drafters["PPOW"].generation_config)

    def part(self, module: str):
        """A module of the drafters' own code: the installed package's, or the one its Hub repository carries."""
        package = type(self.drafters["PPOW"]).__module__.rpartition(".")[0]
        return importlib.import_module(f"{package}.{module}")

    def describe(self) -> str:
        """One line on what runs here and on what."""
        sizes = {"target": self.target, **self.drafters}
        parts = [f"{name} {model.num_parameters() / 1e6:,.1f}M" for name, model in sizes.items()]
        device = self.target.device
        threads = torch.get_num_threads()
        where = f"{threads} CPU thread{'s' if threads > 1 else ''}"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        dtype = str(self.target.dtype).removeprefix("torch.")
        return f"{title(self.names.target)}: {', '.join(parts)} parameters · {dtype} · {where}"


def title(name: str) -> str:
    """A model's name to show: the Hub id, also of a folder of the Hub's cache, else the last part of a path."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", name)
    if cached:
        return "/".join(cached.groups())
    return Path(name).name if Path(name).exists() else name


def load_pair(names: Names, device: str | None = None) -> Pair:
    """Load all models.

    Raises:
        ValueError: with a message for the page: what could not be loaded and why, or that the models do not fit.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options, place = {"revision": names.target_revision}, names.target
    if place.lower().endswith(".gguf"):  # a file, of a folder or a repository
        file = Path(place).absolute()
        place, _, name = place.rpartition("/")
        options["gguf_file"] = str(file) if file.is_file() else name
    target = _load("target", place or ".", AutoModelForCausalLM.from_pretrained, dtype=dtype, **options)
    tokenizer = _load("tokenizer", place or ".", AutoTokenizer.from_pretrained, **options)
    if tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {names.target} has no chat template, which this page needs.")
    drafters = {"PPOW": _load("drafter", names.drafter, _drafter, names.drafter_revision, dtype)}
    if names.baseline:
        drafters["stage 1"] = _load("baseline", names.baseline, _drafter, names.baseline_revision, dtype)
    drafters = {name: model.to(device) for name, model in drafters.items()}
    pair = Pair(target.to(device), tokenizer, drafters, names, record_of(names.drafter, names.drafter_revision))
    for drafter in drafters.values():
        pair.part("target_ppow").check_pair(pair.target, drafter)
    return pair


def record_of(name: str, revision: str | None = None) -> dict | None:
    """provenance.json of a drafter's folder or repository; None where it has none, or none that can be read."""
    file = Path(name) / RECORD
    try:
        if not Path(name).is_dir():
            file = Path(hf_hub_download(name, RECORD, revision=revision))
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):  # what is missing here costs the page its method, no more
        return None
    return record if isinstance(record, dict) else None


def _load(what: str, name: str, load, *arguments, **options):
    try:
        return load(name, *arguments, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"The {what} {name} could not be loaded: {reason}") from error


def _drafter(name: str, revision: str | None, dtype: torch.dtype):
    """A drafter from its repository's own code; one that carries none (that of a checkout) through the package."""
    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if "auto_map" in config:
        return AutoModel.from_pretrained(name, revision=revision, dtype=dtype, trust_remote_code=True)
    if config.get("model_type") != "ppow":
        raise ValueError(f"it is a {config.get('model_type')} model, not a PPOW drafter.")
    from ppow import PPOWDrafter

    return PPOWDrafter.from_pretrained(name, revision=revision, dtype=dtype)
