"""What the Space says of a race and of its drafter: that what was asked for ran, whether a difference is rounding or a
fault, and how the drafter was trained."""

import copy
import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the Space needs Gradio: pip install -e '.[space]'")

from transformers import StoppingCriteria

import figures
import method
import pair as pairs
import race as races
import render
from page import Page
from ppow.training.config import ReinforceConfig
from ppow.transcript_ppow import Acceptance
from race import Settings

QUESTION = "Tom has 12 apples. He buys 8 more apples. How many apples does he have?"
GIVEN = {"target": "t", "drafter": "d", "data": "x", "output_dir": "o"}
CLOSED = ReinforceConfig(**GIVEN).to_dict()


class Never(StoppingCriteria):
    is_set = False

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] < 0).to(input_ids.device)


@pytest.fixture(scope="module")
def pair():
    return pairs.load_pair(pairs.find_names({}, Path("none.json")))


def run(pair, **settings):
    settings = Settings(QUESTION, **{"max_new_tokens": 24, **settings}).check()
    *_, runs = races.race(pair, settings, Never())
    return settings, runs


def test_drafting_options_reach_a_target_without_a_generation_config(pair):
    target = copy.deepcopy(pair.target)
    target.generation_config._from_model_config = True  # as transformers marks what it took from config.json
    _, runs = run(dataclasses.replace(pair, target=target), window_size=2)
    assert max(runs[1].drafted) == 2


def test_options_that_did_not_run_are_said(pair):
    target = copy.deepcopy(pair.target)
    target.generation_config.tree_nodes = 3  # which asks for a tree, whatever the call says
    with pytest.raises(ValueError, match="window_size=2 was asked for"):
        run(dataclasses.replace(pair, target=target), window_size=2)


def test_a_wrong_token_is_called_a_fault(pair, monkeypatch):
    honest = races.stream

    def tampered(pair, settings, ids, name, stop):
        for found in honest(pair, settings, ids, name, stop):
            if name != races.PLAIN and found.seconds is not None:
                found.steps[-1] = (found.steps[-1][0], [17])
            yield found

    _, runs = run(pair)
    assert runs[1].differences == [] and runs[1].tokens == runs[0].tokens
    monkeypatch.setattr(races, "stream", tampered)
    settings, runs = run(pair)
    assert [found["verdict"] for found in runs[1].differences] == ["fault", "fault"]
    assert "FAULT: PPOW gives other tokens" in render.verdict(runs, 0, False)
    pooled = figures.summarize([figures.record(settings, runs)], "PPOW", Acceptance)
    assert (pooled.identical, pooled.near_ties, pooled.faults) == (0, 0, 1)
    assert "FAULTS" in render.figures_table({"x": {"PPOW": pooled}}, {"x": 0})


def test_what_rounding_explains_is_called_a_near_tie(pair):
    settings, runs = run(pair)
    runs[1].steps.append((9.0, [17]))
    runs[1].differences = [{"verdict": "near tie", "text": "near tie at token 2: <1> and 2"}]
    shown = render.verdict(runs, 0, False)
    assert "Identical but for rounding" in shown and "&lt;1&gt;" in shown and "what the same loop gives" in shown
    pooled = figures.summarize([figures.record(settings, runs)], "PPOW", Acceptance)
    assert (pooled.identical, pooled.near_ties, pooled.faults) == (0, 1, 0)


@pytest.mark.parametrize(
    ("command", "options", "says", "never"),
    [
        ("reinforce", CLOSED, "Every window", "Roll out"),
        ("reinforce", CLOSED, "a supervised loss, LK, at weight 3", "NONE"),
        ("reinforce", {**CLOSED, "supervised_loss": "cst", "all_windows": False}, "loss, CST", "Every window"),
        ("reinforce", {"objective": "ppow", "estimator": "rollout", "group_size": 4}, "4 windows of", "closed form"),
        ("reinforce", {"objective": "lk", "estimator": "exact"}, "<code>lk</code>", "Roll out"),
        ("supervised", {}, "stage 1 only", "Roll out"),
        ("import", {}, "was not recorded", "closed form"),
        ("reinforce", "?", "was not recorded", "closed form"),
    ],
)
def test_the_method_follows_the_record(command, options, says, never):
    shown = method.page({"command": command, "config": options})
    assert says in shown and never not in shown and "2605.14978" in shown


def test_the_bundled_drafters_method_is_the_closed_form(pair, tmp_path):
    assert pair.trained["config"]["estimator"] == "exact"
    shown = Page(lambda: pair).method()
    assert "no rollouts" in shown and "LK, at weight 3" in shown
    assert pairs.record_of(str(tmp_path)) is None and pairs.record_of("nobody/nothing") is None
    odd = {"command": "reinforce", "config": {**CLOSED, "cost_ratio": "?"}}
    assert "was not recorded" in Page(lambda: dataclasses.replace(pair, trained=odd)).method()
