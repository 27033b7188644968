import json
import subprocess
import sys
from pathlib import Path

import pytest

from ppow.training import provenance
from ppow.training.config import SupervisedConfig

CONFIG = SupervisedConfig(target="org/target", data="chats.jsonl", output_dir="runs/a", seed=7)


def read(folder):
    return json.loads((folder / "provenance.json").read_text())


def test_the_record_says_what_ran_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ppow", "supervised", "--target", "org/target"])
    provenance.write(tmp_path / "run", CONFIG)
    found = read(tmp_path / "run")
    assert found["command"] == "supervised"
    assert found["argv"] == ["ppow", "supervised", "--target", "org/target"]
    assert found["config"] == CONFIG.to_dict()
    assert found["seed"] == 7
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(found["versions"][name] for name in ("ppow", "torch", "transformers", "accelerate", "datasets"))
    assert found["time_utc"].endswith("+00:00")
    assert found["hardware"]["cpu"] and found["hardware"]["cpus"] >= 1


def test_a_resumed_run_keeps_the_earlier_records_in_order(tmp_path, monkeypatch):
    for argument in ("one", "two", "three"):
        monkeypatch.setattr(sys, "argv", ["ppow", "supervised", argument])
        provenance.write(tmp_path, CONFIG)
    found = read(tmp_path)
    assert found["argv"][2] == "three"
    assert [record["argv"][2] for record in found["earlier"]] == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["provenance.json"]


def test_a_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "provenance.json").write_text("[]")
    with pytest.raises(ValueError, match="not a provenance file"):
        provenance.write(tmp_path, CONFIG)
    assert (tmp_path / "provenance.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("org/model", "org/model"),
        ("--steps", "--steps"),
        ("0.5", "0.5"),
        ("/home/alice/models/target", "target"),
        ("~/models/target", "target"),
        ("../shared/data.jsonl", "data.jsonl"),
        ("--data=/home/alice/chats.jsonl", "--data=chats.jsonl"),
        ("/home/alice/a.jsonl,/home/alice/b.jsonl,mt_bench", "a.jsonl,b.jsonl,mt_bench"),
        ("hf-internal-testing/tiny", "hf-internal-testing/tiny"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
        ("--token=sk-abcdefghijklmnopqrstuvwx", "--token=***"),
        ("https://alice:secret@host:8000/v1", "https://host:8000/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
    ],
)
def test_nothing_private_is_kept(text, left):
    assert provenance.scrub(text) == left
    assert provenance.scrub({"key": [text, 3, None]}) == {"key": [left, 3, None]}


def test_paths_below_the_working_folder_become_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert provenance.scrub(str(tmp_path / "runs" / "a")) == "runs/a"
    assert provenance.scrub("./runs/a") == "runs/a"


def test_no_local_path_reaches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppow", "supervised", "--data", str(tmp_path / "secret-user" / "chats.jsonl")])
    config = SupervisedConfig(target=str(tmp_path / "secret-user" / "t"), data="d", output_dir=str(tmp_path / "out"))
    text = provenance.write(tmp_path / "out", config).read_text()
    assert "secret-user" not in text and str(tmp_path) not in text and str(Path.home()) + "/" not in text


def test_git_revision_names_the_commit_and_whether_files_changed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "provenance.py"  # the file that the function looks for
    source.write_text("one")
    assert provenance.git_revision(tmp_path) is None, "no repository"
    git("init", "-q")
    assert provenance.git_revision(tmp_path) is None, "a repository that does not track the code"
    git("add", "provenance.py")
    git("commit", "-q", "-m", "first")
    assert provenance.git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    source.write_text("two")
    assert provenance.git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": True}
