"""What a drafter's Hub repository holds: all that loads it without this package, its card and the records behind it.

The weights (safetensors only), the configuration with its ``auto_map``, the generation config, the code that
``trust_remote_code=True`` and ``custom_generate=`` load, the provenance of the training, metrics.json and the card.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ppow import PPOWDrafter

from . import provenance
from .card import METRICS, PICTURE, card
from .config import PushConfig
from .files import write_json
from .loading import named

_PRIVATE = re.compile(r"hf_[A-Za-z0-9]{16,}|(?:/home/|/root/|/Users/|[A-Z]:\\Users\\)[^\s\"']*")


def assemble(config: PushConfig, folder: Path) -> None:
    """Write everything that the repository holds into an empty folder.

    The weights are loaded and written anew, so that a damaged one is noticed here.

    Raises:
        ValueError: for something that is no drafter, damaged weights or ones that are not finite, a target that is a
            folder, missing metrics or those of other weights, or a file with an access token or a path of this machine
            in it.
    """
    source = Path(config.drafter)
    if config.target is not None:
        check_no_folder(config.target, "--target")
    with named("drafter", config.drafter):
        model = PPOWDrafter.from_pretrained(config.drafter, dtype="auto")
    if config.target is not None:
        model.config.target_name_or_path = config.target
    if model.config.target_name_or_path is not None:
        check_id(model.config.target_name_or_path, "--target")
    broken = [name for name, weight in model.state_dict().items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ValueError(f"{config.drafter} has weights that are not finite ({', '.join(broken[:3])}); train it again.")
    model.save_pretrained(folder, max_shard_size="4GB")
    run = source.parents[1] if source.parent.name == "checkpoints" else source  # a checkpoint's record is its run's
    record = next((at / provenance.FILE for at in (source, run) if (at / provenance.FILE).is_file()), None)
    if record:
        write_json(folder / provenance.FILE, provenance.scrub(provenance.read(record)))
    figures = find_metrics(source, config.metrics)
    if figures:
        write_json(folder / METRICS, provenance.scrub(json.loads(figures.read_text(encoding="utf-8"))))
        if (figures.parent / PICTURE).is_file():
            shutil.copyfile(figures.parent / PICTURE, folder / PICTURE)
    text = card(folder, config.repo, config.tag or config.revision, config.license)
    (folder / "README.md").write_text(text, encoding="utf-8")
    check_private(folder)


def find_metrics(source: Path, metrics: str | None) -> Path | None:
    """The metrics.json that ``metrics`` names, or that lies beside the drafter."""
    if metrics is None:
        return source / METRICS if (source / METRICS).is_file() else None
    path = Path(metrics) / METRICS if Path(metrics).is_dir() else Path(metrics)
    if not path.is_file():
        raise ValueError(f"--metrics {metrics}: no {METRICS} there; give the output folder of `ppow evaluate`.")
    return path


def check_private(folder: Path) -> None:
    """Refuse text files that hold an access token or a path of this machine."""
    for file in sorted(folder.rglob("*")):
        if file.suffix not in {".json", ".md", ".jinja"}:
            continue
        text = file.read_text(encoding="utf-8")
        if found := _PRIVATE.search(text):
            what = "an access token" if found[0].startswith("hf_") else f"the local path {found[0]}"
        elif file.suffix == ".json" and provenance.scrub(json.loads(text)) != json.loads(text):
            what = "a local path"
        else:
            continue
        raise ValueError(f"{file.relative_to(folder)} holds {what}, which must not be published; remove it.")


def check_id(name: str, option: str) -> None:
    """Raise a ValueError unless ``name``, given with ``option``, can be the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{option} {name}: expected ORG/NAME, as the Hub writes it ({error}).") from None


def check_no_folder(name: str, option: str) -> None:
    """Raise a ValueError where ``name``, given with ``option`` as a Hub id, is a folder on this machine."""
    if Path(name).is_dir():
        what = option.removeprefix("--").removeprefix("the ")
        raise ValueError(
            f"{option} {name}: expected the Hub id of the {what}, ORG/NAME, but this is a folder here. Push the {what} "
            "to the Hub first, then name its repository."
        )
