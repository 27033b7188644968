"""The pages say what the summaries say; results/ holds what a page names, and no more."""

import json
import re
import subprocess
from pathlib import Path

import pytest

BENCHMARK = "figures"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["README.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES.remove("docs/targets.md")  # a table that its own command writes, and tests/decoding/test_targets.py holds
PAGES.remove("docs/train.md")  # held by tests/training/test_train.py and test_answers.py
PICTURES = {".png", ".jpg", ".svg", ".gif"}


@pytest.fixture
def summary(benchmark, monkeypatch):
    """Summaries of these contents, by name."""
    held = {"x": {"speed": 12.345, "span": [1.5, 20.0]}}
    monkeypatch.setattr(benchmark, "summary", held.__getitem__)
    return held["x"]


@pytest.mark.parametrize("page", [*PAGES, "model_cards/drafter.md.jinja"])
def test_a_page_has_the_figures_of_the_summaries_and_no_others(benchmark, page):
    text = (ROOT / page).read_text()
    after, faults = benchmark.fill(text, benchmark.table().get(page, []))
    assert not faults and after == text


def test_a_changed_summary_changes_the_page(benchmark, summary):
    lines = [
        'runs at {summary("x")["speed"]:.1f} tokens/s',
        '({summary("x")["span"][0]} to {summary("x")["span"][1]:.0f}x)',
    ]
    page = "It runs\nat 12.3 tokens/s (1.5 to\n20x).\n"
    assert benchmark.fill(page, lines) == (page, [])
    summary.update(speed=1234.5, span=[-0.25, 3.0])
    assert benchmark.fill(page, lines) == ("It runs\nat 1234.5 tokens/s (-0.25 to\n3x).\n", [])


@pytest.mark.parametrize(
    "figure",
    ["5 tokens/s", "7x", "1.25", "+0.5", "-0.061", "20%", "3 ms", "1,137 rollouts/s", "14M", "0.102\ns", "8 minutes"],
)
def test_a_figure_without_a_line_is_found(benchmark, figure):
    page = f"It is {figure} fast."
    (fault,) = benchmark.fill(page, [])[1]
    assert fault.startswith("looked up nowhere: ") and figure in page
    assert benchmark.fill(page, [figure.replace("\n", " ")])[1] == []  # named as a setting


@pytest.mark.parametrize(
    "words",
    [
        "`1.25`",
        "```\n1.25x\n```",
        "EAGLE-3.1",
        "Llama-3.1-8B",
        "arXiv 2605.14978",
        "[a](b-1.25.md)",
        "60 nodes",
        "3e-3",
    ],
)
def test_code_names_and_counts_are_no_figures(benchmark, words):
    assert benchmark.fill(f"See {words} there.", []) == (f"See {words} there.", [])


def test_a_setting_covers_itself_alone(benchmark, summary):
    lines = ["2x", 'at {summary("x")["speed"]:.1f}']
    assert benchmark.fill("A bar of 2x, at 12.3x.", lines)[1] == []
    for page, found in (
        ("A bar of 2x, 22x, at 12.3.", "22x"),
        ("2x, at 12.3, | 7 | 8 |", "7"),
        ("2x, 2.5, at 12.3.", "2.5"),
    ):
        (fault, *_) = benchmark.fill(page, lines)[1]
        assert fault.startswith(f"looked up nowhere: {found!r}")


def test_a_line_stands_in_its_page_once(benchmark, summary):
    line = 'at {summary("x")["speed"]:.1f} tokens/s'
    for page in ("Nowhere.", "Here at 1.0 tokens/s, there at 2.0 tokens/s."):
        assert any(fault.startswith("found ") for fault in benchmark.fill(page, [line])[1])


def test_the_command_tells_and_writes(benchmark, summary, tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("Fast: 99.9 tokens/s.\n")
    (tmp_path / "figures.txt").write_text('# a comment\n\n== page.md\nFast: {summary("x")["speed"]:.1f} tokens/s\n')
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "TABLE", tmp_path / "figures.txt")
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "page.md: has other figures than the summaries" in capsys.readouterr().out
    benchmark.main(["--write"])
    assert (tmp_path / "page.md").read_text() == "Fast: 12.3 tokens/s.\n"
    benchmark.main([])
    (tmp_path / "page.md").write_text("Fast: 12.3 tokens/s, 7x.\n")
    with pytest.raises(SystemExit):
        benchmark.main(["--write"])  # nothing to write, and a figure of nowhere


def test_a_difference_of_two_rows_by_hand(benchmark, monkeypatch):
    lengths = {"cst a": 2.0, "cst b": 2.5, "lk": 3.0}
    differences = {"cst a": {"cst b": [0.5, 0.4, 0.6], "lk": [1.0, 0.9, 1.2]}, "cst b": {"lk": [0.5, 0.3, 0.6]}}
    part = {"lengths": lengths, "differences": differences}
    monkeypatch.setattr(benchmark, "summary", lambda name: {"parts": {"T=0": part}})
    assert benchmark.length("x", "0") == 2.5  # of the best CST
    assert benchmark.gain("x", "0", "lk") == "+0.500 [+0.300, +0.600]" and benchmark.percent("x", "0", "lk") == 20
    assert benchmark.gain("x", "0", "cst a", "lk") == "-1.000 [-1.200, -0.900]"
    assert benchmark.span("0", ("x", "lk", "cst"), ("x", "lk", "cst a")) == "20.0 to 50.0"


def test_results_are_small_and_every_one_is_named(benchmark):
    texts = benchmark.TABLE.read_text() + "".join((ROOT / page).read_text() for page in PAGES)
    files = [path for path in RESULTS.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".json"}
    assert sum(path.stat().st_size for path in files) < 1.5e6
    for path in files:
        name = re.sub("^(objectives|decoding|gradients|scaling)-", "", path.stem)
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", texts), f"{path.name} is named by no page"
        if path.suffix == ".json":
            summary = json.loads(path.read_text())
            assert summary["command"] and summary["git"] and summary["versions"] and summary["hardware"], path.name


def tracked() -> list[Path]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).exists()]


def test_pictures_are_few_and_each_is_shown_by_a_page():
    pictures = [path for path in tracked() if path.suffix in PICTURES]
    pages = [path for path in tracked() if path.suffix == ".md"]
    shown = set()
    for page in pages:
        shown |= {(page.parent / link).resolve() for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
    assert len(pictures) <= 6 and set(pictures) <= shown


def test_a_checkout_is_small():
    assert sum(path.stat().st_size for path in tracked()) < 50e6
