"""Reading the files of a checkpoint that another trainer wrote, from a folder or the Hub, without running its code.

Pickled weights are read with ``weights_only=True`` alone.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file

from ppow.paths_ppow import check_path

Tensors = dict[str, torch.Tensor]  # by name
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each whole, or split with an index beside it


def read_config(source: str, **hub: Any) -> dict:
    """``config.json`` of a folder or Hub repository. Raises ValueError when it is missing or no JSON object."""
    check_path(source)
    file = find_file(source, "config.json", **hub)
    if file is None:
        raise ValueError(
            f"{source} has no config.json, or the Hub could not be reached: give the folder or Hub id of a drafter."
        )
    return read_json(file)


def read_tensors(source: str, **hub: Any) -> Tensors:
    """All tensors of a folder or Hub repository: ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Args:
        source: folder or Hub id.
        **hub: of ``modeling_ppow.HUB_OPTIONS``.

    Returns:
        Name -> tensor on the CPU, as stored.

    Raises:
        ValueError: no weights, a damaged or truncated file, pickled code, or an index naming what is not there.
    """
    for name in WEIGHTS:
        if file := find_file(source, name, **hub):
            return _read_weights(file)
        if index := find_file(source, f"{name}.index.json", **hub):
            return _read_shards(source, index, hub)
    raise ValueError(f"{source} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}, whole or with an index: no drafter.")


def find_file(source: str, name: str, **hub: Any) -> Path | None:
    """A file of a folder or Hub repository, downloaded where need be; None where there is none."""
    found = cached_file(source, name, **hub, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises ValueError, naming the file, when there is none in it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def _read_shards(source: str, index: Path, hub: dict) -> Tensors:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names.")
    tensors: Tensors = {}
    for name in sorted(set(places.values())):
        file = find_file(source, name, **hub) if Path(name).name == name else None
        if file is None:
            raise ValueError(f"{index} names {name!r}, which is not beside it: the checkpoint is incomplete.")
        tensors |= _read_weights(file)
    if missing := sorted(set(places) - set(tensors)):
        raise ValueError(f"{index} names {', '.join(missing[:5])}, but its files do not hold them.")
    return tensors


def _read_weights(file: Path) -> Tensors:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error}); download it again.") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} was not opened: it is damaged, or holds pickled code instead of plain tensors ({reason}). "
            "Get the checkpoint as safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:  # an empty file is an OSError to torch
        raise ValueError(f"{file} is damaged or truncated ({error}); download it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} must hold a dict of tensors, as a model's state_dict.")
    return content
