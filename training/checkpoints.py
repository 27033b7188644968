"""Checkpoints that are complete or absent: written beside their final name, synced, then renamed.

    folder/step-000123/
        config.json, model.safetensors, ...   the drafter, as save_pretrained writes it
        optimizer.safetensors                 every tensor of the optimizer's state; the weights to go on from are among
                                              them where the drafter is their mean
        state.json                            step, the caller's state, size and sha256 of every other file

A kill at any moment leaves the earlier checkpoints as they were and at most a hidden folder that nothing reads and the
next save removes. The state of random generators is not kept: every training step seeds its own from (seed, step).
Several processes: let only the main one save.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .files import free_bytes
from .optimizers import Optimizers

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"step-\d{6,}")
_HIDDEN = ".unfinished-"


def save(
    folder: str | Path,
    step: int,
    drafter: PreTrainedModel,
    optimizer: torch.optim.Optimizer | Optimizers,
    state: dict,
    keep_last: int | None = None,
) -> Path:
    """Write ``folder/step-{step:06}`` atomically.

    Args:
        folder: holds the checkpoints of one run.
        step: optimizer steps done.
        drafter: unwrapped.
        optimizer: its ``state_dict`` is kept bit-exactly.
        state: anything else that JSON can hold, handed back by :func:`load`.
        keep_last: afterwards remove all but the newest so many checkpoints.

    Returns:
        The folder written.

    Raises:
        ValueError: a complete checkpoint of this step exists, or ``state`` is not JSON.
        OSError: the disk is full or not writable; the partial folder is gone then.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06}"
    tensors, groups = _split_optimizer(optimizer)
    try:
        record = {"step": step, "state": state, "param_groups": groups}
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The state of step {step} cannot be written as JSON: {error}.") from None
    if _is_complete(final):
        raise ValueError(f"{final} exists already; resume from it, or choose another folder.")

    partial = folder / f"{_HIDDEN}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        drafter.save_pretrained(partial)
        save_file(tensors, partial / OPTIMIZER_FILE)
        record["files"] = {name: _fingerprint(partial / name) for name in _files_in(partial)}
        (partial / STATE_FILE).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        for name in [*_files_in(partial), STATE_FILE]:
            _sync(partial / name)
        _sync(partial)
        if final.exists():  # damaged, see above
            _discard(final)
        os.rename(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in [*drafter.state_dict().values(), *tensors.values()])
        raise OSError(
            f"Could not write the checkpoint {final}: {error}. It needs about {needed} bytes, {free_bytes(folder)} "
            "are free. Nothing partial was left behind."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep_last is not None:
        prune(folder, keep_last)
    return final


def prune(folder: str | Path, keep_last: int) -> None:
    """Remove all checkpoints of ``folder`` but the newest ``keep_last``."""
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}.")
    for path in _checkpoints(Path(folder))[keep_last:]:
        _discard(path)


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None. Damaged ones are skipped with a warning."""
    for path in _checkpoints(Path(folder)):
        try:
            verify(path)
        except ValueError as error:
            logger.warning("Skipping a checkpoint: %s", error)
        else:
            return path
    return None


def verify(path: str | Path) -> dict:
    """Check every file of a checkpoint against its size and sha256.

    Returns:
        The parsed state.json.

    Raises:
        ValueError: naming the file that is missing, cut off or altered.
    """
    path = Path(path)
    try:
        record = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint: {STATE_FILE} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE_FILE} is damaged ({error!r}); use an earlier checkpoint.") from None
    for name, expected in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing; use an earlier checkpoint.")
        found = _fingerprint(path / name)
        if found != expected:
            raise ValueError(
                f"{path / name} is damaged: {found['bytes']} bytes with sha256 {found['sha256'][:12]}..., expected "
                f"{expected['bytes']} bytes with {expected['sha256'][:12]}...; use an earlier checkpoint."
            )
    return record


def load(path: str | Path, drafter: PreTrainedModel, optimizer: torch.optim.Optimizer | Optimizers) -> dict:
    """Restore drafter and optimizer in place, bit-exactly.

    Args:
        path: a checkpoint, e.g. from :func:`latest`.
        drafter: of the saved shape.
        optimizer: over the same parameters in the same order.

    Returns:
        The caller's state, with ``step`` added.

    Raises:
        ValueError: a damaged checkpoint, or one of another drafter or optimizer.
    """
    path = Path(path)
    record = verify(path)
    weights = {}
    for name in sorted(record["files"]):
        if name.startswith("model") and name.endswith(".safetensors"):
            weights.update(load_file(path / name))
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in drafter.state_dict().items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    if found != expected:
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(
            f"{path} holds another drafter; these tensors differ in name, shape or dtype: {', '.join(differing[:5])}. "
            "Resume with the options that the run started with."
        )
    _load_optimizer(path, record["param_groups"], optimizer)
    drafter.load_state_dict(weights)
    return {**record["state"], "step": record["step"]}


# -- the optimizer's state as tensors and JSON -------------------------------------------------------------------------


def _split_optimizer(optimizer: torch.optim.Optimizer | Optimizers) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Tensors under ``{parameter index}.{name}``, and the parameter groups as JSON."""
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entries in whole["state"].items()
        for name, value in entries.items()
    }
    groups = [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in whole["param_groups"]
    ]
    return tensors, groups


def _load_optimizer(path: Path, saved: list[dict], optimizer: torch.optim.Optimizer | Optimizers) -> None:
    current = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in current]:
        raise ValueError(
            f"{path} was saved by an optimizer over {[len(group['params']) for group in saved]} parameters per group, "
            f"this one has {[len(group['params']) for group in current]}."
        )
    state: dict[int, dict] = {}
    for key, tensor in load_file(path / OPTIMIZER_FILE).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    # JSON has no tuples: AdamW's betas come back as a list.
    groups = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for group, now in zip(saved, current)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# -- files -------------------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; complete or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _is_complete(path: Path) -> bool:
    try:
        verify(path)
    except ValueError:
        return False
    return True


def _files_in(folder: Path) -> list[str]:
    """Names relative to ``folder``, without state.json."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name != STATE_FILE)


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a rename never outruns what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Remove a checkpoint. Renamed first: a kill half-way leaves a hidden folder, not a damaged checkpoint."""
    hidden = path.with_name(f"{_HIDDEN}old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)
