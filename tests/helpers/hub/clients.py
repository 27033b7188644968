"""How the real clients of this process, and of others, are sent to a hub."""

import os
import sys

import transformers
from huggingface_hub import constants, get_token, hf_api
from huggingface_hub.utils import disable_progress_bars

from ppow.training import cli

from .hub import Hub


def connect(monkeypatch, hub: Hub, cache) -> None:
    """Send this process's clients to a hub: the values that they read from the environment when imported."""
    disable_progress_bars()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made on first use, for the endpoint of then


def environment(hub: Hub, cache, **more: str) -> dict[str, str]:
    """The environment of another process that speaks to the hub as this one does."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hf = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": get_token(), "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return ours | hf | more


def push(pair, repo: str, *options: str) -> int:
    """``ppow push`` of the pair's drafter, in this process; -> its exit status."""
    return cli.main(["push", str(pair / "drafter"), "--repo", repo, *options])


def ppow(*arguments: str) -> list[str]:
    """The command line of ``ppow`` in a process of its own."""
    return [sys.executable, "-m", "ppow.training.cli", *map(str, arguments)]
