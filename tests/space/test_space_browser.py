"""The Space in a real browser. Screenshots stay in PPOW_SCREENSHOTS, or in pytest's own folder, to be looked at.

The picture of docs/share.md is made here, of the demo's own pair (which is fetched where it is not in PPOW_CACHE)::

    PPOW_PICTURE=1 pytest tests/space/test_space_browser.py -k picture
"""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the Space needs Gradio: pip install -e '.[space]'")

from PIL import Image, PngImagePlugin

import render
from browser import find
from page import EXAMPLES, PARTS, Page
from ppow.training import smollm2
from race import PLAIN, Run
from small_pair import TARGET
from space_helpers import serve

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need: pip install -e '.[test]'")
expect = sync_api.expect
PATIENCE = 200_000  # ms; how fast a busy machine is is no property of the page, and pytest has a limit of its own
expect.set_options(timeout=PATIENCE)
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytest_plugins = ["space_helpers"]
ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "space.png"
SPEEDS = (PLAIN, 14.0), ("PPOW", 7.0)  # tokens per second of a race that was slower with the drafter


@pytest.fixture(scope="module")
def browser():
    path = find()
    if path is None:
        pytest.skip("no Chromium: `make test` installs one where it can, or run `python tests/helpers/browser.py`")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=0)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("PPOW_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(browser, server):
    """Open the page: visit(width=..., dark=..., query=...) -> page. Errors on the console fail the test."""
    errors, contexts = [], []

    def open_page(width=1280, dark=False, query=""):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        context.set_default_timeout(PATIENCE)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url + query)
        page.wait_for_selector("#panes .pane")
        page.wait_for_function("document.querySelector('#prompt textarea')?.value.length > 0")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def race(page, tokens=48):
    """Race to the end: -> the figures of the panes as texts. The tabs below may follow a moment later."""
    number(page, "max_new_tokens", tokens)
    # what an earlier race left is renamed: a short race may be over before a busy machine looks at it
    page.evaluate("document.querySelectorAll('#panes .pane').forEach(pane => pane.className = 'earlier')")
    page.click("#race")
    page.wait_for_function("document.querySelectorAll('#panes .pane.done').length === 2")
    page.wait_for_selector("#status [data-replay]")
    return page.locator("#panes").inner_text()


def number(page, name, value):
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.blur()


WATCH = """
() => new MutationObserver((_, watch) => {
  const tokens = document.querySelectorAll("#panes .pane .t");
  if (!tokens.length) return;
  watch.disconnect();
  const pane = tokens[0].closest(".pane");
  window.first = { running: pane.classList.contains("running"), seconds: +tokens[tokens.length - 1].dataset.t };
}).observe(document.querySelector("#panes"), { childList: true, subtree: true })
"""


def test_the_first_tokens_are_seen_within_two_seconds(visit, server, shots):
    """While the answer is still being written, and with what was written in its first two seconds; that nothing comes
    before the writing is tested in test_space.py."""
    page = visit()
    number(page, "temperature", 2)  # such texts do not come to an end by themselves
    number(page, "max_new_tokens", 256)
    page.evaluate(WATCH)
    page.click("#race")
    page.wait_for_function("window.first")
    page.screenshot(path=shots / "running.png")
    found = page.evaluate("window.first")
    print(f"first tokens {found['seconds']:.2f} s after the start")
    assert found["running"] and found["seconds"] < 2


def test_a_race_shows_its_facts_and_replays(visit, shots):
    page = visit()
    shown = race(page, 64)
    expect(page.locator("#status")).to_contain_text("Identical output")
    assert all(word in shown.lower() for word in ("tokens/s", "acceptance length", "time"))
    said = page.locator(".headline").inner_text()
    assert re.search(r"[\d.]+×\s+as fast with PPOW \(rounds: [\d.]+ to [\d.]+\)", said), said
    left, right = page.locator("#panes .answer").all_text_contents()
    assert left == right and left
    kinds = page.eval_on_selector_all("#panes .pane:last-child .t", "all => all.map(t => t.className)")
    assert {"t accepted"} < {kind.replace(" later", "") for kind in kinds}
    expect(page.locator("#pace")).to_contain_text("replayed")  # by itself
    page.click("text=4 times slower")
    expect(page.locator("#pace")).to_have_text("replayed 4 times slower than measured")
    page.wait_for_selector("#panes .t.later", state="attached")
    # the clocks run on behind the last token, to the end of the generation
    clock = "pane => pane.querySelector('.clock').textContent === Number(pane.dataset.seconds).toFixed(2) + ' s'"
    whole = "!document.querySelector('#panes .t.later')"
    page.wait_for_function(f"{whole} && [...document.querySelectorAll('#panes .pane')].every({clock})")
    page.screenshot(path=shots / "race.png", full_page=True)


