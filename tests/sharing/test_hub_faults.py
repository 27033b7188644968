"""What goes wrong between a drafter and a Hub: every story ends with nothing lost and nothing half visible.

The waits of the clients between two tries are shortened a hundredfold; nothing else of them is changed.
"""

import contextlib
import getpass
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hub import Fault
from hub.clients import environment, ppow, push
from ppow import PPOWDrafter
from ppow.training import hub as uploading
from ppow.training.config import PushConfig
from ppow.training.push import main

pytest_plugins = ["hub.fixtures"]
REPO = "acme/drafter"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    short = types.SimpleNamespace(**vars(time))
    short.sleep = lambda seconds: time.sleep(seconds / 100)
    monkeypatch.setattr(_http, "time", short)
    monkeypatch.setattr("huggingface_hub.file_download.time", short)


def strike(hub, pattern, times=1, **what):
    fault = Fault(pattern, times, **what)
    hub.faults.append(fault)
    return fault


def head(repo=REPO, revision="main"):
    return HfApi().model_info(repo, revision=revision).sha


def titles(repo=REPO):
    return [row.title for row in HfApi().list_repo_commits(repo)]


def assert_whole(pair, repo=REPO, **options):
    """What is on the Hub is the drafter, and a client without a cache gets it."""
    folder = Path(snapshot_download(repo, force_download=True, **options))
    ours, theirs = (load_file(at / "model.safetensors") for at in (pair / "drafter", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoModel.from_pretrained(repo, trust_remote_code=True, **options).config.model_type == "ppow"


# -- pushing -----------------------------------------------------------------------------------------------------------

UPLOAD, COMMIT = "files PUT /large/", r"api POST .*/commit/"
PASSING = {
    "cut in the middle of the weights": (UPLOAD, {"cut_upload": 50_000}),
    "a storm of 503 around the weights": (UPLOAD, {"times": 5, "status": 503}),
    "a storm of 503 before": ("api POST .*(preupload|objects/batch)", {"times": 5, "status": 503}),
    "slow": (".", {"times": 5, "seconds": 0.05}),
}


@pytest.mark.parametrize("story", PASSING)
def test_a_push_outlives_what_passes(hub, pair, story):
    pattern, what = PASSING[story]
    fault = strike(hub, pattern, **what)
    assert push(pair, REPO) == 0
    assert fault.met.is_set() and fault.times == 0
    assert titles() == ["ppow push", "initial commit"]
    assert_whole(pair)


LASTING = {
    "the weights never arrive": (UPLOAD, {"times": 99, "cut_upload": 50_000}),
    "503 from the start": ("api .*", {"times": 99, "status": 503}),
    "503 for the commit": (COMMIT, {"status": 503}),
    "the commit is cut": (COMMIT, {"cut_upload": 100}),
}


@pytest.mark.parametrize("story", LASTING)
def test_a_push_that_breaks_off_leaves_nothing_and_is_made_good(hub, pair, capsys, story):
    assert push(pair, REPO, "--license", "mit") == 0
    before = head()
    pattern, what = LASTING[story]
    drafter = other_weights(pair) if "weights" in story else pair
    strike(hub, pattern, **what)
    assert push(drafter, REPO) == 2
    error = capsys.readouterr().err
    assert "broke off" in error and "Push again" in error and "Traceback" not in error
    hub.faults.clear()
    assert head() == before
    assert push(drafter, REPO) == 0
    assert titles() == ["ppow push", "ppow push", "initial commit"]
    assert_whole(drafter)


def other_weights(pair):
    """Another pair folder, whose drafter differs from the first."""
    other = pair / "other"
    if not other.exists():
        drafter = AutoModel.from_pretrained(pair / "drafter", trust_remote_code=True)
        drafter.fc.weight.data += 1
        drafter.save_pretrained(other / "drafter")
    return other


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, pair, capsys):
    strike(hub, COMMIT, cut_reply=-1)
    assert push(pair, REPO) == 2 and "whole or not at all" in capsys.readouterr().err
    assert push(pair, REPO, "--tag", "v1") == 0
    assert titles() == ["ppow push v1", "ppow push", "initial commit"]  # the second one changes the card's revision
    assert_whole(pair, revision="v1")


def test_xet_outlives_a_storm(hub, pair, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    fault = strike(hub, "files POST /v1/(xorbs|shards)", times=2, status=503)
    assert push(pair, REPO) == 0
    assert fault.met.is_set() and titles() == ["ppow push", "initial commit"]
    assert_whole(pair)


@pytest.mark.parametrize("moment", [UPLOAD, pytest.param("api POST .*/preupload/", marks=pytest.mark.slow)])
def test_kill_minus_nine_during_a_push(hub, pair, tmp_path, moment):
    fault = strike(hub, moment, until=(killed := threading.Event()))
    command = ppow("push", pair / "drafter", "--repo", REPO)
    process = subprocess.Popen(command, env=environment(hub, tmp_path / "home"), stderr=subprocess.DEVNULL)
    try:
        while not fault.met.wait(0.1):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.set()
    assert titles() == ["initial commit"]
    assert push(pair, REPO) == 0
    assert titles() == ["ppow push", "initial commit"]
    assert_whole(pair)


def test_two_pushes_at_once(hub, pair, monkeypatch):
    """One of them wins whole; the other one is told, and changes nothing."""
    assert push(pair, REPO) == 0
    lock, load = threading.Lock(), PPOWDrafter.from_pretrained

    def one_at_a_time(*arguments, **options):  # loading patches transformers' classes meanwhile: not for two threads
        with lock:
            return load(*arguments, **options)

    monkeypatch.setattr(PPOWDrafter, "from_pretrained", one_at_a_time)
    strike(hub, COMMIT, times=2, until=threading.Barrier(2))  # both have seen the same head by then
    configs = [PushConfig(drafter=str(pair / "drafter"), repo=REPO, license=name) for name in ("mit", "bsd")]
    with ThreadPoolExecutor(2) as pool:
        errors = [job.exception() for job in [pool.submit(main, config) for config in configs]]
    (lost,) = [error for error in errors if error is not None]
    assert isinstance(lost, ValueError) and "Somebody else pushed" in str(lost)
    assert titles() == ["ppow push", "ppow push", "initial commit"]
    winner = configs[errors.index(None)].license
    assert HfApi().model_info(REPO).card_data.license == winner


def test_a_stale_parent(hub, pair, monkeypatch, capsys):
    original = uploading.changes

    def somebody_is_faster(*arguments):
        found = original(*arguments)
        HfApi().upload_file(path_or_fileobj=b"faster", path_in_repo="notes.txt", repo_id=REPO)
        return found

    assert push(pair, REPO) == 0
    monkeypatch.setattr(uploading, "changes", somebody_is_faster)
    assert push(pair, REPO, "--license", "mit") == 2
    assert "nothing of this push is visible" in capsys.readouterr().err
    assert titles()[1:] == ["ppow push", "initial commit"] and "notes.txt" in HfApi().list_repo_files(REPO)


@pytest.mark.parametrize(
    ("token", "message"),
    [({"role": "read"}, "may not write"), ({"seconds": -1}, "has expired"), ({"user": "bob"}, "may not write")],
)
def test_tokens_that_do_not_open(hub, pair, monkeypatch, capsys, token, message):
    assert push(pair, REPO) == 0
    before = head()
    given = hub.add_token(**{"user": "alice", "orgs": ("acme",), **token} if "user" not in token else token)
    with monkeypatch.context() as poorer:
        poorer.setenv("HF_TOKEN", given)
        assert push(pair, REPO, "--license", "mit") == push(pair, "acme/new", "--license", "mit") == 2
    shown = capsys.readouterr()
    assert message in shown.err and given not in shown.err + shown.out
    assert head() == before and not HfApi().repo_exists("acme/new")


def test_a_tag_stays(hub, pair, capsys):
    assert push(pair, REPO, "--tag", "v1") == 0
    before = head()
    assert push(pair, REPO, "--tag", "v1", "--license", "mit") == 2
    assert "has a tag v1 already" in capsys.readouterr().err and head() == before


def test_a_tag_that_git_does_not_take(hub, pair, capsys):
    assert push(pair, REPO, "--tag", "bad tag~") == 2
    assert "--tag 'bad tag~': expected a name that git takes" in capsys.readouterr().err
    assert not HfApi().repo_exists(REPO)


def test_the_hub_restarts_in_the_middle_of_a_push(hub, pair, monkeypatch):
    """A client that finds nobody waits, as clients do, and by then the hub is back."""
    stopped, asked, back = threading.Event(), threading.Event(), threading.Event()
    fault = strike(hub, UPLOAD, until=stopped)

    def restart():
        fault.met.wait()
        hub.stop()
        stopped.set()
        asked.wait()
        hub.start()
        back.set()

    def wait(seconds):
        asked.set()
        back.wait()

    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": wait}))
    other = threading.Thread(target=restart, daemon=True)
    other.start()
    assert push(pair, REPO) == 0
    other.join()
    assert asked.is_set()
    assert titles() == ["ppow push", "initial commit"]
    assert_whole(pair, revision=head())


# -- pulling -----------------------------------------------------------------------------------------------------------

DOWNLOAD = "files GET /large/"


@pytest.mark.parametrize("what", [{"cut_reply": 50_000}, {"cut_reply": -1}])
def test_a_download_outlives_a_cut(hub, pair, monkeypatch, what):
    """And goes on where it was cut, by a client that keeps what it has in pieces of 10 kB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    assert push(pair, REPO) == 0
    fault = strike(hub, DOWNLOAD, **what)
    assert_whole(pair)
    assert fault.times == 0
    ranges = [request.headers.get("range") for request in hub.requests if request.path.startswith("/large/")]
    assert what["cut_reply"] < 0 or "bytes=50000-" in ranges


@pytest.mark.parametrize("what", [{"cut_reply": 0}, {"status": 503}])
def test_a_download_that_fails_leaves_no_half_drafter(hub, pair, what):
    assert push(pair, REPO) == 0
    strike(hub, DOWNLOAD, times=99, **what)
    with pytest.raises(Exception):  # noqa: B017  # whichever class the client's network library has for it
        AutoModel.from_pretrained(REPO, trust_remote_code=True)
    assert list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors")) == []
    hub.faults.clear()
    assert_whole(pair)


def test_a_full_disk_on_the_pulling_side(hub, pair, tmp_path):
    assert push(pair, REPO) == 0
    code = (
        "import resource, sys; from huggingface_hub import snapshot_download\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # the weights are larger, the code is not
        f"snapshot_download({REPO!r}, cache_dir=sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, constants.HF_HUB_CACHE]
    done = subprocess.run(command, env=environment(hub, tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode and "File too large" in done.stderr
    assert list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors")) == []
    assert AutoModel.from_pretrained(REPO, trust_remote_code=True).config.model_type == "ppow"


def test_what_is_not_there(hub, pair, capsys):
    assert push(pair, REPO) == 0
    before = head()
    assert push(pair, REPO, "--revision", "nowhere", "--create-pr", "--license", "mit") == 2
    assert "has no branch nowhere" in capsys.readouterr().err and head() == before
    assert push(pair / "nothing", REPO) == push(pair, "nobody/drafter") == 2 and head() == before
    with pytest.raises(OSError, match="acme/nothing"):
        AutoModel.from_pretrained("acme/nothing", trust_remote_code=True)
    for revision in ("v9", "0" * 40):
        with pytest.raises(OSError, match=revision):
            AutoModel.from_pretrained(REPO, revision=revision, trust_remote_code=True)


def test_what_was_pulled_once_loads_without_the_hub(hub, pair, monkeypatch):
    assert push(pair, REPO) == 0
    sha = head()
    AutoModel.from_pretrained(REPO, revision=sha, trust_remote_code=True)
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert AutoModel.from_pretrained(REPO, revision=sha, trust_remote_code=True).config.model_type == "ppow"


# -- secrets and strangers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_the_token_stays_where_it_belongs(hub, pair, monkeypatch, caplog, capfd, xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    caplog.set_level(logging.DEBUG)
    assert push(pair, REPO, "--private", "--tag", "v1") == 0
    assert_whole(pair)
    token, (out, err) = get_token(), capfd.readouterr()
    assert token not in out + err + caplog.text
    asked = [request for request in hub.requests if request.server == "files"]
    assert asked and not any(token in f"{r.path} {r.query} {r.headers} {r.body}" for r in asked)
    assert any(token in request.headers.get("authorization", "") for request in hub.requests)


def test_a_pushed_repository_gives_nothing_away(hub, pair):
    """No token, no path of this machine, no name of its user or host, and no weights but safetensors."""
    record = json.loads((pair / "drafter" / "provenance.json").read_text())
    record["argv"] = ["ppow", f"--data={Path.home() / 'chats.jsonl'}", f"--target={pair / 'target'}", get_token()]
    private = pair / "told" / "drafter"
    AutoModel.from_pretrained(pair / "drafter", trust_remote_code=True).save_pretrained(private)
    (private / "provenance.json").write_text(json.dumps(record))
    (private / "pytorch_model.bin").write_bytes(b"a pickle")
    assert push(pair / "told", REPO) == 0
    files = [file for file in Path(snapshot_download(REPO)).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".py", ""}
    secrets = {get_token(), str(pair), str(Path.home()), str(Path(__file__).parents[2]), f"/{getpass.getuser()}/"}
    secrets |= {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 5}  # shorter ones are words
    found = [(file.name, secret) for file in files for secret in secrets if secret.encode() in file.read_bytes()]
    assert found == []


def test_a_strangers_repository_runs_nothing_unasked(hub, pair, tmp_path, capsys):
    """Not its model code, not its generation loop, not when it is pushed on, and not what its card says."""
    assert push(pair, REPO, "--target", "acme/{{ 7*7 }}{{ ''.__class__ }}") == 2
    mark = tmp_path / "was-here"
    evil = f"open({str(mark)!r}, 'w')\n".encode()
    names = ("modeling_ppow.py", "configuration_ppow.py", "custom_generate/generate.py")
    assert push(pair, REPO) == 0
    for name in names:
        HfApi().upload_file(path_or_fileobj=evil, path_in_repo=name, repo_id=REPO)
    target = AutoModelForCausalLM.from_pretrained(pair / "target")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(REPO, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.generate(torch.tensor([[5]]), custom_generate=REPO, trust_remote_code=False, max_new_tokens=1)
    assert main(PushConfig(drafter=REPO, repo="acme/copy")) is None
    assert not mark.exists()
    with contextlib.suppress(Exception):
        AutoModel.from_pretrained(REPO, trust_remote_code=True)
    assert mark.exists()  # the trap works
