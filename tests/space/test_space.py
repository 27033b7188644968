"""The Space without a browser: its parts, its figures against ``ppow evaluate``, and its API under load and abuse."""

import dataclasses
import html
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gradio", reason="the Space needs Gradio: pip install -e '.[space]'")

from gradio import Error
from gradio_client import Client
from gradio_client.exceptions import AppError

import figures
import inside
import pair as pairs
import render
from decoding_helpers import block_drafter, build_target, random_drafter
from hub.ports import reserved_port
from page import PARTS, Page, arrives
from ppow import PPOWDrafter
from ppow.drafting_ppow import DrafterState
from ppow.training import evaluate, smollm2, space, windows
from ppow.training.cli import main as ppow
from ppow.transcript_ppow import Acceptance
from race import MAX_CHARACTERS, PLAIN, ROUNDS, Run, Settings, StopFlag, prompt_ids, race
from small_pair import DRAFTER, TARGET
from text import pieces, visible
from visitor import KEPT, Visitor

pytest_plugins = ["space_helpers"]
ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = [
    "Tom has 12 apples. He buys 8 more apples. How many apples does he have?",
    "I want to book a table at a restaurant.",
    "Write a Python function that adds two numbers.",
]
CHAIN = {"window_size": 6}
TREE = {"drafting": "tree", "tree_depth": 4, "tree_top_k": 3, "tree_nodes": 12}
ODD_TEXTS = [
    "<script>alert(1)</script><b>bold</b> &amp; \"quotes\" 'too'",
    "שלום עולם, مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇺🇳 e\u0301 \u202etfel",
    "line one\nline two\tand a tab",
]
BAD_PROMPTS = {
    "": "prompt is empty",
    "  \n\t ": "prompt is empty",
    "x" * 100_000: "100,000 characters; at most 4,000",
    "a\x00b\x1b[31m": r"control characters \(U\+0000, U\+001B\)",
}
OUT_OF_RANGE = [
    ({"temperature": -0.1}, "temperature must be a number from 0.0 to 2.0, got -0.1"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"window_size": 0}, "window_size must be a whole number from 1 to 16, got 0"),
    ({"window_size": 3.5}, "window_size must be a whole number"),
    ({"tree_nodes": 10**9}, "tree_nodes must be a whole number from 1 to 128"),
    ({"max_new_tokens": 10**6}, "max_new_tokens must be a whole number from 8 to 256"),
    ({"seed": -1}, "seed must be a whole number"),
    ({"seed": True}, "seed must be a whole number"),
    ({"seed": None}, "seed must be a whole number"),
    ({"drafting": "<b>forest</b>"}, "Drafting must be 'chain' or 'tree'"),
]


@pytest.fixture(scope="module")
def pair():
    return pairs.load_pair(pairs.Names(str(TARGET), str(DRAFTER)))


def run(pair, prompt: str = QUESTIONS[0], **settings) -> tuple[Settings, list[Run]]:
    """One finished race."""
    settings = Settings(prompt, **{"max_new_tokens": 48, **settings}).check()
    *_, runs = race(pair, settings, StopFlag())
    return settings, runs


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.items(), ids=["empty", "blank", "long", "control"])
def test_prompts_that_cannot_be_answered_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        Settings(prompt).check()


