"""The pages: the site builds strictly, links and anchors lead somewhere, snippets run, quoted code is the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import small_pair
from ppow import PPOWDrafter
from ppow.training import cli

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "space/README.md")] + SITE
RUN = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("use", "import", "share", "decoding", "method"))]
TARGETS = ("meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    told = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stdout + done.stderr  # with --quiet warnings would not count
    assert (tmp_path / "index.html").is_file() and "speculative" in (tmp_path / "method" / "index.html").read_text()


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {link}"


def test_the_readme_is_short_and_names_every_page_and_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert all(f"docs/{path.name}" in text for path in SITE if path.stem != "index")
    pages = "".join(path.read_text(encoding="utf-8") for path in SITE)
    assert all(f"ppow {command} " in pages for command in cli.COMMANDS)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Names that snippets load -> folders: the tests' pair, as a repository and as another trainer's file."""
    from ppow.training.config import ExportConfig
    from ppow.training.convert import main

    folder = tmp_path_factory.mktemp("snippets")
    PPOWDrafter.from_pretrained(small_pair.DRAFTER).save_pretrained(folder / "repository")
    main(ExportConfig(drafter=str(small_pair.DRAFTER), format="vllm", target=str(small_pair.TARGET), out=f"{folder}/x"))
    found = dict.fromkeys(TARGETS, str(small_pair.TARGET)) | {"bundled/drafter": str(small_pair.DRAFTER)}
    found |= {"yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": f"{folder}/x", "me/drafter": f"{folder}/repository"}
    return {f'"{name}"': f'"{place}"' for name, place in found.items()} | {'"cuda"': '"cpu"', ', revision="v1"': ""}


@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_the_python_of_a_page_runs(page, places):
    """All blocks of a page in one process, in their order, with the tests' pair in the places of the Hub's names."""
    scope, blocks = {}, re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert blocks
    for code in blocks:
        for name, place in places.items():
            code = code.replace(name, place)
        exec(compile(code, page.name, "exec"), scope)
    if "output" in scope:
        found = scope["output"]
        length = getattr(found, "sequences", found).shape[1]
        assert length > scope["inputs"]["input_ids"].shape[1]


def test_every_page_with_python_is_run():
    held = {path for path in [ROOT / "README.md", *SITE] if "```python\n" in path.read_text(encoding="utf-8")}
    assert held == set(RUN)


def test_the_ten_lines_run(monkeypatch, capsys):
    from ppow.training import smollm2

    monkeypatch.setattr(smollm2, "demo_pair", lambda: (str(small_pair.TARGET), str(small_pair.DRAFTER)))
    file = ROOT / "examples" / "quickstart.py"
    exec(compile(file.read_text(encoding="utf-8"), file.name, "exec"), {})
    assert re.search(r"^\d\.\d\d tokens for each pass of the target$", capsys.readouterr().out, re.M)


def test_quoted_code_is_the_code():
    pages = "".join(path.read_text(encoding="utf-8") for path in SITE)
    quotes = re.findall(r"<!-- from (\S+) -->\n```text\n(.*?)```", pages, re.S)
    assert len(quotes) == 2
    for name, lines in quotes:
        source, at = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()], 0
        for line in map(str.strip, lines.strip().splitlines()):
            assert line in source[at:], f"docs/decoding.md quotes a line that {name} no longer has there: {line}"
            at += source[at:].index(line) + 1


def commands():
    """Every `ppow` line of the pages' shell blocks, without comments, continued lines joined."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split(" #")[0].split()
                start = next((i for i, word in enumerate(words) if word in ("ppow", "ppow.training.cli")), None)
                if start is not None and words[start + 1 : start + 2] != ["--version"]:
                    yield pytest.param(words[start + 1 :], id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_on_a_page_is_one_that_can_be_given(words):
    """Its options exist and have values that they take; nothing is run."""
    from ppow.training import config

    words = words[: words.index("&&")] if "&&" in words else words
    getattr(config, cli.COMMANDS[words[0]].config).from_args(words[1:])
