"""The tests' own hub, asked by plain huggingface_hub and datasets: does it behave as the Hub does?"""

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub import Fault
from hub.clients import environment

pytest_plugins = ["hub.fixtures"]
ROOT = Path(__file__).parents[2]
MEGA = 1024 * 1024


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint)


@pytest.fixture
def repo(api):
    api.create_repo("acme/x")
    return "acme/x"


def add(api, repo, path="notes.md", content=b"one", **options):
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)]
    return api.create_commit(repo, operations, commit_message="add", **options)


def content(api, repo, path="notes.md", **options) -> bytes:
    return Path(api.hf_hub_download(repo, path, **options)).read_bytes()


def lines(hub, pattern: str) -> list[str]:
    return [request.line for request in hub.requests if re.search(pattern, request.line)]


# -- repositories and commits ------------------------------------------------------------------------------------------


def test_revisions_are_branches_tags_and_commits(api, repo):
    first = add(api, repo, content=b"one")
    api.create_tag(repo, tag="v1", revision=first.oid)
    api.create_branch(repo, branch="next/2")
    second = add(api, repo, content=b"two", revision="next/2")
    found = {name: content(api, repo, revision=name) for name in ("main", "v1", "next/2", first.oid, second.oid)}
    assert found == {"main": b"one", "v1": b"one", "next/2": b"two", first.oid: b"one", second.oid: b"two"}
    refs = api.list_repo_refs(repo)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": first.oid, "next/2": second.oid}
    assert [tag.name for tag in refs.tags] == ["v1"]
    assert [entry.title for entry in api.list_repo_commits(repo)] == ["add", "initial commit"]
    assert api.model_info(repo, revision="v1").sha == first.oid
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="next/2")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")


def test_files_and_folders_come_and_go(api, repo):
    add(api, repo, "code/a.py", b"a")
    add(api, repo, "code/b/c.py", b"c")
    assert {item.path for item in api.list_repo_tree(repo)} == {".gitattributes", "code"}
    assert {item.path for item in api.list_repo_tree(repo, "code")} == {"code/a.py", "code/b"}
    assert [item.path for item in api.get_paths_info(repo, ["code/a.py", "nothing"])] == ["code/a.py"]
    api.create_commit(repo, [CommitOperationDelete("code/", is_folder=True)], commit_message="remove")
    assert api.list_repo_files(repo) == [".gitattributes"]
    with pytest.raises(EntryNotFoundError):
        content(api, repo, "code/a.py")
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        api.create_commit(repo, [CommitOperationDelete("code/a.py")], commit_message="again")


def test_a_stale_parent_is_refused(api, repo):
    old = api.model_info(repo).sha
    add(api, repo, content=b"one", parent_commit=old)
    with pytest.raises(HfHubHTTPError) as refused:
        add(api, repo, content=b"two", parent_commit=old)
    assert refused.value.response.status_code == 412
    assert content(api, repo) == b"one"