def test_every_example_runs(visit):
    page = visit()
    for name, prompt in EXAMPLES.items():
        page.get_by_role("button", name=name, exact=True).click()
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {prompt!r}")
        race(page, 16)
        expect(page.locator("#status")).to_contain_text("Identical output")


def test_every_control_reaches_the_race_and_reset_undoes_it(visit, shots):
    page = visit()
    number(page, "temperature", 0.7)
    number(page, "seed", 7)
    page.get_by_role("radio", name="tree", exact=True).check()
    page.wait_for_selector("#tree_nodes", state="visible")
    expect(page.locator("#window_size")).to_be_hidden()
    for name, value in (("tree_depth", 3), ("tree_top_k", 2), ("tree_nodes", 5)):
        number(page, name, value)
    race(page, 24)
    expect(page.locator("#status")).to_contain_text("At temperature 0.7")
    page.get_by_role("tab", name="Figures").click()
    expect(page.locator("#figures")).to_contain_text("tree 3 deep, 2 wide, 5 nodes, temperature 0.7")
    page.get_by_role("tab", name="Inside a window").click()
    page.screenshot(path=shots / "tree.png", full_page=True)
    page.click("#link")
    page.wait_for_function("navigator.clipboard.readText().then(text => text.startsWith('http'))")
    link = page.evaluate("navigator.clipboard.readText()")
    page.click("#reset")
    page.wait_for_selector("#window_size", state="visible")
    page.wait_for_function("document.querySelectorAll('#panes .t').length === 0")
    expect(page.locator("#seed input")).to_have_value("0")
    again = visit(query="?" + link.partition("?")[2])
    again.wait_for_selector("#tree_nodes", state="visible")
    for name, value in (("seed", "7"), ("tree_nodes", "5"), ("temperature", "0.7")):
        expect(again.locator(f"#{name} input[type=number]").first).to_have_value(value)


def test_stop_really_stops_and_the_page_goes_on(visit, shots):
    page = visit()
    page.get_by_role("radio", name="tree", exact=True).check()
    # such texts do not come to an end by themselves, and such trees take their time
    for name, value in (("temperature", 2), ("max_new_tokens", 256), ("tree_nodes", 128), ("tree_depth", 10)):
        number(page, name, value)
    page.click("#race")
    page.wait_for_selector("#panes .pane .t")
    page.click("#stop")
    page.wait_for_selector("#panes .pane.stopped")
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert page.locator("#panes .pane.stopped .t").count() < 256
    page.screenshot(path=shots / "stopped.png")
    page.click("#race")  # and before anything has been written
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').textContent.includes('Stopped')")
    assert page.locator("#panes .pane.stopped .t").count() < 256
    page.click("#reset")
    race(page, 16)


SHOWS = """
html => document.querySelector("#window").innerHTML
        === Object.assign(document.createElement("div"), {innerHTML: html}).innerHTML
"""


def test_stepping_through_a_window_asks_nobody(visit, shots):
    """All windows come with the race: every step shows its window at once, with the server out of reach."""
    page = visit()
    race(page, 64)
    views = page.evaluate("JSON.parse(document.querySelector('.inside').dataset.windows)")["PPOW"]
    assert len(views) > 4
    page.context.set_offline(True)
    page.evaluate("() => { window.fetch = window.EventSource = () => { throw Error('a step asked the server'); }; }")

    def stands_at(number):
        """Checked without waiting: the step has been made when the event has been handled."""
        assert page.locator(".place").text_content() == f"Verification {number} of {len(views)}"
        assert page.locator("#verification input").evaluate_all("all => all.map(i => +i.value)") == [number, number]
        assert page.evaluate(SHOWS, views[number - 1])

    stands_at(1)
    page.locator("#previous").press("Enter")
    stands_at(1)
    page.click("#next")
    stands_at(2)
    number(page, "verification", 4)
    stands_at(4)
    page.locator("#verification input[type=range]").press("ArrowRight")
    stands_at(5)
    page.locator("#previous").press("Enter")
    stands_at(4)
    for _ in range(30):
        page.locator("#next").press("Enter")
    stands_at(len(views))
    for given, meant in ((0, 1), (10**6, len(views)), ("", 1), (2.4, 2)):
        number(page, "verification", given)
        stands_at(meant)
    assert "Target's top candidates" in views[0] and "criticality" in views[0]
    page.screenshot(path=shots / "window.png", full_page=True)