@pytest.mark.parametrize(("given", "message"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings("Hello", **given).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", [1], {"a": 1}])
def test_values_of_any_other_kind_are_refused(value):
    for field in dataclasses.fields(Settings):
        with pytest.raises(ValueError):
            Settings(**{"prompt": "Hello", field.name: value}).check()


@pytest.mark.parametrize("prompt", [*ODD_TEXTS, "x" * MAX_CHARACTERS])
def test_odd_texts_pass(prompt):
    assert Settings(prompt).check().prompt == prompt


def test_whole_numbers_may_come_as_floats():
    settings = Settings("Hello", window_size=4.0, max_new_tokens=16.0).check()
    assert settings.options == {"window_size": 4}
    assert isinstance(settings.max_new_tokens, int)


# -- text and HTML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*ODD_TEXTS, " leading", "日本語のテキスト", "👍" * 5])
def test_pieces_add_up_to_the_text(pair, text):
    ids = pair.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(pair.tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == pair.tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


def test_pieces_of_half_a_character(pair):
    ids = pair.tokenizer("👍", add_special_tokens=False)["input_ids"][:-1]
    assert ids and "".join(pieces(pair.tokenizer, ids)) == pair.tokenizer.decode(ids)


def test_visible_pieces_are_safe_and_show_blanks():
    assert visible("  a\n") == "␣␣a⏎"
    assert visible("<script>") == "&lt;script&gt;"


def test_kinds_of_tokens():
    """Windows of 3: all accepted and a bonus; one accepted and a correction; cut by the end; nothing drafted."""
    steps = [(0.1, [1]), (0.2, [2, 3, 4, 5]), (0.3, [6, 7]), (0.4, [8]), (0.5, [9])]
    made = Run("PPOW", steps, 0.5, drafted=[3, 3, 3, 0], accepted=[3, 1, 2, 0], gained=[4, 2, 1, 1])
    a, b, own = "accepted", "bonus", "own"
    assert render.kinds(made, 3) == [own, a, a, a, b, a, own, a, own]


def test_text_is_escaped_wherever_it_is_shown():
    evil = '<img src=x onerror="alert(1)">'
    made = Run("PPOW", [(0.1, [0])], 0.5)
    window = {
        "nodes": [0, 0], "parents": [0, 0], "path": [], "drafted": 1, "accepted": 0, "gained": [0], "own": 0,
        "target_top": [[0, 0.5]], "draft_top": [[0, 0.5]], "criticality": [0.1], "exact": True,
    }  # fmt: skip
    pages = [
        render.panes([Run(PLAIN, [(0.1, [0])], 1.0), made], [PLAIN, "PPOW"], {PLAIN: [evil], "PPOW": [evil]}, 3),
        render.window(window, {0: evil}),
        render.stepper({evil: [window]}, {0: evil}),
        render.problem(evil),
        render.note(evil),
    ]
    for page in pages:
        assert "<img" not in page
        assert html.escape(evil) in page


# -- which pair --------------------------------------------------------------------------------------------------------


def test_the_pair_is_named_by_environment_or_file(tmp_path):
    file = tmp_path / "pair.json"
    file.write_text(json.dumps({"target": "o/t", "target_revision": "1", "drafter": "o/d", "drafter_revision": "2"}))
    assert pairs.find_names({}, file) == pairs.Names("o/t", "o/d", None, "1", "2")
    named = {"PPOW_TARGET": "a", "PPOW_DRAFTER": "b", "PPOW_BASELINE": "c"}
    assert pairs.find_names(named, file) == pairs.Names("a", "b", "c")
    with pytest.raises(ValueError, match="No pair to load: put pair.json beside app.py"):
        pairs.find_names({}, tmp_path / "none.json")


def test_half_a_pair_is_refused(tmp_path):
    with pytest.raises(ValueError, match="both PPOW_TARGET and PPOW_DRAFTER"):
        pairs.find_names({"PPOW_TARGET": "a"}, tmp_path / "none.json")
    for content in ("{", '{"target": "a"}', '{"target": "a", "drafter": "b", "draft": 1}', "[1]"):
        (tmp_path / "pair.json").write_text(content)
        with pytest.raises(ValueError, match="pair.json must be an object with target, drafter"):
            pairs.find_names({}, tmp_path / "pair.json")


def test_what_cannot_be_loaded_is_said(tmp_path, pair):
    target, drafter = pair.names.target, pair.names.drafter
    with pytest.raises(ValueError, match="The target no-such-org/no-such-model could not be loaded"):
        pairs.load_pair(pairs.Names("no-such-org/no-such-model", drafter))
    with pytest.raises(ValueError, match="The drafter no-such-org/no-such-model could not be loaded"):
        pairs.load_pair(pairs.Names(target, "no-such-org/no-such-model"))
    with pytest.raises(ValueError, match="not a PPOW drafter"):
        pairs.load_pair(pairs.Names(target, target))
    shutil.copytree(drafter, tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match="The drafter .*cut could not be loaded"):
        pairs.load_pair(pairs.Names(target, str(tmp_path / "cut")))
    other = build_target(vocab_size=64)
    random_drafter(other).save_pretrained(tmp_path / "drafter")
    with pytest.raises(ValueError, match="drafter"):
        pairs.load_pair(pairs.Names(target, str(tmp_path / "drafter")))


# -- inside a window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafting", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_windows_are_those_that_were_drafted(pair, monkeypatch, drafting, question):
    """At temperature 0 the windows that are drafted again after the race equal the ones verified during it."""
    verified = []
    name = drafting.get("drafting", "chain")
    original = getattr(DrafterState, name)
    monkeypatch.setattr(DrafterState, name, lambda *a, **k: verified.append(original(*a, **k)) or verified[-1])
    settings, runs = run(pair, question, **drafting)
    monkeypatch.setattr(DrafterState, name, original)
    found = inside.look_inside(pair, pair.drafters["PPOW"], prompt_ids(pair, settings), runs[1], settings)
    drafted = [w for w in found if w["drafted"]]
    verified = verified[-len(drafted) :]  # behind the warm-up and the rounds before, which drafted the same
    assert [w["nodes"] for w in drafted] == [w.tokens[0].tolist() for w in verified]
    assert [w["parents"] for w in drafted] == [w.parents[0].tolist() for w in verified]
    check_windows(found, runs[1])


@pytest.mark.parametrize("drafting", [CHAIN, TREE], ids=["chain", "tree"])
def test_windows_of_a_sampled_race(pair, drafting):
    settings, runs = run(pair, temperature=1.0, seed=3, **drafting)
    found = inside.look_inside(pair, pair.drafters["PPOW"], prompt_ids(pair, settings), runs[1], settings)
    check_windows(found, runs[1], greedy=False)


def test_windows_of_a_block_drafter(pair, monkeypatch):
    monkeypatch.setitem(pair.drafters, "PPOW", block_drafter(pair.target, markov_rank=4))
    settings, runs = run(pair, QUESTIONS[0], window_size=5)
    found = inside.look_inside(pair, pair.drafters["PPOW"], prompt_ids(pair, settings), runs[1], settings)
    check_windows(found, runs[1])
    assert all(len(w["criticality"]) == min(len(w["path"]) + 1, w["drafted"]) for w in found[:-1])


def check_windows(found: list[dict], made: Run, greedy: bool = True) -> None:
    """The windows tell the run's own story: its tokens, its counts, and the target's choice at every break."""
    assert [made.tokens[0], *(token for w in found for token in w["gained"])] == made.tokens
    for w, drafted, accepted, gained in zip(found, made.drafted, made.accepted, made.gained):
        assert (w["drafted"], w["accepted"], len(w["gained"])) == (drafted, accepted, gained)
        assert [w["nodes"][node] for node in w["path"]] == w["gained"][: len(w["path"])]
        assert (w["own"] is None) == (gained <= accepted)
        assert all(value >= -1e-5 for value in w["criticality"])
        if greedy and w["own"] is not None:
            assert w["own"] == w["target_top"][0][0]
            assert w["own"] not in [w["nodes"][node] for node in render.rejected(w)]


def test_criticality_is_that_of_the_training():
    target, draft = torch.randn(2, 5, 17)
    expected = windows.criticality(target.log_softmax(-1), draft.log_softmax(-1))
    assert torch.allclose(inside.criticality(target, draft), expected)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_defined_as_evaluate_defines_them(pair):
    """The same measurements, seconds included, given to both."""
    races = [run(pair, question, **CHAIN) for question in QUESTIONS]
    samples = [
        evaluate.Sample(
            number, len(plain.tokens), plain.seconds, len(ours.tokens), ours.seconds, ours.gained, ours.accepted,
            ours.drafted, plain.tokens == ours.tokens, evaluate.ends_in_a_loop(ours.tokens),
        )
        for number, (_, (plain, ours)) in enumerate(races)
    ]  # fmt: skip
    expected = evaluate.summarize(samples, resamples=10, seed=0)
    found = figures.summarize([figures.record(*one) for one in races], "PPOW", Acceptance)
    for name in ("acceptance_length", "per_position", "tokens_per_second", "plain_tokens_per_second", "speedup"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-12), name
    assert (found.races, found.identical) == (expected["prompts"], expected["identical"])
    gained = [tokens for sample in samples for tokens in sample.gained]
    assert found.histogram == [gained.count(n) for n in range(1, max(gained) + 1)]


@pytest.mark.parametrize("drafting", [CHAIN, TREE], ids=["chain", "tree"])
def test_figures_equal_those_that_the_command_evaluate_writes(pair, tmp_path, drafting):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    arguments = [f"--target={pair.names.target}", f"--drafter={pair.names.drafter}", "--warmup=0", "--repetitions=1"]
    arguments += [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output-dir={tmp_path / 'out'}", "--max-new-tokens=48"]
    arguments += [f"--{name}={value}" for name, value in drafting.items() if name != "drafting"]
    assert ppow(["evaluate", *arguments, "--temperatures=0"]) == 0
    expected = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]["prompts T=0"]
    found = figures.summarize([figures.record(*run(pair, q, **drafting)) for q in QUESTIONS], "PPOW", Acceptance)
    assert found.acceptance_length == pytest.approx(expected["acceptance_length"], rel=1e-12)
    assert found.per_position == pytest.approx(expected["per_position"], rel=1e-12)
    assert found.identical == expected["identical"] == len(QUESTIONS)


def test_stage_1_races_against_ppow_when_both_are_given(pair):
    """Three systems: every pane, every window and every chart tells the two drafters apart."""
    baseline = random_drafter(pair.target)
    both = dataclasses.replace(pair, drafters=pair.drafters | {"stage 1": baseline})
    page = Page(lambda: both)
    shown, visitor = ask(page, QUESTIONS[1], max_new_tokens=24)
    assert shown["panes"].count('class="pane done"') == 3 and "with stage 1" in shown["panes"]
    assert "Identical output" in shown["status"] and "with stage 1" in shown["status"]
    lengths = {name: len(made["gained"]) for name, made in visitor.races[0]["systems"].items() if name != PLAIN}
    assert lengths["stage 1"] > lengths["PPOW"]
    found = views(shown["inside"])
    assert {name: len(windows) for name, windows in found.items()} == lengths
    assert found["stage 1"][0] != found["PPOW"][0]
    assert found["PPOW"][0] in shown["inside"] and f"Verification 1 of {lengths['PPOW']}" in shown["inside"]
    assert shown["figures"].count("<td>stage 1</td>") == shown["figures"].count("<td>PPOW</td>") == 1
    assert shown["figures"].count("<th scope='row'>stage 1</th>") == 2  # per position, and by tokens gained


def ask(page: Page, prompt: str, press: int = 1, visitor: Visitor | None = None, **settings) -> tuple[dict, Visitor]:
    """A race from the page to its end: -> what the parts of the page show then, and the visitor."""
    visitor, shown = visitor or Visitor(), {}
    for answer in page.run(press, *vars(Settings(prompt, **settings)).values(), visitor):
        assert len(answer) == len(PARTS) + 1
        for name, value in zip(PARTS, answer):
            if "html" in value:  # not skipped
                assert value["press"] == press
                shown[name] = value["html"]
    return shown, visitor


def views(stepper: str) -> dict[str, list[str]]:
    """All windows that come along with a stepper."""
    return json.loads(html.unescape(re.search('data-windows="([^"]*)"', stepper)[1]))


def test_every_window_comes_along_with_the_race(pair):
    shown, visitor = ask(Page(lambda: pair), QUESTIONS[0], max_new_tokens=48)
    _, (_, ours) = run(pair)
    (found,) = views(shown["inside"]).values()
    facts = [re.search("<strong>(.*?)</strong>", view)[1] for view in found]
    assert len(facts) == len(ours.drafted)
    for fact, drafted, accepted in zip(facts, ours.drafted, ours.accepted):
        assert drafted == 0 or f"{accepted} of {drafted}" in fact or (accepted == drafted and f"All {drafted}" in fact)
    assert visitor.running == {} and len(visitor.races) == 1


def test_an_answer_without_a_window_has_a_stepper_all_the_same():
    shown = render.stepper({"PPOW": [], "stage 1": []}, {})
    assert views(shown) == {"PPOW": [render.NO_WINDOW], "stage 1": [render.NO_WINDOW]}


def test_only_the_newest_press_of_a_visitor_goes_on():
    """Whatever order the requests come in: a press ends the races of older ones, Stop its own and older ones."""
    visitor = Visitor()
    first, third = visitor.begin(1), visitor.begin(3)
    assert first.is_set and not third.is_set
    assert visitor.begin(2).is_set and not third.is_set  # has been overtaken by the third
    assert visitor.begin(3) is third
    visitor.stop(4)
    assert third.is_set and visitor.begin(4).is_set and not visitor.begin(5).is_set
    assert not Visitor().begin(1).is_set  # another tab
    flags = list(visitor.running.values())
    for press in range(1, 6):
        visitor.end(press)
    assert visitor.running == {} and not any(flag.is_set for flag in flags)


def test_reset_forgets_races_that_have_yet_to_end():
    visitor = Visitor()
    for press in range(1, KEPT + 3):
        visitor.keep(press, {"press": press})
    assert [visitor.races[0], visitor.races[-1], len(visitor.races)] == [{"press": 3}, {"press": KEPT + 2}, KEPT]
    running = visitor.begin(KEPT + 3)
    visitor.reset(KEPT + 4)
    visitor.keep(KEPT + 3, {"press": "late"})
    assert running.is_set and visitor.races == []
    visitor.keep(KEPT + 5, {"press": "new"})
    assert visitor.races == [{"press": "new"}]


def test_a_press_that_was_overtaken_while_it_waited_costs_next_to_nothing(pair):
    page, visitor = Page(lambda: pair), Visitor()
    values = [*vars(Settings(QUESTIONS[0])).values(), visitor]
    assert arrives(1, *values) == [None] * len([1, *values])  # one verdict per input
    arrives(2, *values)
    shown, _ = ask(page, QUESTIONS[0], 1, visitor)
    assert "Stopped" in shown["status"] and "Run a race" not in shown["inside"]
    assert visitor.races == [] and list(visitor.running) == [2]


def load_app():
    """``app.py`` as a module of its own."""
    spec = importlib.util.spec_from_file_location("app_under_test", ROOT / "space" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def test_a_zero_gpu_gets_the_race(tmp_path, monkeypatch):
    """Where the package ``spaces`` is installed, its decorator wraps the generator that computes, once."""
    (tmp_path / "spaces.py").write_text(
        "from types import SimpleNamespace as N\nconfig, wrapped = N(Config=N(zero_gpu=True)), []\n"
        "def GPU(duration):\n    return lambda compute: wrapped.append((compute.__name__, duration)) or compute\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app = load_app()
    spaces = sys.modules.pop("spaces")
    app.Page(app.load, app.ON_DEVICE)
    assert app.ZERO_GPU and spaces.wrapped == [("_compute", app.ROUND_SECONDS * (1 + ROUNDS))]


def test_a_pair_that_does_not_run_here_is_said(monkeypatch):
    """As one that a GPU has no memory for: the page stands, and tries again with the next visitor."""
    monkeypatch.setenv("PPOW_TARGET", "some/target")
    monkeypatch.setenv("PPOW_DRAFTER", "some/drafter")
    app, tried = load_app(), []

    def full(*given):
        tried.append(given)
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(app, "load_pair", full)
    for _ in range(2):
        with pytest.raises(ValueError, match="some/target and its drafter do not run here: CUDA out of memory$"):
            app.load()
    assert len(tried) == 2 and "CUDA out of memory" in app.Page(app.load).header()


def test_what_is_shown_first_is_the_first_that_is_generated(pair, monkeypatch):
    calls, generate = [], pair.target.generate
    monkeypatch.setattr(pair.target, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    settings = Settings(QUESTIONS[0], temperature=2, max_new_tokens=256).check()
    runs = race(pair, settings, StopFlag())
    shown = next(run for shown in runs for run in shown if run.tokens)
    assert shown.name == PLAIN and len(calls) == 1
    runs.close()


def test_a_stopped_race_keeps_what_was_written(pair):
    stop, settings = StopFlag(), Settings(QUESTIONS[0], temperature=2, max_new_tokens=256).check()
    for runs in race(pair, settings, stop):  # a text that does not come to an end before it is looked at
        if len(runs[-1].tokens) >= 5:
            stop.set()
    stop.clear()
    assert [made.name for made in runs] == [PLAIN]
    assert runs[0].stopped and 5 <= len(runs[0].tokens) < 256


def test_a_visitor_who_leaves_frees_the_machine(pair):
    stop = StopFlag()
    racing = race(pair, Settings(QUESTIONS[0], temperature=2, max_new_tokens=256).check(), stop)
    (left,) = next(racing)
    racing.close()
    assert len(left.tokens) < 256  # such texts do not come to an end by themselves
    _, runs = run(pair, max_new_tokens=8)
    assert len(runs) == 2 and not any(made.stopped for made in runs)
    assert not stop.is_set


# -- the API -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


def test_the_api_has_one_documented_endpoint(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/race"]
    parameters = {p["parameter_name"]: p for p in endpoints["/race"]["parameters"]}
    assert list(parameters) == [field.name for field in dataclasses.fields(Settings)]
    for field in dataclasses.fields(Settings):
        if field.name != "prompt":
            assert parameters[field.name]["parameter_default"] == field.default


def test_a_race_through_the_api(client, pair):
    answer = client.predict(prompt=QUESTIONS[0], max_new_tokens=48, **CHAIN, api_name="/race")
    settings, expected = run(pair, **CHAIN)
    assert answer["settings"] == vars(settings)
    assert answer["identical"] is True
    plain, ours = answer["systems"][PLAIN], answer["systems"]["PPOW"]
    assert plain["tokens"] == ours["tokens"] == expected[0].tokens
    assert ours["text"] == pair.tokenizer.decode(ours["tokens"], skip_special_tokens=True)
    assert (ours["drafted"], ours["accepted"], ours["gained"]) == tuple(
        getattr(expected[1], name) for name in ("drafted", "accepted", "gained")
    )
    assert ours["speedup"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"])
    for one in (plain, ours):
        assert one["tokens_per_second"] == pytest.approx(len(one["tokens"]) / one["seconds"])
        moments = [moment for moment, _ in one["steps"]]
        assert moments == sorted(moments) and moments[-1] <= one["seconds"]
        assert sum(count for _, count in one["steps"]) == len(one["tokens"])
    assert [count for _, count in ours["steps"][1:]] == ours["gained"]


def test_a_sampled_race_repeats_by_its_seed(client):
    def ask(seed: int):
        return client.predict(prompt=QUESTIONS[1], temperature=1.0, seed=seed, max_new_tokens=24, api_name="/race")

    one, same, other = ask(1), ask(1), ask(2)
    assert one["identical"] is None
    tokens = [answer["systems"]["PPOW"]["tokens"] for answer in (one, same, other)]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("prompt", ODD_TEXTS)
def test_odd_texts_are_answered(client, prompt):
    answer = client.predict(prompt=prompt, max_new_tokens=8, **TREE, api_name="/race")
    assert answer["settings"]["prompt"] == prompt
    assert answer["identical"] is True


def test_bad_input_is_answered_with_a_message_and_the_server_goes_on(client, server):
    told = len(server.log.read_text())
    cases = [({"prompt": prompt}, message) for prompt, message in BAD_PROMPTS.items()]
    cases += [({"prompt": "Hello", **given}, message) for given, message in OUT_OF_RANGE]
    for given, message in cases:
        with pytest.raises(AppError) as error:
            client.predict(**given, api_name="/race")
        assert re.search(message, str(error.value)), (given, str(error.value))
    with pytest.raises(AppError, match="tokens"):
        client.predict(prompt="👩🇺🇳" * 1300, max_new_tokens=256, api_name="/race")  # few characters, many tokens
    assert client.predict(prompt="Hello", max_new_tokens=8, api_name="/race")["identical"] is True
    assert "Traceback" not in server.log.read_text()[told:]


def test_twenty_visitors_at_once_each_get_their_own(server):
    """All are queued and answered, each with its own prompt and settings, and with the text that it gets alone."""
    asked = [
        {"prompt": f"Visitor {n} has {n} apples and eats {n % 5}.", "max_new_tokens": 8 + n // 4, "seed": n}
        | (TREE if n % 2 else {"window_size": 2 + n % 9})
        for n in range(20)
    ]
    clients = [Client(server.url, verbose=False) for _ in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        jobs = [pool.submit(c.predict, **one, api_name="/race") for c, one in zip(clients, asked)]
        together = [job.result() for job in jobs]
    for one, answer in zip(asked, together):
        assert {name: answer["settings"][name] for name in one} == one
        assert answer["identical"] is True
    alone = [clients[0].predict(**one, api_name="/race") for one in asked[:3]]
    for one, answer in zip(alone, together):
        assert one["systems"]["PPOW"]["tokens"] == answer["systems"]["PPOW"]["tokens"]


@pytest.mark.parametrize("runs", [15, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(1200)
def test_memory_stays_flat(client, server, runs):
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc, which this system lacks")

    def go(count: int) -> float:
        for n in range(count):
            client.predict(prompt=f"Question {n}: what is {n} + {n}?", max_new_tokens=16, seed=n, api_name="/race")
        return server.megabytes()

    before, after = go(runs // 3), go(runs - runs // 3)
    print(f"memory after {runs // 3} races {before:.0f} MB, after {runs} {after:.0f} MB")
    assert after - before < 10


# -- as a repository of the Hub ----------------------------------------------------------------------------------------

ON_THE_HUB = """
import json, sys
sys.modules["ppow"] = None  # not installed there
from page import Page
from pair import find_names, load_pair
pair = load_pair(find_names())
from figures import record, summarize
from race import Settings, StopFlag, prompt_ids, race
from inside import look_inside
page = Page(lambda: pair)
page.build()
settings = Settings("I want to book a table.", max_new_tokens=24).check()
for runs in race(pair, settings, StopFlag()): pass
found = look_inside(pair, pair.drafters["PPOW"], prompt_ids(pair, settings), runs[1], settings)
length = summarize([record(settings, runs)], "PPOW", pair.part("transcript_ppow").Acceptance).acceptance_length
page.charts([record(settings, runs)])
print(json.dumps({"windows": len(found), "identical": runs[0].tokens == runs[1].tokens, "length": length}))
"""


def test_it_runs_from_its_own_folder_with_a_drafter_that_brings_its_code(tmp_path):
    """As on the Hub: the folder alone, a pair.json, and a drafter repository with its code, without our package."""
    shutil.copytree(ROOT / "space", tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    PPOWDrafter.from_pretrained(DRAFTER).save_pretrained(tmp_path / "drafter")
    names = {"target": str(TARGET), "drafter": str(tmp_path / "drafter"), "baseline": None}
    names |= {"target_revision": None, "drafter_revision": None}
    (tmp_path / "space" / "pair.json").write_text(json.dumps(names))
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB], cwd=tmp_path / "space", capture_output=True, text=True, timeout=280,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(tmp_path / "space")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["identical"] and answer["windows"] and answer["length"] > 1


def test_the_front_matter_and_the_pins_agree():
    front = (ROOT / "space" / "README.md").read_text().split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    wanted = "title emoji colorFrom colorTo sdk sdk_version python_version app_file license short_description"
    assert {*wanted.split(), "suggested_hardware", "models"} <= fields.keys()
    assert len(fields["short_description"]) <= 60
    assert (ROOT / "space" / fields["app_file"]).exists()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "space" / "requirements.txt").read_text(), re.M))
    assert pins["gradio"] == fields["sdk_version"]
    assert {"gradio", "torch", "transformers"} <= pins.keys()


def test_a_bad_call_of_the_command_is_said(capsys):
    assert ppow(["space", "--target", "somewhere"]) == 2
    assert "give both or neither" in capsys.readouterr().err


def test_without_names_the_page_shows_the_demos_pair(monkeypatch):
    shown = []
    app = SimpleNamespace(launch=lambda **options: shown.append((pairs.find_names(), options["server_port"])))
    monkeypatch.setattr(space, "importlib", SimpleNamespace(util=importlib.util, import_module=lambda name: app))
    monkeypatch.setattr(smollm2, "demo_pair", lambda: (str(TARGET), str(DRAFTER)))
    for name in ("PPOW_TARGET", "PPOW_DRAFTER"):
        monkeypatch.setenv(name, "")
    assert ppow(["space", "--port", "0"]) == 0
    assert shown == [(pairs.Names(str(TARGET), str(DRAFTER)), 0)]
    assert [pairs.title(name) for name in (str(TARGET), "ORG/NAME", "/c/models--ORG--NAME/snapshots/1a")] == [
        "target", "ORG/NAME", "ORG/NAME"
    ]  # fmt: skip


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(space, "importlib", SimpleNamespace(util=importlib.util))  # it would import the page
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            assert ppow(["space", "--port", str(port), "--host", host]) == 2
            assert f"--port {port}: {host}:{port} cannot be listened on (Address" in (error := capsys.readouterr().err)
            assert "name another --port" in error and "GRADIO" not in error


def test_a_page_without_a_pair_says_so(monkeypatch, capsys):
    """A wrong Hub id: the page stands, and every race says what is wrong."""
    monkeypatch.setenv("PPOW_TARGET", "no-such-org/no-such-model")
    monkeypatch.setenv("PPOW_DRAFTER", str(DRAFTER))
    app = load_app()
    with reserved_port() as port:
        _, url, _ = app.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
        assert "ppow space: The target no-such-org/no-such-model could not be loaded" in capsys.readouterr().out
        client = Client(url, verbose=False)
        for _ in range(2):
            with pytest.raises(AppError, match="The target no-such-org/no-such-model could not be loaded"):
                client.predict(prompt="Hello", api_name="/race")


def test_drafter_of_another_target_in_the_page(tmp_path, pair):
    """Said in the head of the page, to every race and through the API; the page stands all the same."""
    random_drafter(build_target(vocab_size=64)).save_pretrained(tmp_path / "d")
    page = Page(lambda: pairs.load_pair(pairs.Names(pair.names.target, str(tmp_path / "d"))))
    page.build()
    shown, visitor = ask(page, "Hello")
    assert "waiting" in shown["panes"] and visitor.races == []
    for said in (page.header(), shown["status"]):
        assert "role='alert'" in said.replace('"', "'") and "drafter" in said
    with pytest.raises(Error, match="drafter"):
        page.endpoint(page.start())("Hello")
