"""A drafter's trip to a Hub and back: ``ppow push``, then the real clients against the hub of tests/helpers/hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoCard, constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import get_session
from transformers import AutoModel, AutoModelForCausalLM

import small_pair
from figures_of_a_drafter import METRICS
from hub.clients import environment, push
from pair import find_names
from ppow import PPOWDrafter
from ppow.training import cli
from ppow.training.fingerprints import fingerprint

pytest_plugins = ["hub.fixtures"]

GREEDY = {"max_new_tokens": 20, "do_sample": False}


def load(repo, **options):
    return AutoModel.from_pretrained(repo, trust_remote_code=True, **options)


def prompt(target):
    """One that the drafter of ``pair`` was trained on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randint(1, target.config.vocab_size, (32, 6))[:1]


def generated(target, drafter, **options):
    """The tokens, and what was accepted on the way to them."""
    out = target.generate(prompt(target), assistant_model=drafter, return_dict_in_generate=True, **GREEDY, **options)
    return out.sequences.tolist(), out.acceptance.acceptance_length


def written(hub):
    """What was changed or uploaded so far."""
    reading = ("preupload", "paths-info", "validate-yaml", "objects/batch", "repos/create")
    lines = [request.line for request in hub.requests if request.method in ("POST", "PUT", "DELETE")]
    return [line for line in lines if not any(word in line for word in reading)]


