"""What the Space says of a race and of its drafter: that what was asked for ran, whether a difference is rounding or a
fault, and how the drafter was trained."""

import copy
import dataclasses

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
from small_pair import DRAFTER, TARGET

QUESTION = "Tom has 12 apples. He buys 8 more apples. How many apples does he have?"
GIVEN = {"target": "t", "drafter": "d", "data": "x", "output_dir": "o"}
CLOSED = ReinforceConfig(**GIVEN).to_dict()


class Never(StoppingCriteria):
    is_set = False

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] < 0).to(input_ids.device)


@pytest.fixture(scope="module")
def pair():
    return pairs.load_pair(pairs.Names(str(TARGET), str(DRAFTER)))


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


# -- how a race is measured --------------------------------------------------------------------------------------------


def finished(name, rates, seconds=1.0, gained=(), tokens=10):
    """A median run of ``tokens`` tokens in ``seconds``, with the rates of its rounds."""
    return races.Run(name, [(seconds, [7] * tokens)], seconds, gained=list(gained), rates=rates)


def test_a_race_warms_up_on_its_own_prompt_then_turns_the_order_around(pair, monkeypatch):
    streamed, honest = [], races.stream

    def watched(pair, settings, ids, name, stop):
        streamed.append((name, settings.max_new_tokens, settings.prompt))
        return honest(pair, settings, ids, name, stop)

    monkeypatch.setattr(races, "stream", watched)
    _, runs = run(pair, max_new_tokens=races.WARM_TOKENS + 8)
    plain, ours = races.PLAIN, "PPOW"
    assert [name for name, *_ in streamed] == [plain, ours, plain, ours, ours, plain, plain, ours]
    assert [tokens for _, tokens, _ in streamed] == [races.WARM_TOKENS] * 2 + [races.WARM_TOKENS + 8] * 6
    assert {prompt for *_, prompt in streamed} == {QUESTION}
    for made in runs:
        assert len(made.rates) == races.ROUNDS and made.rate == sorted(made.rates)[1]


def test_a_speedup_is_that_of_the_medians_with_its_range_over_the_rounds():
    """By hand: ratios 2, 1.5 and 2.2 of the rounds, 20 / 11 of the medians."""
    plain = finished(races.PLAIN, [10.0, 12.0, 11.0], seconds=10 / 11)
    ours = finished("PPOW", [20.0, 18.0, 24.2], seconds=0.5)
    assert races.speedup(ours, plain) == pytest.approx((20 / 11, 1.5, 2.2))
    shown = render.verdict([plain, ours], 0.0, True)
    assert (
        ">1.82×</strong> <span>1.50 to 2.20</span>" in shown and "slower here" not in shown and "scatter" not in shown
    )


def test_where_a_drafter_does_not_pay_the_page_says_so_and_why():
    """By hand: 5 verifications in 1.25 s are 0.25 s each, as long as 2.5 tokens of 0.1 s; they gain 9 / 5 tokens."""
    plain = finished(races.PLAIN, [10.0, 10.0, 10.0])
    slow = finished("PPOW", [8.0, 7.5, 8.5], seconds=1.25, gained=[1, 2, 2, 2, 2])
    shown = render.verdict([plain, slow], 0.0, True)
    assert "0.80×" in shown and "slower here with PPOW" in shown
    assert "as long as 2.5 tokens of the plain target and gained 1.8 on average" in shown
    even = finished("PPOW", [10.5, 9.5, 10.2], seconds=1 / 1.02)
    assert "within the scatter of the rounds" in render.verdict([plain, even], 0.0, True)


def test_another_token_in_any_round_is_told(pair, monkeypatch):
    """Not only in the round that is shown."""
    honest, made = races.stream, []

    def tampered(pair, settings, ids, name, stop):
        for found in honest(pair, settings, ids, name, stop):
            if name != races.PLAIN and found.seconds is not None:
                made.append(found)
                if len(made) == 2:  # the first behind the warm-up
                    found.steps[-1] = (found.steps[-1][0], [17])
                    found.seconds *= 100
            yield found

    monkeypatch.setattr(races, "stream", tampered)
    settings, runs = run(pair)
    assert runs[1].tokens == runs[0].tokens and races.identical(runs, 0) is False
    assert "fault" in [found["verdict"] for found in runs[1].differences]
    assert figures.record(settings, runs)["systems"]["PPOW"]["verdicts"]


def test_a_handful_of_windows_is_shown_as_numbers(pair):
    page = Page(lambda: pair)
    settings, runs = run(pair)
    one = figures.record(settings, runs)
    windows = len(one["systems"]["PPOW"]["gained"])
    assert 0 < windows < 30
    shown = page.charts([one])
    assert "<rect" not in shown and f"{windows} windows so far" in shown and "<polyline" not in shown
    many = page.charts([one] * (30 // windows + 1))
    assert "<rect" in many and "windows so far" not in many
    assert "<polyline" in page.charts([one, {**one, "window": 4, "label": "chain of 4, temperature 0"}])


# -- how the drafter was trained ---------------------------------------------------------------------------------------


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


def test_a_drafter_of_the_default_recipe_has_the_closed_form_for_its_method(pair, tmp_path):
    assert pair.trained["config"]["estimator"] == "exact"
    shown = Page(lambda: pair).method()
    assert "no rollouts" in shown and "LK, at weight 3" in shown
    assert pairs.record_of(str(tmp_path)) is None and pairs.record_of("nobody/nothing") is None
    odd = {"command": "reinforce", "config": {**CLOSED, "cost_ratio": "?"}}
    assert "was not recorded" in Page(lambda: dataclasses.replace(pair, trained=odd)).method()
