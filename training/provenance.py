"""What made a result: arguments, configuration, code revision, versions and hardware, without anything private.

Paths below the working folder are written relative to it, all others by their last part; access tokens are masked.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .arguments import Config
from .files import write_json
from .fingerprints import fingerprint

FILE = "provenance.json"
PACKAGES = ("ppow", "torch", "transformers", "accelerate", "datasets")
_TOKEN = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_)[A-Za-z0-9_-]{16,}")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_LOCAL_PATH = re.compile(r"(?:~|[A-Za-z]:[\\/]|/|\.\.?/)[^,=]*")


def write(folder: str | Path, config: Config) -> Path:
    """Write ``folder/provenance.json``; the records of earlier (resumed) runs stay in it under ``earlier``.

    Fingerprints of the target and of the drafter that it starts from say which weights those were. A run that starts
    from a drafter's folder keeps that drafter's own record under ``started_from``, so that the last
    file of a chain of stages tells all of them.

    Args:
        folder: the run's output folder; made when missing.
        config: its configuration.

    Returns:
        The file written.
    """
    path = Path(folder) / FILE
    content = record(config)
    target, drafter = getattr(config, "target", None), getattr(config, "drafter", None)
    if target:  # which figures may stand beside what this run makes
        content["weights"] = {"target": fingerprint(target)} | (
            {"drafter": fingerprint(drafter, whole=True)} if drafter else {}
        )
    start = Path(drafter or folder) / FILE
    if start != path and start.exists():
        content["started_from"] = read(start)
    if path.exists():
        before = read(path)
        before.pop("started_from", None)
        content["earlier"] = [*before.pop("earlier", []), before]
    write_json(path, content)
    return path


def read(path: Path) -> dict:
    """A provenance file's content; ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a provenance file; move it away.")
    return content


def stages(record: dict) -> list[dict]:
    """The stages that led to a drafter, oldest first, of the last one's record; empty: none was recorded."""
    found: list[dict] = []
    while record:
        found.insert(0, record)
        record = record.get("started_from", {})
    return found


def record(config: Config) -> dict:
    """The facts of this process as a JSON-ready dict."""
    options, words = config.to_dict(), config.program().split()
    given = list(sys.argv)
    if given[1:2] == words[1:]:  # ppow COMMAND
        given = [*words, *given[2:]]
    elif Path(given[0]).stem == words[-1].rpartition(".")[2]:  # python -m ...COMMAND
        given = [*words, *given[1:]]
    elif given[1:2] == ["train"]:  # a part of the road: the command that does it alone
        given = config.argv()
    return {
        "command": config.command(),
        "argv": [scrub(argument) for argument in given],
        "config": scrub(options),
        "seed": options.get("seed"),
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_revision(Path(__file__).parent),
        "versions": versions(),
        "hardware": hardware(),
    }


def scrub(value: Any) -> Any:
    """Mask access tokens and shorten local paths, in a text or in every text of a list or dict."""
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    value = _CREDENTIALS.sub("", _TOKEN.sub("***", value))
    # Arguments come as path, --key=path or path,path; a URL stays whole.
    parts = re.split(r"([=,])", value)
    return "".join(part if "://" in part else _shorten(part) for part in parts)


def _shorten(text: str) -> str:
    if not _LOCAL_PATH.fullmatch(text):
        return text
    path = Path(os.path.abspath(os.path.expanduser(text)))
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def git_revision(folder: Path) -> dict | None:
    """Commit and cleanliness of the repository whose tracked files lie in ``folder``; None outside of one."""
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git(folder, "rev-parse", "HEAD")
    if not tracked or not commit:
        return None
    return {"commit": commit, "modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Python and the packages that results depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def hardware() -> dict:
    """CPU model and count, and the names of the GPUs that torch sees."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
