"""Loading a model by its name: a folder, a Hub id, or for targets a GGUF file.

What goes wrong says which option named what, and which file is damaged.
"""

import contextlib
import difflib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppow.paths_ppow import only_a_path

HUB_SECONDS = 5  # that the Hub has to say whether it knows a name


@contextlib.contextmanager
def named(option: str, name: str | Path) -> Iterator[None]:
    """Load a model, a folder's or a Hub id's, inside.

    Raises:
        ValueError: as :func:`check_model`, a drafter given as target, damaged weights, and whatever loading raises.
    """
    check_model(option, name)
    config = Path(name) / "config.json"
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
    except (struct.error, EOFError, LookupError, TypeError, NotImplementedError, ImportError) as error:
        if not is_gguf(name):
            raise
        raise ValueError(f"--{option} {name} could not be read as a GGUF file ({error}).") from error


def place_of(name: str | Path) -> dict[str, str]:
    """The arguments by which ``from_pretrained`` finds a target, its configuration or its tokenizer.

    Args:
        name: a folder, a Hub id, a GGUF file here, or one of the Hub as ORG/NAME/FILE.gguf. transformers turns a GGUF
            file's weights into plain ones as it loads them.
    """
    if not is_gguf(name):
        return {"pretrained_model_name_or_path": str(name)}
    path = Path(name).absolute()
    if path.is_file():  # with its whole path: transformers looks for a bare name in the working directory first
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": str(path)}
    folder, _, file = Path(name).as_posix().rpartition("/")
    return {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf")


def load_tokenizer(name: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """A target's tokenizer; one that pads with the end of a text where it knows no token to pad with (GGUF files)."""
    tokenizer = AutoTokenizer.from_pretrained(**place_of(name), **options)
    if tokenizer.pad_token is None and is_gguf(name):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str | Path, **options: Any) -> PreTrainedModel:
    """A target; one of a GGUF file ends its answers at the end of a turn, too, which transformers leaves out."""
    model = AutoModelForCausalLM.from_pretrained(**place_of(name), **options)
    if Path(name).is_file():
        import gguf

        field = gguf.GGUFReader(name).get_field("tokenizer.ggml.eot_token_id")
        if field is not None:
            known = model.generation_config.eos_token_id
            ends = {int(field.contents()), *(known if isinstance(known, list) else [known])} - {None}
            model.generation_config.eos_token_id = sorted(ends)
    return model


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a target of this configuration has positions for, as far as it says."""
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((number for number in named if isinstance(number, int) and number > 0), None)


def check_model(option: str, name: str | Path) -> None:
    """Answer at once for a name that leads to no model: the Hub's client would ask for half a minute.

    Raises:
        ValueError: a file, a folder without a model, a path to nothing, a Hub id that the Hub does not know, or one
            that is not in its cache here while the Hub cannot be asked.
    """
    path, said = Path(name), f"--{option} {name}"
    if is_gguf(name):
        if option != "target":
            raise ValueError(
                f"{said} is a GGUF file; a drafter in one is for llama.cpp: `ppow import` it first (a file, here)."
            )
        folder = place_of(name)["pretrained_model_name_or_path"]
        if path.is_file():
            return
        if only_a_path(folder) or Path(folder).is_dir() or "/" not in folder:
            raise ValueError(f"{said}: there is no such file. One of the Hub, at its top, is ORG/NAME/FILE.gguf.")
        if Path(path.name).is_file():
            raise ValueError(f"{said} is of the Hub, but transformers would read ./{path.name}; call it elsewhere.")
        return
    if path.is_file():
        raise ValueError(f"{said} is a file; give the folder of the model.")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{said}: this folder holds no config.json, so no model.{_unfinished(path)}")
        return
    if only_a_path(name):
        tilde = " Only a shell knows what ~ stands for, and only at the start of a word."
        raise ValueError(f"{said} is no folder here.{tilde if str(name)[0] == '~' else _nearest(path)}")
    if constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            return
        HfApi().model_info(str(name), timeout=HUB_SECONDS)
    except HFValidationError as error:
        raise ValueError(f"{said} is no folder here, and no Hub id: {error}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{said} is no folder here, and the Hub knows no such model, or your token may not see it (`hf auth "
            f"login`).{_nearest(path)}"
        ) from None
    except HfHubHTTPError:  # a busy Hub, or a mirror that only hands out files: loading will tell
        return
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{said} is no folder here, and {constants.ENDPOINT} cannot be reached ({error}).{_nearest(path)}"
        ) from None


def _nearest(path: Path) -> str:
    """What a folder holds that a misspelt path may have meant."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no {parent} either." if only_a_path(str(path)) else ""
    found = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir() if entry.is_dir()], n=1)
    return f" Did you mean {parent / found[0]}?" if found else ""


def _unfinished(path: Path) -> str:
    """What to do about the folder of a run that has not ended."""
    if not (path / "checkpoints").is_dir():
        return ""
    return " Its run has not ended: go on with --resume, or name one of its checkpoints/step-*."


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