@pytest.fixture
def target(pair):
    return AutoModelForCausalLM.from_pretrained(pair / "target")


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_pair_makes_the_trip(hub, pair, target, monkeypatch, xet):
    """By branch, tag and sha, through both entrances: the tokens and the acceptance of before."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    plain = target.generate(prompt(target), **GREEDY).tolist()
    before = generated(target, load(pair / "drafter"))
    assert before[0] == plain and before[1] > 1.5
    target.push_to_hub("alice/target")
    assert push(pair, "alice/drafter", "--target", "alice/target", "--tag", "v1") == 0
    refs = HfApi().list_repo_refs("alice/drafter")
    assert refs.tags[0].target_commit == refs.branches[0].target_commit
    pulled = AutoModelForCausalLM.from_pretrained("alice/target")
    for revision in ("main", "v1", refs.branches[0].target_commit):
        drafter = load("alice/drafter", revision=revision)
        assert generated(pulled, drafter) == before
        custom = pulled.load_custom_generate("alice/drafter", revision=revision, trust_remote_code=True)
        assert custom(pulled, inputs=prompt(target), assistant_model=drafter, **GREEDY).tolist() == plain
    assert generated(pulled, drafter, custom_generate="alice/drafter", trust_remote_code=True) == before
    assert any("/xorbs/" in request.path for request in hub.requests) == xet


PAGE = Path(__file__).parents[2] / "docs" / "share.md"
TARGETS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "me/target"}
PULL = """
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("me/target")
target = AutoModelForCausalLM.from_pretrained("me/target", dtype="float32")  # in bfloat16 near ties may change places
drafter = AutoModel.from_pretrained("me/drafter", revision="v1", trust_remote_code=True, dtype="float32")
inputs = tokenizer("Tom has 12 apples.", return_tensors="pt")
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=32, do_sample=False)
assert torch.equal(output, target.generate(**inputs, max_new_tokens=32, do_sample=False))
"""


def test_the_pages_walk_with_a_trained_pair(hub, tmp_path, monkeypatch):
    """The commands of "Push and pull" in docs/share.md, on a hub of one's own: a real drafter with its record."""
    monkeypatch.setenv("HF_TOKEN", hub.add_token("me", orgs=("acme",)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundled").symlink_to(small_pair.PAIR)
    HfApi().create_repo("me/target")
    HfApi().upload_folder(repo_id="me/target", folder_path=small_pair.TARGET)  # `hf upload me/target FOLDER .`
    (part,) = re.findall(r"## Push and pull.*?```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    walk = [line.partition("#")[0].split() for line in part.splitlines() if line.startswith("ppow ")]
    assert len(walk) == 3
    for line in walk:
        assert cli.main([TARGETS.get(word, word) for word in line[1:]]) == 0, line
    assert [row.title for row in HfApi().list_repo_commits("me/drafter")] == ["ppow push v1", "initial commit"]
    scope = {}
    exec(compile(PULL, PAGE.name, "exec"), scope)
    before = generated(scope["target"], PPOWDrafter.from_pretrained(small_pair.DRAFTER, dtype="float32"))
    assert generated(scope["target"], scope["drafter"]) == before


def test_a_private_repository(hub, pair):
    assert push(pair, "alice/secret", "--private") == 0
    other = hub.add_token("bob")
    for token in (other, False):
        with pytest.raises(OSError, match="alice/secret"):
            load("alice/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("alice/secret")
    assert load("alice/secret").config.model_type == "ppow"


def test_a_public_repository_does_not_become_private_by_asking(hub, pair, capsys):
    assert push(pair, "alice/open") == 0
    assert push(pair, "alice/open", "--private") == 2
    assert "exists and is public" in capsys.readouterr().err


def test_a_pull_request_of_a_stranger(hub, pair, monkeypatch, capsys):
    assert push(pair, "alice/drafter") == 0
    main = HfApi().model_info("alice/drafter").sha
    with monkeypatch.context() as as_bob:
        as_bob.setenv("HF_TOKEN", hub.add_token("bob"))
        assert push(pair, "alice/drafter", "--license", "mit") == 2
        assert "may not write to alice/drafter" in capsys.readouterr().err
        assert push(pair, "alice/drafter", "--license", "mit", "--create-pr") == 0
        assert "/alice/drafter/discussions/1" in capsys.readouterr().out
    assert HfApi().model_info("alice/drafter").sha == main
    proposed = HfApi().model_info("alice/drafter", revision="refs/pr/1").sha
    assert load("alice/drafter", revision="refs/pr/1").config.model_type == "ppow"
    HfApi().merge_pull_request("alice/drafter", 1)
    assert HfApi().model_info("alice/drafter").sha == proposed


def test_another_branch(hub, pair):
    assert push(pair, "alice/drafter") == push(pair, "alice/drafter", "--revision", "next/one", "--license", "mit") == 0
    heads = {branch.name: branch.target_commit for branch in HfApi().list_repo_refs("alice/drafter").branches}
    assert set(heads) == {"main", "next/one"} and heads["main"] != heads["next/one"]
    assert load("alice/drafter", revision="next/one").config.model_type == "ppow"


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_second_push_uploads_what_has_changed(hub, pair, tmp_path, monkeypatch, capsys, xet):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    (tmp_path / "metrics.json").write_text(
        json.dumps({**METRICS, "weights": {"drafter": fingerprint(pair / "drafter", whole=True)}})
    )
    (tmp_path / "acceptance.png").write_bytes(b"\x89PNG a picture")
    assert push(pair, "alice/drafter", "--metrics", str(tmp_path)) == 0
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="examples/mine.py", repo_id="alice/drafter")
    hub.requests.clear()
    capsys.readouterr()
    for more in ([], ["--create-pr"]):
        assert push(pair, "alice/drafter", "--metrics", str(tmp_path), *more) == 0
        said = capsys.readouterr().out
        assert "nothing to change: alice/drafter already holds this" in said and "pushed" not in said
    assert written(hub) == []
    assert push(pair, "alice/drafter", "--metrics", str(tmp_path), "--tag", "v1") == 0  # its card names the tag
    assert [line.split("/")[-2] for line in written(hub)] == ["commit", "tag"]
    hub.requests.clear()
    assert push(pair, "alice/drafter") == 0
    (commit,) = (request for request in hub.requests if "/commit/" in request.path)
    changed = [json.loads(line) for line in commit.body.splitlines()][1:]
    assert [(line["key"], line["value"]["path"]) for line in changed] == [
        ("file", "README.md"),
        ("deletedFile", "acceptance.png"),
        ("deletedFile", "metrics.json"),
    ]
    assert "examples/mine.py" in HfApi().list_repo_files("alice/drafter")


def test_every_snippet_of_the_card_runs(hub, pair, target, tiny_tokenizer, tmp_path, monkeypatch):
    target.push_to_hub("acme/target")
    tiny_tokenizer.push_to_hub("acme/target")
    (tmp_path / "metrics.json").write_text(
        json.dumps({**METRICS, "weights": {"drafter": fingerprint(pair / "drafter", whole=True)}})
    )
    assert push(pair, "acme/drafter", "--target=acme/target", "--tag=v1", f"--metrics={tmp_path}") == 0
    card, asked = ModelCard.load("acme/drafter"), len(hub.requests)
    session = get_session()  # huggingface_hub 1.x validates at huggingface.co whatever HF_ENDPOINT says
    there = session.post
    here = lambda url, **more: there(url.replace("https://huggingface.co", hub.endpoint), **more)  # noqa: E731
    monkeypatch.setattr(session, "post", here)
    card.validate()
    assert any(request.path == "/api/validate-yaml" for request in hub.requests[asked:])
    assert card.data.base_model_relation == "adapter" and len(card.data.eval_results) == 4
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
        assert 'revision="v1"' in block
        exec(compile(block, "README.md", "exec"), scope)
        torch.testing.assert_close(scope["output"], scope["target"].generate(**scope["inputs"], max_new_tokens=32))


def test_the_space_of_a_pushed_drafter(hub, pair, target, capsys):
    """Its pair is pinned to commits, and its front matter names the pair."""
    target.push_to_hub("acme/target")
    assert push(pair, "acme/drafter", "--target", "acme/target") == 0
    space = ["push", "acme/drafter", "--space", "--repo", "acme/demo"]
    assert cli.main([*space, "--dry-run"]) == 0 and not HfApi().repo_exists("acme/demo", repo_type="space")
    assert cli.main(space) == 0
    assert "/spaces/acme/demo/commit/" in capsys.readouterr().out
    front = RepoCard.load("acme/demo", repo_type="space").data
    assert front["models"] == ["acme/target", "acme/drafter"] and front["sdk"] == "gradio"
    named = json.loads(Path(hf_hub_download("acme/demo", "pair.json", repo_type="space")).read_text())
    assert named == {
        "target": "acme/target",
        "target_revision": HfApi().model_info("acme/target").sha,
        "drafter": "acme/drafter",
        "drafter_revision": HfApi().model_info("acme/drafter").sha,
    }
    sent = set(HfApi().list_repo_files("acme/demo", repo_type="space"))
    assert {front["app_file"], "requirements.txt", "pair.json", "README.md"} <= sent
    assert push(pair, "acme/stage1", "--target", "acme/target") == 0
    assert cli.main([*space, "--baseline", "acme/stage1"]) == 0
    named |= {"baseline": "acme/stage1", "baseline_revision": HfApi().model_info("acme/stage1").sha}
    path = hf_hub_download("acme/demo", "pair.json", repo_type="space")
    assert json.loads(Path(path).read_text()) == named
    assert vars(find_names({}, Path(path))) == named
    capsys.readouterr()
    assert cli.main([*space, "--baseline", "acme/stage1", "--tag", "v1"]) == 0
    assert "nothing to change: acme/demo already holds this; it is tagged v1 now" in capsys.readouterr().out
    assert cli.main([*space, "--baseline", "acme/nothing"]) == 2
    assert "--baseline acme/nothing: the Hub has no such repository" in capsys.readouterr().err
    assert cli.main(["push", "acme/drafter", "--repo", "acme/x", "--baseline", "acme/stage1"]) == 2


@pytest.mark.parametrize("drafter", ["acme/nothing", "no such/id", "acme/lonely"])
def test_a_space_needs_a_pair_on_the_hub(hub, pair, capsys, drafter):
    assert push(pair, "acme/lonely") == 0  # does not record its target
    assert cli.main(["push", drafter, "--space", "--repo", "acme/demo"]) == 2
    error = capsys.readouterr().err
    assert drafter in error and not HfApi().repo_exists("acme/demo", repo_type="space")
    assert ("the drafter acme/nothing: the Hub has no such repository" in error) == (drafter == "acme/nothing")


def test_a_space_when_the_hub_does_not_answer(hub, capsys):
    hub.stop()
    assert cli.main(["push", "acme/drafter", "--space", "--repo", "acme/demo"]) == 2
    assert "the drafter acme/drafter: the Hub could not be asked for it" in capsys.readouterr().err


# -- training against a hub --------------------------------------------------------------------------------------------

ROWS = [
    [{"role": "user", "content": f"Add {i}."}, {"role": "assistant", "content": f"{i} and one make {i + 1}, the dog."}]
    for i in range(8)
]


def stage1(data, folder, **options):
    options |= {"steps": 4, "save_every": 2, "batch_size": 2, "accumulation": 1, "ttt_steps": 2, "max_length": 64}
    options |= {"draft_vocab_size": 200, "data": data, "output_dir": folder}
    return ["supervised", *(f"--{key}={value}" for key, value in options.items())]


def stage2(data, folder, **options):
    options |= {"steps": 2, "save_every": 1, "batch_size": 2, "accumulation": 1, "max_length": 64, "window_size": 3}
    options |= {"group_size": 2, "windows_per_sequence": 2, "data": data, "output_dir": folder}
    return ["reinforce", *(f"--{key}={value}" for key, value in options.items())]


def test_training_on_a_data_set_of_the_hub_and_pushing_along(hub, pair, target, tiny_tokenizer, tmp_path):
    target.push_to_hub("acme/target")
    tiny_tokenizer.push_to_hub("acme/target")
    first = stage1("acme/chats", "run", target="acme/target", push_to_hub="acme/drafter")
    second = stage2("acme/chats", "run2", target="acme/target", drafter="run", push_to_hub="acme/reinforced")
    code = f"""if True:
        import datasets, sys
        from ppow.training import cli
        datasets.Dataset.from_dict({{"messages": {ROWS!r}}}).push_to_hub("acme/chats")
        sys.exit(cli.main({first!r}) or cli.main({second!r}))
    """
    where = {"env": environment(hub, tmp_path / "home"), "cwd": tmp_path}
    subprocess.run([sys.executable, "-c", code], **where, check=True, timeout=280)
    titles = [row.title for row in HfApi().list_repo_commits("acme/drafter")]
    assert titles[0] == "step 4" and titles[-1] == "initial commit" and len(titles) >= 2
    card = ModelCard.load("acme/drafter")
    assert card.data.datasets == ["acme/chats"] and card.data.base_model == "acme/target"
    assert HfApi().list_repo_commits("acme/reinforced")[0].title == "step 2"
    text = ModelCard.load("acme/reinforced").text
    assert "1. `ppow supervised`: 4 steps" in text and "2. `ppow reinforce` (ppow, closed form): 2 steps" in text
    pulled = AutoModelForCausalLM.from_pretrained("acme/target")
    for repo in ("acme/drafter", "acme/reinforced"):
        assert generated(pulled, load(repo))[0] == pulled.generate(prompt(pulled), **GREEDY).tolist()


@pytest.mark.parametrize("trouble", ["nobody answers", "no such token"])
def test_training_goes_on_when_nothing_can_be_pushed(hub, pair, tmp_path, monkeypatch, caplog, trouble):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    if trouble == "nobody answers":
        hub.stop()
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    command = stage1(tmp_path / "chats.jsonl", tmp_path / "run", target=pair / "target", push_to_hub="acme/drafter")
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "was not pushed to acme/drafter" in caplog.text and "x" * 34 not in caplog.text
