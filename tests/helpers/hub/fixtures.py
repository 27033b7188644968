"""Fixtures of the tests that speak to a hub: ``pytest_plugins = ["hub.fixtures"]``."""

import json

import pytest
import torch

from decoding_helpers import build_target, random_drafter, train

from .clients import connect
from .hub import Hub

RECORD = {
    "command": "supervised",
    "config": {"steps": 7, "batch_size": 2, "accumulation": 3, "data": "acme/chats", "learning_rate": 1e-3, "seed": 5},
    "hardware": {"cpu": "a CPU", "gpus": []},
}
RECORD["config"]["dtype"] = "float32"


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tiny_tokenizer):
    """Folders ``target`` and ``drafter``: a tiny target and a drafter that really drafts for it, with its record."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    target = build_target(vocab_size=len(tiny_tokenizer)).float()
    target.save_pretrained(folder / "target")
    tiny_tokenizer.save_pretrained(folder / "target")
    drafter = train(random_drafter(target), target, steps=60)
    drafter.generation_config.window_size = 4
    drafter.save_pretrained(folder / "drafter")
    (folder / "drafter" / "provenance.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub that the clients of this process speak to as alice, without Xet, with an empty cache."""
    with Hub(tmp_path / "hub") as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", hub.add_token("alice", orgs=("acme",)))
        yield hub
        assert not hub.errors, hub.errors[0]