def test_a_new_race_brings_its_own_windows_and_begins_at_the_first(visit):
    page = visit()
    race(page, 64)
    page.click("#next")
    before = page.evaluate("document.querySelector('.inside').dataset.windows")
    page.get_by_role("button", name="Code", exact=True).click()
    race(page, 32)
    assert page.evaluate("document.querySelector('.inside').dataset.windows") != before
    expect(page.locator(".place")).to_contain_text("Verification 1 of")
    page.click("#reset")
    expect(page.locator("#inside")).to_contain_text("Run a race first")


LATE = """
([press, parts]) => {
  const stale = { press, html: "<p id='late'>late</p>", replay: true }, before = { ...ppow.kept };
  return parts.map((part) => [part in before, ppow.shown(part, stale) === before[part]]);
}
"""


def test_answers_to_an_older_press_change_nothing(visit):
    """Those of a race that another press has overtaken, however late they come."""
    page = visit()
    race(page, 16)
    race(page, 16)
    page.get_by_role("tab", name="Figures").click()
    page.wait_for_selector("#figures table")
    assert page.evaluate("ppow.press") == 2
    assert page.evaluate(LATE, [1, list(PARTS)]) == [[True, True]] * 4
    assert page.evaluate(LATE, [2, list(PARTS)]) == [[True, False]] * 4  # those to the newest do


def test_the_newest_press_wins(visit):
    """Race while a race runs, from the button and from the prompt: the older one ends, only the newest is shown."""
    page = visit()
    number(page, "temperature", 2)
    number(page, "max_new_tokens", 256)
    page.click("#race")
    page.wait_for_selector("#panes .pane .t")
    page.get_by_role("button", name="Chat", exact=True).click()
    page.click("#race")  # long enough not to end before the next press, however slow the browser is
    page.fill("#prompt textarea", "How are you?")
    number(page, "temperature", 0)
    number(page, "max_new_tokens", 24)
    page.locator("#prompt textarea").press("Shift+Enter")
    page.wait_for_selector("#status [data-replay]")
    expect(page.locator("#panes .asked")).to_contain_text("chain of 10, temperature 0: How are you?")
    assert page.locator("#panes .pane.done").count() == 2
    assert page.evaluate("ppow.press") == 3
    page.get_by_role("tab", name="Figures").click()
    expect(page.locator("#figures tbody tr td:nth-child(3)").first).to_have_text("1")  # races that ran to their end


def test_reset_during_a_race_stays(visit):
    page = visit()
    number(page, "temperature", 2)
    number(page, "max_new_tokens", 256)
    page.click("#race")
    page.wait_for_selector("#panes .pane .t")
    page.click("#reset")
    assert page.locator("#panes .t").count() == 0  # at once, without the server
    page.fill("#prompt textarea", "mine")
    race(page, 8)  # waits until the one before has ended
    expect(page.locator("#panes .asked")).to_contain_text("temperature 0: mine")
    page.click("#reset")
    page.fill("#prompt textarea", "typed after Reset")
    other = visit()
    race(other, 8)  # the server has answered everything of before
    assert page.locator("#prompt textarea").input_value() == "typed after Reset"
    assert page.locator("#panes .t").count() == 0
    expect(page.locator("#status")).to_contain_text("Pick an example")


def test_a_replay_ends_where_a_new_race_begins(visit):
    page = visit()
    race(page, 64)
    page.click("text=4 times slower")
    page.wait_for_selector("#panes .t.later", state="attached")
    page.evaluate("ppow.next()")  # what a press does before anything is sent
    assert page.locator("#panes .t.later").count() == 0 and page.evaluate("ppow.draw") is None


def test_bad_input_is_answered_on_the_page(visit, shots):
    page = visit()
    alert = page.locator("#status [role=alert]")
    page.fill("#prompt textarea", "   ")
    page.click("#race")
    alert.wait_for()
    expect(alert).to_contain_text("The prompt is empty")
    page.screenshot(path=shots / "empty.png")
    evil = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    for prompt in (evil, "${1+1} {{2}} 👩‍👩‍👧 שלום"):
        page.fill("#prompt textarea", prompt)
        race(page, 16)
        assert page.title().startswith("PPOW")
    page.screenshot(path=shots / "unusual.png")


def test_a_bad_link_is_answered_on_the_page(visit):
    page = visit(query="?window_size=500&prompt=%3Cb%3Ehi")
    alert = page.locator("#status [role=alert]")
    alert.wait_for()
    expect(alert).to_contain_text("window_size must be a whole number from 1 to 16, got '500'")
    expect(page.locator("#window_size input[type=number]").first).to_have_value("10")
    page = visit(query="?drafting=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E&seed=&temperature=hot")
    alert = page.locator("#status [role=alert]")
    for wrong in (
        "Drafting must be 'chain' or 'tree', got '<img",
        "seed must be a whole number",
        "temperature must be",
    ):
        expect(alert).to_contain_text(wrong)


