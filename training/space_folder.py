"""What the Hub repository of a Space holds that shows a drafter (``ppow space`` serves the same page here)."""

import shutil
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from ppow import PPOWConfig

from . import provenance
from .config import PushConfig
from .files import write_json
from .repository import check_id, check_no_folder, check_private
from .space import FOLDER


def assemble_space(config: PushConfig, folder: Path) -> None:
    """Write the Space of a pair that is on the Hub into an empty folder, pinned to the commits that it is at now.

    Raises:
        ValueError: the page is missing, or the pair is not on the Hub.
    """
    if not FOLDER.is_dir():
        raise ValueError(
            f"{FOLDER}, which holds the page, is missing: the installation is not complete. Install ppow again."
        )
    drafter, target, baseline = config.drafter, config.target, config.baseline
    for option, name in {"the drafter": drafter, "--target": target, "--baseline": baseline}.items():
        if name is not None:
            check_no_folder(name, option)
    revision = commit_of(drafter, "the drafter")
    target = target or PPOWConfig.from_pretrained(drafter, revision=revision).target_name_or_path
    if target is None:
        raise ValueError(f"{drafter} does not record its target; name its Hub id with --target.")
    names = {"target": target, "target_revision": commit_of(target, "--target")}
    names |= {"drafter": drafter, "drafter_revision": revision}
    if baseline is not None:
        names |= {"baseline": baseline, "baseline_revision": commit_of(baseline, "--baseline")}
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__", ".*", "pair.json"), dirs_exist_ok=True)
    write_json(folder / "pair.json", names)
    front = RepoCard.load(folder / "README.md")
    front.data["models"] = [model for model in (target, drafter, baseline) if model]
    front.save(folder / "README.md")
    check_private(folder)


def commit_of(name: str, option: str) -> str:
    """The commit that a model repository is at now. Raises ValueError when it is not to be found."""
    check_id(name, option)
    try:
        return HfApi().model_info(name).sha
    except RepositoryNotFoundError:
        raise ValueError(
            f"{option} {name}: the Hub has no such repository, or your token may not see it; correct the name, or push "
            "it first."
        ) from None
    except (HTTPError, OSError) as error:
        why = provenance.scrub(str(error))
        raise ValueError(f"{option} {name}: the Hub could not be asked for it ({why}); try again.") from None
