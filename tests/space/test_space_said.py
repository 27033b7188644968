"""What the Space says of a race and of its drafter: that what was asked for ran, whether a difference is rounding or a
fault, and how the drafter was trained."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch

pytest.importorskip("gradio", reason="the Space needs Gradio: pip install -e '.[space]'")

import gradio as gr
from transformers import GenerationConfig, StoppingCriteria

import figures
import method
import page as pages
import pair as pairs
import race as races
import render
from page import Page
from ppow.drafting_ppow import DraftOptions
from ppow.training.config import DemoConfig, ReinforceConfig
from ppow.training.evaluate import drafting_options, generation_configs
from ppow.transcript_ppow import Acceptance
from race import Settings
from small_pair import DRAFTER, TARGET
from visitor import Visitor

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
    _, runs = run(pair)
    plain, ours = races.PLAIN, "PPOW"
    assert [name for name, *_ in streamed] == [plain, ours, plain, ours, ours, plain, plain, ours]
    assert {(tokens, prompt) for _, tokens, prompt in streamed} == {(24, QUESTION)}
    for made in runs:
        assert len(made.rates) == races.ROUNDS and made.rate == sorted(made.rates)[1]


def test_a_speedup_is_that_of_the_medians_with_its_range_over_the_rounds():
    """By hand: ratios 2, 1.5 and 2.2 of the rounds, 20 / 11 of the medians."""
    plain = finished(races.PLAIN, [10.0, 12.0, 11.0], seconds=10 / 11)
    ours = finished("PPOW", [20.0, 18.0, 24.2], seconds=0.5)
    assert races.speedup(ours, plain) == pytest.approx((20 / 11, 1.5, 2.2))
    shown = render.verdict([plain, ours], 0.0, True)
    assert ">1.82×</strong> <span>as fast with PPOW (rounds: 1.50 to 2.20).</span> <span></span>" in shown


def test_where_a_drafter_does_not_pay_the_page_says_so_and_why():
    """By hand: 5 verifications in 1.25 s are 0.25 s each, as long as 2.5 tokens of 0.1 s; they gain 9 / 5 tokens."""
    plain = finished(races.PLAIN, [10.0, 10.0, 10.0])
    slow = finished("PPOW", [8.0, 7.5, 8.5], seconds=1.25, gained=[1, 2, 2, 2, 2])
    shown = render.verdict([plain, slow], 0.0, True)
    assert ">0.80×</strong> <span>as fast with PPOW (rounds: 0.75 to 0.85).</span> <span>Slower here:" in shown
    assert "as long as 2.5 tokens of the plain target and gained 1.8 on average" in shown


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ([10.5, 9.5, 10.2], "No difference beyond the scatter"),
        ([10.5, 9.5, 9.8], "No difference beyond the scatter"),  # not "slower", though the median is
        ([9.9, 9.5, 9.8], "Slower here"),
        ([10.5, 10.1, 10.2], "<span></span>"),
    ],
)
def test_faster_or_slower_is_said_only_where_all_rounds_agree(rates, says):
    plain = finished(races.PLAIN, [10.0, 10.0, 10.0])
    ours = finished("PPOW", rates, seconds=10 / sorted(rates)[1], gained=[2] * 5)
    shown = render.verdict([plain, ours], 0.0, True)
    assert [text for text in ("Slower here", "No difference beyond the scatter", "<span></span>") if text in shown] == [
        says
    ]


def test_an_answer_says_whose_it_is():
    shown = render.panes([], [races.PLAIN, "PPOW", "stage <1>"], {}, 3)
    for name in (races.PLAIN, "PPOW", "stage &lt;1&gt;"):
        assert shown.count(f'aria-label="answer of {name}"') == 1


def watch(monkeypatch) -> list[races.Run]:
    """The runs of all generations from here on, as they begin."""
    begun, honest = [], races.stream

    def watched(*given):
        for number, found in enumerate(honest(*given)):
            if number == 0:
                begun.append(found)
            yield found

    monkeypatch.setattr(races, "stream", watched)
    return begun


def test_the_system_that_was_stopped_is_marked(pair, monkeypatch):
    """In the second round, whose order is turned around: the plain target, though PPOW is listed last."""
    begun, stop = watch(monkeypatch), races.StopFlag()
    settings = Settings(QUESTION, temperature=2, max_new_tokens=64).check()
    for found in races.race(pair, settings, stop):
        runs = found
        if len(begun) == 6:
            stop.set()
    stop.clear()
    assert [made.name for made in begun] == [races.PLAIN, "PPOW"] + [races.PLAIN, "PPOW"] + ["PPOW", races.PLAIN]
    assert [(made.name, made.stopped, len(made.rates)) for made in runs] == [(races.PLAIN, True, 1), ("PPOW", False, 2)]
    assert "Stopped" in render.verdict(runs, 2, None)


@pytest.mark.parametrize("runs", [1, 2, 4, 8], ids=["warm-up", "warm-up of the drafter", "round 1", "round 3"])
def test_a_visitor_may_leave_at_any_time(pair, monkeypatch, runs):
    begun, stop = watch(monkeypatch), races.StopFlag()
    racing = races.race(pair, Settings(QUESTION, temperature=2, max_new_tokens=64).check(), stop)
    while len(begun) < runs:
        next(racing)
    racing.close()
    assert len(begun) == runs and len(begun[-1].tokens) < 64 and not stop.is_set


def test_nothing_is_drawn_while_it_is_measured(pair, monkeypatch):
    """Behind the warm-up there are empty answers, so that Gradio can end the race, and words on the rounds."""
    monkeypatch.setattr(pages, "AT_REST", 0)
    values = vars(Settings(QUESTION, temperature=2, max_new_tokens=64)).values()
    answers = list(Page(lambda: pair).run(1, *values, Visitor()))
    said = [answer[1].get("html", "") for answer in answers]
    (first,) = (number for number, text in enumerate(said) if "round 1 of 3" in text)
    assert "Warm-up" in said[0] and "html" in answers[first][0]
    measured = answers[first + 1 : -1]
    assert not any("html" in answer[0] for answer in measured)
    assert sum(not any("html" in value for value in answer[:4]) for answer in measured) > 3
    assert [text for text in said[first + 1 : -1] if text] == [render.measuring(done, 3) for done in (1, 2)]


@pytest.mark.parametrize("odd", [1, 2], ids=["warm-up", "first round"])
def test_another_token_in_any_run_is_told(pair, monkeypatch, odd):
    """Not only in the run that is shown."""
    honest, made = races.stream, []

    def tampered(pair, settings, ids, name, stop):
        for found in honest(pair, settings, ids, name, stop):
            if name != races.PLAIN and found.seconds is not None:
                made.append(found)
                if len(made) == odd:
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
    assert "what drafted were chains of 10, ended below joint probability" in shown
    assert "<rect" not in shown and f"{windows} windows so far" in shown and "<polyline" not in shown
    many = page.charts([one] * (30 // windows + 1))
    assert "<rect" in many and "windows so far" not in many
    assert "<polyline" in page.charts([one, {**one, "window": 4, "label": "chain of 4, temperature 0"}])


# -- the drafter's own way of drafting, and what breaks a race off -----------------------------------------------------

A_TREE = {"tree_depth": 3, "tree_top_k": 2, "tree_nodes": 7}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"window_size": 4, "draft_threshold": 0.3}, DraftOptions(4, draft_threshold=0.3, window_schedule="constant")),
        ({"window_size": 6}, DraftOptions(window_size=6)),
        ({"window_size": 6, "window_schedule": "gammatune"}, DraftOptions(6, window_schedule="gammatune")),
        ({"window_size": 10, **A_TREE}, DraftOptions(**A_TREE)),
    ],
    ids=["threshold", "chain", "schedule", "tree"],
)
def test_page_and_demo_draft_alike(pair, own, expected):
    """Without a wish of the visitor: in the controls, in what Reset and links bring, in the API, and in what runs."""
    drafter = copy.copy(pair.drafters["PPOW"])
    drafter.generation_config = GenerationConfig(**own)
    ours = dataclasses.replace(pair, drafters={"PPOW": drafter})
    page = Page(lambda: ours)
    start = page.start()
    _, demo = generation_configs(pair.target, 0.0, 128, drafting_options(DemoConfig()))
    for asked in (demo, races.generation_config(ours, start, drafter)):
        assert DraftOptions.resolve(asked, drafter.generation_config) == expected
    chosen = {"drafting": "tree" if expected.is_tree else "chain"}
    chosen |= {name: value for name, value in own.items() if name in start.options}
    built = page.build().get_config_file()
    controls = {c["props"].get("elem_id"): c["props"].get("value") for c in built["components"]}
    assert {name: controls[name] for name in chosen} == chosen
    scripts = "".join(str(made["js"]) for made in built["dependencies"])
    values = list(vars(start).values())
    assert f"ppow.reset(...[{json.dumps(values)}" in scripts and f"ppow.open(...[{json.dumps(vars(start))}" in scripts
    defaults = {name: given.default for name, given in inspect.signature(page.endpoint(start)).parameters.items()}
    assert {name: defaults[name] for name in chosen} == chosen
    _, runs = run(ours, **chosen)
    assert 0 < max(runs[1].drafted) <= expected.longest


def test_a_window_beyond_what_the_page_allows_is_cut(pair):
    drafter = copy.copy(pair.drafters["PPOW"])
    drafter.generation_config = GenerationConfig(window_size=40)
    start = Settings.own(dataclasses.replace(pair, drafters={"PPOW": drafter}), QUESTION)
    assert start.check().window_size == races.LIMITS["window_size"][1]


@pytest.mark.parametrize("error", [RuntimeError, OSError, gr.Error, torch.OutOfMemoryError])
def test_what_breaks_a_race_off_is_said(pair, monkeypatch, capsys, error):
    """Whatever had been shown: nothing is left that says "Measuring"."""

    def broken(*given):
        yield [races.Run(races.PLAIN)]
        raise error("CUDA out of memory <1>\nand more")

    monkeypatch.setattr(pages, "race", broken)
    page, visitor = Page(lambda: pair), Visitor()
    *_, (panes, status, *_) = page.run(1, *vars(Settings(QUESTION)).values(), visitor)
    assert status["html"] == render.problem("The race broke off: CUDA out of memory <1>")
    assert "waiting" in panes["html"] and visitor.running == {}
    with pytest.raises(gr.Error, match="The race broke off: CUDA out of memory <1>"):
        page.endpoint(page.start())(QUESTION)
    assert capsys.readouterr().err.count("and more") >= 2


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
