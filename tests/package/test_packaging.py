import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parents[2]
FOLDERS = {"modeling_ppow": "ppow", "training": "ppow/training", "model_cards": "ppow/model_cards"}
CARRIED = {"space": "ppow/space", "bundled/drafter": "ppow/bundled/drafter"}  # what the demo and the page need


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist and the wheel, built without network from a copy: the build leaves traces where it runs."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in FOLDERS | CARRIED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def unpacked(distributions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(distributions[0]) as archive:
        archive.extractall(folder)
    return folder


def isolated(folder: Path, code: str, cwd: Path) -> str:
    """Run code with only the unpacked wheel (and the dependencies) importable as ours."""
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> set[str]:
    """Every Python file, card template and ``py.typed`` that the wheel should carry, under its installed name."""
    files = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".py", ".md", ".jinja") or path.name == "py.typed":
                files.add(f"{package}/{path.name}")
    for folder, package in CARRIED.items():
        files |= {f"{package}/{path.name}" for path in (ROOT / folder).iterdir() if path.is_file()}
    return files


def test_the_wheel_holds_every_module_once_and_nothing_else(unpacked):
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == sources()
    assert "ppow/py.typed" in found
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_the_sdist_builds_from_its_own_content(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in FOLDERS:
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} <= names
    assert {"LICENSE", "pyproject.toml"} <= names


def test_the_wheel_works_in_a_clean_process(unpacked, tmp_path):
    code = """
import ppow
assert not {"torch", "transformers"} & set(sys.modules), "importing ppow must stay free of torch"
from ppow import PPOWConfig, PPOWDrafter
import ppow.training.data, ppow.training.checkpoints, ppow.model_cards
print(ppow.__version__)
print(PPOWConfig.model_type, PPOWDrafter.config_class is PPOWConfig)
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("ppow", "training", "modeling_ppow", "model_cards"):
        print(name, module.__file__)
"""
    version, classes, *modules = isolated(unpacked, code, tmp_path).splitlines()
    assert version == "0.1.0" and classes == "ppow True"
    names, files = zip(*(line.split(" ", 1) for line in modules))
    assert {"ppow", "ppow.modeling_ppow", "ppow.training.data"} <= set(names)
    assert all(name.split(".")[0] == "ppow" for name in names)
    assert all(Path(file).is_relative_to(unpacked) for file in files)
    assert len(set(files)) == len(files), "a module loaded under two names"


def test_the_wheels_command(unpacked, tmp_path):
    entry = next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    assert entry.split("\n")[:2] == ["[console_scripts]", "ppow = ppow.training.cli:main"]
    page = isolated(unpacked, "from ppow.training.cli import main; main(['supervised', '--help'])", tmp_path)
    assert page.startswith("usage: ppow supervised --target TARGET")


def test_demo_page_and_space_find_what_they_show_outside_of_a_checkout(unpacked, tmp_path):
    code = """
from ppow.training import smollm2, space, space_folder
assert smollm2.PROMPTS.read_text("utf-8").count("prompt") > 4
assert (space.FOLDER / "app.py").is_file() and space_folder.FOLDER == space.FOLDER
smollm2.demo_target = lambda: "target"
target, drafter = smollm2.demo_pair()
from ppow import PPOWDrafter
print(target, PPOWDrafter.from_pretrained(drafter).config.target_name_or_path, smollm2.ROOT)
"""
    target, recorded, root = isolated(unpacked, code, tmp_path).split()
    assert target == "target" and recorded == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert Path(root) == unpacked / "ppow"


