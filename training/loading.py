"""Loading a model by its name: what goes wrong says which option named what, and which file is damaged."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open


@contextlib.contextmanager
def named(option: str, name: str | Path) -> Iterator[None]:
    """Load a model, a folder's or a Hub id's, inside.

    Raises:
        ValueError: a folder without a model, a drafter given as target, damaged weights, and whatever loading raises.
    """
    config = Path(name) / "config.json"
    if Path(name).is_dir() and not config.exists():
        raise ValueError(f"--{option} {name}: this folder holds no config.json, so no model.")
    try:
        if option == "target" and config.exists() and json.loads(config.read_text()).get("model_type") == "ppow":
            raise ValueError("this is a drafter; name the target that it drafts for")
        try:
            yield
        except SafetensorError as error:  # which does not say of which file
            raise ValueError(f"{_damaged(name)} is damaged or truncated ({error}); get it again.") from error
    except (ValueError, OSError) as error:
        place = "" if Path(name).exists() else " is no folder here, and as a Hub id"
        raise ValueError(f"--{option} {name}{place}: {error}") from error


def positions(config) -> int | None:
    """How many tokens a target of this configuration has positions for, as far as it says."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((number for number in named if isinstance(number, int) and number > 0), None)


def _damaged(name: str | Path) -> str:
    """The first weights file of a folder, or of a Hub repository as far as it was downloaded, that cannot be opened."""
    folder = name if Path(name).is_dir() else snapshot_download(str(name), local_files_only=True)
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return str(file)
    return "a weights file"
