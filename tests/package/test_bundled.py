"""What comes with the checkout: the drafter of SmolLM2-135M-Instruct, and what its card says of it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from safetensors import safe_open
from transformers import GenerationConfig

from ppow import PPOWConfig, PPOWDrafter
from ppow.model_cards import render
from ppow.training.card import card
from ppow.training.smollm2 import TARGET

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "bundled"
HELD = sorted(path.name for path in BUNDLED.iterdir()) if BUNDLED.exists() else []


def test_the_weights_are_safe_and_of_the_drafter_alone():
    assert "drafter" in HELD and set(HELD) <= {"drafter", "stage1"}
    files = [file for file in BUNDLED.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png"}
    for name in HELD:
        config = PPOWConfig.from_pretrained(BUNDLED / name)
        assert config.target_name_or_path == TARGET and config.target_hidden_size == 576
        with safe_open(BUNDLED / name / "model.safetensors", "pt") as weights:
            assert "embed_tokens.weight" not in set(weights.keys())  # the target's own serve
        PPOWDrafter.from_pretrained(BUNDLED / name).check_draft_vocabulary()


@pytest.mark.parametrize("name", HELD)
def test_every_figure_on_a_card_comes_from_the_record(name):
    """The committed cards are what the template says of the recorded files."""
    said = RepoCard.load(BUNDLED / name / "README.md")
    assert said.content == card(BUNDLED / name, f"bundled/{name}", None, said.data.license)


def test_the_card_measures_the_drafting_that_ships():
    metrics = json.loads((BUNDLED / "drafter" / "metrics.json").read_text())
    shipped = GenerationConfig.from_pretrained(BUNDLED / "drafter").to_diff_dict()
    for option in ("window_size", "draft_threshold"):
        assert metrics["drafting"][option] == shipped.get(option, metrics["drafting"][option])


def test_unknown_card():
    with pytest.raises(ValueError, match="there are drafter"):
        render("space", {})