def test_metadata(unpacked):
    lines = next(unpacked.glob("*.dist-info/METADATA")).read_text().splitlines()
    for line in ("Name: ppow", "Version: 0.1.0", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert line in lines
    required = [line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert "Requires-Dist: torch>=2.6" in required
    assert any(line.replace(" ", "") == "Requires-Dist:transformers<6,>=5.17" for line in required)


def test_public_names_are_lazy_and_complete():
    import ppow

    assert set(ppow.__all__) <= set(dir(ppow))
    for name in ppow.__all__:
        assert getattr(ppow, name) is not None
    with pytest.raises(AttributeError, match="module 'ppow' has no attribute 'PPOWDrafterr'"):
        ppow.PPOWDrafterr  # noqa: B018


def python_files() -> list[Path]:
    skipped = {".venv", ".venv-engines", ".git", "build", "dist", "__pycache__"}
    return [path for path in ROOT.rglob("*.py") if not skipped & set(path.relative_to(ROOT).parts)]


def test_no_file_imports_a_folder_by_its_own_name():
    """``import training`` would load a second copy of ``ppow.training``; ruff cannot judge inside the folders."""
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found += [f"{path.name}:{node.lineno} {name}" for name in names if name.split(".")[0] in FOLDERS]
    assert found == []


@pytest.mark.parametrize("line", ["import training", "from modeling_ppow import x", "import model_cards.card"])
def test_ruff_bans_the_folder_names_outside_of_them(tmp_path, line):
    (tmp_path / "user.py").write_text(f"{line}\n")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--config"]
    done = subprocess.run([*command, ROOT / "pyproject.toml", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "TID251" in done.stdout, done.stderr


def imports_of(path: Path) -> set[str]:
    """First-party modules that a file imports anywhere in it, as ``ppow...`` names."""
    package = FOLDERS[path.parent.name].replace("/", ".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{package}.{node.module or ''}" if node.level else node.module)
    return {name for name in found if name.split(".")[0] == "ppow"}


def test_the_arrows_between_the_folders():
    for path in (ROOT / "modeling_ppow").glob("*.py"):
        assert not any(name.startswith(("ppow.training", "ppow.model_cards")) for name in imports_of(path)), path.name
    for path in (ROOT / "model_cards").glob("*.py"):
        assert imports_of(path) == set(), path.name


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_an_old_python_by_name(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", folder=tmp_path)
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed, but" in done.stderr and "is Python 3.9.1" in done.stderr
    assert not (tmp_path / ".venv").exists()


STAMPS = {"demo": ".", "space": ".[space]", "test": ".[test]"}  # what make installs for each, least first


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", STAMPS)
def test_make_installs_first_only_once_and_no_more_than_is_needed(tmp_path, target):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    plan = make("-n", target, folder=tmp_path).stdout
    run = {"test": "-m pytest"}.get(target, f"ppow {target}")
    steps = ["-m venv .venv", 'pip install "torch==', f'pip install -e "{STAMPS[target]}"', run]
    places = [plan.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    assert plan.count("pip install -e") == 1
    (tmp_path / ".venv").mkdir()
    touched = [line.split()[1:] for line in plan.splitlines() if line.startswith("touch ")]
    for stamp in (name for names in touched for name in names):
        (tmp_path / stamp).touch()
    held = list(STAMPS)[: list(STAMPS).index(target) + 1]
    for other in STAMPS:
        assert ("pip install" in make("-n", other, folder=tmp_path).stdout) == (other not in held)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_test_checks_style_and_types_before_the_tests(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    plan = make("-n", "test", folder=tmp_path).stdout
    places = [plan.find(step) for step in ("ruff check .", "ruff format --check .", "mypy", "-m pytest")]
    assert -1 not in places and places == sorted(places)


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_type_checkers_and_editors_find_every_module_under_its_import_name():
    """By the links that mypy and pyright search: neither of them runs the finder hook of an editable install."""
    tools = project()["tool"]
    roots = [".imports/core", ".imports/rest"]
    assert tools["mypy"]["mypy_path"] == [f"$MYPY_CONFIG_FILE_DIR/{root}" for root in roots]
    assert tools["pyright"]["extraPaths"][:2] == roots
    assert {name.replace(".", "/") for name in tools["mypy"]["packages"]} == set(FOLDERS.values())
    carried = {name.replace(".", "/") for name in tools["setuptools"]["packages"]}
    assert carried == {*FOLDERS.values(), *CARRIED.values()}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).glob("*.py"):
            found = [place for root in roots if (place := ROOT / root / package / path.name).exists()]
            assert found, f"{package}/{path.name}"
            assert all(place.samefile(path) for place in found)


def test_the_type_check_is_strict_and_follows_the_import_name(tmp_path):
    pytest.importorskip("mypy")
    files = {
        "right": ("from ppow.model_cards import render\n\ntext: str = render('drafter', {})\n", None),
        "argument": ("from ppow.model_cards import render\n\nrender('drafter', 1)\n", "[arg-type]"),
        "name": ("from ppow.model_cards import rendering\n", "[attr-defined]"),
        "module": ("import ppow.model_card\n", "[import-not-found]"),
        "untyped": ("def plain(text):\n    return text\n", "[no-untyped-def]"),
    }
    for name, (code, _) in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        ROOT / "pyproject.toml",
        "--cache-dir",
        tmp_path / "cache",
    ]
    done = subprocess.run([*command, *sorted(tmp_path.glob("*.py"))], capture_output=True, text=True, cwd=tmp_path)
    found = {line.split(".py:")[0]: line.split()[-1] for line in done.stdout.splitlines() if ": error: " in line}
    assert found == {name: error for name, (_, error) in files.items() if error}, done.stdout + done.stderr


def test_a_commit_and_make_test_judge_by_the_same_ruff():
    pins = [line for line in project()["project"]["optional-dependencies"]["test"] if line.startswith("ruff")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert pins == [f"ruff=={pins[0].partition('==')[2]}"]
    assert hooks.count(f"additional_dependencies: [{pins[0]}]") == hooks.count("language: python") == 2
    assert ".venv" not in hooks


def test_the_public_workflow_tries_every_python_and_both_ends_of_transformers():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    matrix = yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]
    facts = project()["project"]
    assert matrix["python"][0] == facts["requires-python"].removeprefix(">=")
    (promised,) = (line for line in facts["dependencies"] if line.startswith("transformers"))
    oldest, newest = promised.removeprefix("transformers>=").split(",")
    assert matrix["transformers"] == [f"=={oldest}.*", newest]


def test_the_citation_names_this_version():
    import ppow

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ppow.__version__
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2605.14978"


def test_the_citation_is_one_that_others_can_read_and_names_the_papers_facts():
    """The fields that the Citation File Format 1.2.0 asks for, and those of the paper as README and card give them."""
    import ppow

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software" and citation["license"] == "Apache-2.0"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{ppow.__version__}] - {citation['date-released']}" in changes
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys() and paper["type"] == "article"
    people = [f"{person['given-names']} {person['family-names']}" for person in paper["authors"]]
    card = (ROOT / "model_cards" / "drafter.md.jinja").read_text(encoding="utf-8")
    assert paper["title"] in card and f"author = {{{' and '.join(people)}}}" in card
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert paper["title"] in readme and ", ".join(people) in readme


@pytest.mark.parametrize("path", sorted((ROOT / "modeling_ppow").glob("*.py")), ids=lambda path: path.stem)
def test_a_drafters_code_asks_for_nothing_but_torch_and_transformers(path):
    """transformers refuses code from the Hub for every other import that is not in a ``try``, such as Triton's."""
    asked = {name.split(".")[0] for name in get_imports(path)}
    assert asked <= {*sys.stdlib_module_names, "torch", "transformers"}