def test_a_pull_request_is_visible_only_under_its_ref_until_it_is_merged(hub, api, repo):
    add(api, repo, content=b"one")
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_token("bob"))
    request = add(stranger, repo, content=b"two", create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    assert content(api, repo) == b"one" and content(api, repo, revision="refs/pr/1") == b"two"
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.merge_pull_request(repo, 1)
    api.merge_pull_request(repo, 1)
    assert content(api, repo) == b"two"


def test_a_commit_cannot_name_a_large_file_that_was_not_uploaded(hub, api, repo):
    file = {"path": "x.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}
    body = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": file}]
    request = urllib.request.Request(
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        "\n".join(map(json.dumps, body)).encode(),
        {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert api.list_repo_files(repo) == [".gitattributes"]


@pytest.mark.parametrize("path", ["../outside", ".git/config", "/etc/x"])
def test_a_commit_cannot_leave_its_repository(api, repo, path):
    operation = CommitOperationAdd(path_in_repo="inside", path_or_fileobj=b"x")
    operation.path_in_repo = path  # past the client's own check
    with pytest.raises(HfHubHTTPError, match="Ignoring path"):
        api.create_commit(repo, [operation], commit_message="out")
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_the_front_matter_of_a_card_is_checked(api, repo):
    with pytest.raises(ValueError, match="invalid YAML"):
        add(api, repo, "README.md", b"---\ntags: [a\n---\n")
    add(api, repo, "README.md", b"---\nlicense: mit\n---\n")
    assert api.model_info(repo).card_data.license == "mit"


# -- people ------------------------------------------------------------------------------------------------------------


def test_a_private_repository_exists_for_its_members_only(hub, api):
    api.create_repo("acme/secret", private=True)
    add(api, "acme/secret")
    assert api.model_info("acme/secret").private
    for token in (False, hub.add_token("bob")):
        other = HfApi(endpoint=hub.endpoint, token=token)
        with pytest.raises(RepositoryNotFoundError):
            other.model_info("acme/secret")
        with pytest.raises(RepositoryNotFoundError):
            content(other, "acme/secret")


def test_who_may_write(hub, api, repo):
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice", "read", orgs=("acme",)))
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_token("bob"))
    for other in (reader, stranger):
        assert other.model_info(repo).id == repo
        with pytest.raises(HfHubHTTPError, match="403"):
            add(other, repo)
        with pytest.raises(HfHubHTTPError, match="403"):
            other.create_repo("acme/y")
    for token in (hub.add_token("alice", seconds=-1), "hf_unknown"):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(endpoint=hub.endpoint, token=token).whoami()
        assert refused.value.response.status_code == 401
    assert api.whoami()["name"] == "alice" and api.list_repo_files(repo) == [".gitattributes"]


def test_the_file_store_wants_signed_addresses_and_the_right_content(hub, api, repo):
    add(api, repo, "x.safetensors", b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    for path, status in ((f"/large/{sha256}", 403), (f"/large/{'0' * 64}?signature=1", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(hub.files + path)
        assert refused.value.code == status
    other = "1" * 64
    put = urllib.request.Request(hub.signed(f"/large/{other}"), b"another content", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)
    assert hub.objects.read("large", other) is None


# -- large files -------------------------------------------------------------------------------------------------------


def test_a_large_file_is_uploaded_once(hub, api, repo):
    add(api, repo, "a.safetensors", b"weights" * 1000)
    add(api, repo, "b.safetensors", b"weights" * 1000)
    assert len(lines(hub, "files PUT")) == 1
    assert content(api, repo, "b.safetensors") == b"weights" * 1000
    assert all("authorization" not in request.headers for request in hub.requests if request.server == "files")


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, api, repo):
    big = os.urandom(12 * MEGA)
    add(api, repo, "big.safetensors", big)
    hub.faults.append(Fault("files GET", cut_reply=11 * MEGA))
    assert content(api, repo, "big.safetensors") == big
    gets = [request for request in hub.requests if request.line.startswith("files GET")]
    assert [request.headers.get("range") for request in gets] == [None, f"bytes={10 * MEGA}-"]


def test_a_restart_loses_nothing(hub, api, repo):
    add(api, repo, "x.safetensors", b"weights")
    before, endpoint = api.model_info(repo).sha, hub.endpoint
    hub.stop()
    hub.start()
    assert hub.endpoint == endpoint and api.model_info(repo).sha == before
    assert content(api, repo, "x.safetensors") == b"weights"


# -- other clients -----------------------------------------------------------------------------------------------------


def test_datasets_are_pushed_and_streamed_back(hub, api, tmp_path):
    code = """
from datasets import Dataset, load_dataset
roles = ("user", "assistant")
rows = [{"messages": [{"role": role, "content": f"{role} {i}"} for role in roles]} for i in range(5)]
Dataset.from_list(rows).push_to_hub("acme/chats", private=True)
assert load_dataset("acme/chats", split="train").to_list() == rows
assert list(load_dataset("acme/chats", split="train", streaming=True)) == rows
"""
    command = [sys.executable, "-I", "-c", code]
    subprocess.run(command, env=environment(hub, tmp_path / "home"), check=True, timeout=280)
    assert api.dataset_info("acme/chats").private


def test_by_hand(tmp_path, monkeypatch):
    """``python -m tests.helpers.hub`` prints what a shell needs, and serves."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    command = [sys.executable, "-m", "tests.helpers.hub", "--port", "0", "--folder", tmp_path / "hub"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            shown = [process.stdout.readline() for _ in range(3)]
            variables = dict(re.findall(r"export (HF_\w+)=(\S+)", "".join(shown)))
            api = HfApi(endpoint=variables["HF_ENDPOINT"], token=variables["HF_TOKEN"])
            assert api.create_repo("acme/x").repo_id == "acme/x" and api.whoami()["name"] == "me"
        finally:
            process.kill()