def test_the_keyboard_reaches_everything(visit):
    page = visit()
    page.locator("#prompt textarea").focus()
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"race", "stop", "reset", "link", *EXAMPLES} <= seen
    page.locator("#race").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#status [data-replay]")
    page.locator("[data-replay='4']").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#panes .t.later", state="attached")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_looks_and_accessibility(visit, shots, width, dark):
    page = visit(width, dark)
    name = f"{'dark' if dark else 'light'}-{width}"
    assert page.evaluate("document.body.classList.contains('dark')") is dark
    race(page, 48)
    serious = []
    for tab in ("Inside a window", "Figures", "Method", "API"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_function("document.getAnimations().every(animation => animation.playState === 'finished')")
        page.screenshot(path=shots / f"{name}-{re.sub('[^a-z]', '-', tab.lower())}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), tab
        if (width == 390) is not dark:  # what a page says of itself does not hang on width and colours together
            continue
        found = axe.Axe().run(page).response["violations"]
        serious += [
            (tab, v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")
        ]
    assert serious == []
    page.click("[data-theme-toggle]")
    assert page.evaluate("document.body.classList.contains('dark')") is not dark


# -- the page's picture ------------------------------------------------------------------------------------------------


def no_pair():
    raise ValueError("none")


def look() -> str:
    """A fingerprint of how the page looks: its style, its layout with all labels, and a made-up race as it shows it."""
    plain = Run(PLAIN, [(0.1, [1]), (0.2, [2]), (0.3, [3])], 0.4, rates=[7.0, 7.5, 8.0])
    ours = Run("PPOW", [(0.1, [1]), (0.2, [2, 3])], 0.2, [2], [1], [2], rates=[14.0, 15.0, 15.5])
    words = {PLAIN: ["a", "b", "c"], "PPOW": ["a", "b", "c"]}
    parts = [(ROOT / "space" / "style.css").read_text(encoding="utf-8"), render.legend()]
    parts += [render.panes([plain, ours], [PLAIN, "PPOW"], words, 3, "asked"), render.verdict([plain, ours], 0.0, True)]
    for component in Page(no_pair).build().get_config_file()["components"]:
        props = component["props"]
        parts.append(f"{component['type']} {[props.get(key) for key in ('elem_id', 'elem_classes', 'label', 'value')]}")
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def above_the_fold(page) -> None:
    for part in ("#status .big", "#panes .pane:last-child .answer"):
        box = page.locator(part).bounding_box()
        said = page.locator("#status").inner_text()
        assert box["y"] + box["height"] <= 768, f"{part} is below the fold, behind: {said}"


def take_picture(page, place: Path) -> None:
    """A race of the first prompt, as it stands when its replay is over, in a window of 1366 by 768."""
    page.set_viewport_size({"width": 1366, "height": 768})
    page.click("#race")
    page.wait_for_selector("#status [data-replay]")
    page.evaluate("() => { ppow.draw?.(Infinity); ppow.halt(); scrollTo(0, 0); }")
    swap = """html => {
        const verdict = document.querySelector('#status .verdict'), before = verdict.outerHTML;
        verdict.outerHTML = html;
        return before;
    }"""
    plain, slow = (Run(name, [(0.1, [1]), (0.2, [2, 3])], 0.2, [2], [1], [2], rates=[n, n]) for name, n in SPEEDS)
    shown = page.evaluate(swap, render.verdict([plain, slow], 0.0, True))  # says most: it was slower
    above_the_fold(page)
    page.evaluate(swap, shown)
    above_the_fold(page)
    page.screenshot(path=place)
    target = page.locator(".masthead .hint").inner_text().partition(":")[0]  # as the picture itself names it
    kept = PngImagePlugin.PngInfo()
    kept.add_text("look", look())
    kept.add_text("target", target)
    Image.open(place).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(place, optimize=True, pnginfo=kept)


def test_the_pages_picture_can_be_taken(visit, browser, shots, tmp_path):
    if not os.environ.get("PPOW_PICTURE"):
        take_picture(visit(), shots / "picture.png")
        assert Image.open(shots / "picture.png").text["target"] == TARGET.name
        return
    with serve(tmp_path / "log.txt", threads=None) as server:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        page.wait_for_function("document.querySelector('#prompt textarea')?.value.length > 0")
        take_picture(page, PICTURE)


def test_the_pages_picture_shows_todays_page_and_the_demos_target():
    kept, anew = Image.open(PICTURE).text, "take it anew: PPOW_PICTURE=1 pytest -k picture tests/space"
    assert kept.get("look") == look(), f"docs/space.png shows another page; {anew}"
    target = kept.get("target", "none")
    wanted = smollm2.TARGET.rpartition("/")[2]
    assert wanted in target, f"docs/space.png shows the target {target}, not {wanted}; {anew}"
