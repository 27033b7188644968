"""``ppow push``: what the repository of a drafter holds, and what its card says."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from decoding_helpers import build_target, random_drafter
from figures_of_a_drafter import METRICS
from ppow.training import cli, hub, provenance
from ppow.training.card import began_with_baseline, check_figures, data_name, public_command
from ppow.training.config import PushConfig, ReinforceConfig, SupervisedConfig
from ppow.training.fingerprints import fingerprint
from ppow.training.repository import assemble, check_private

RUN = {
    "command": "supervised",
    "config": {"steps": 7, "batch_size": 2, "accumulation": 3, "data": "org/chats", "learning_rate": 1e-3, "seed": 5},
    "hardware": {"cpu": "a CPU", "gpus": ["a GPU"]},
    "argv": ["ppow", "supervised", "--data", "org/chats", "--steps=7"],
}
RUN["config"]["dtype"] = "float32"


@pytest.fixture
def pair(tmp_path, tiny_tokenizer):
    """A target and its drafter on disk, with figures and the record of two stages."""
    target = build_target(vocab_size=len(tiny_tokenizer)).float()
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer.save_pretrained(tmp_path / "target")
    random_drafter(target).float().save_pretrained(tmp_path / "drafter")
    second = {**RUN, "command": "reinforce", "config": {**RUN["config"], "data": "chats.jsonl"}, "started_from": RUN}
    (tmp_path / "drafter" / "provenance.json").write_text(json.dumps(second))
    (tmp_path / "figures").mkdir()
    weights = {"target": fingerprint(tmp_path / "target"), "drafter": fingerprint(tmp_path / "drafter", whole=True)}
    write_metrics(tmp_path, {**METRICS, "weights": weights})
    return tmp_path


def write_metrics(pair, metrics: dict) -> None:
    (pair / "figures" / "metrics.json").write_text(json.dumps(metrics))


def read_metrics(pair) -> dict:
    return json.loads((pair / "figures" / "metrics.json").read_text())


def assembled(pair, **options):
    folder = pair / "repository"
    folder.mkdir()
    options = {"target": "acme/target", "metrics": str(pair / "figures"), **options}
    assemble(PushConfig(drafter=str(pair / "drafter"), repo="acme/drafter", **options), folder)
    return folder


def test_the_repository_is_complete_and_its_weights_are_the_drafters(pair):
    folder = assembled(pair)
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    needed = {"README.md", "config.json", "generation_config.json", "metrics.json", "provenance.json"}
    assert needed | {"modeling_ppow.py", "custom_generate/generate.py", "model.safetensors"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"md", "json", "py", "safetensors"}
    before, after = (load_file(at / "model.safetensors") for at in (pair / "drafter", folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "PPOWDrafter" in json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"]


def test_the_repository_serves_a_process_without_this_package(pair, tmp_path):
    folder = assembled(pair)
    code = (
        "import sys\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "import torch\n"
        f"target = AutoModelForCausalLM.from_pretrained({str(pair / 'target')!r})\n"
        f"drafter = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "ids = torch.tensor([[5, 9, 7]])\n"
        "plain = target.generate(ids, max_new_tokens=9, do_sample=False)\n"
        "ours = target.generate(ids, max_new_tokens=9, do_sample=False, assistant_model=drafter)\n"
        "assert torch.equal(plain, ours) and 'ppow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path, timeout=280)


def test_the_card_says_what_was_recorded_and_nothing_else(pair):
    folder = assembled(pair, revision="v2", license="mit")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model == "acme/target" and card.data.datasets == ["org/chats"]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["gsm8k T=0", "acceptance_length"] == 2.5 and results["gsm8k T=1", "speedup"] == 1.5
    text = card.text
    assert "| gsm8k T=0 | 2 | 2.50 (2.25-2.75) | - | 100 | 150 | 1.50x (1.25-1.75) | 2 of 2 | - |" in text
    assert "acceptance length +0.25 (-0.12 to +0.50, paired)" in text
    assert "1. `ppow supervised`: 7 steps of 6 texts" in text and "2. `ppow reinforce`" in text
    assert (
        'revision="v2"' in text and "chats.jsonl" in text and "\nppow supervised --data org/chats --steps=7\n" in text
    )
    # every number with a decimal point is in one of the files it was made from
    known = json.dumps(METRICS) + (folder / "provenance.json").read_text() + (folder / "config.json").read_text()
    known = {round(float(number), 2) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?|\d+", known)}
    body = re.sub(r"arxiv\.org/abs/\S+|arXiv \d+\.\d+|\{\d+\.\d+\}|>= 5\.17|temperature 0", "", text)
    for number in re.findall(r"(?<![\w.])[+-]?\d+\.\d+(?![\w.])", body):
        assert any(abs(float(number) - value) < 0.0051 for value in known), number


def test_without_figures_and_record_the_card_says_so(pair):
    (pair / "drafter" / "provenance.json").unlink()
    (pair / "drafter" / "generation_config.json").unlink()  # nor how it drafts: then as PPOW does by default
    text = (assembled(pair, metrics=None) / "README.md").read_text()
    assert "a chain of 10 tokens from CUDA graphs, elsewhere of up to as many, while another pays" in text
    assert "No figures were recorded" in text and "How it was trained was not recorded" in text


def test_figures_without_a_baseline_make_a_card(pair):
    metrics = {key: value for key, value in read_metrics(pair).items() if key != "baseline"}
    for result in metrics["results"].values():
        result.pop("gain")
    write_metrics(pair, metrics)
    text = (assembled(pair) / "README.md").read_text()
    assert "| gsm8k T=0 | 2 | 2.50" in text and "compared with" not in text and "paired" not in text


def test_a_card_names_the_quantized_copy_that_was_measured(pair):
    """Its weights are not the target's, wherever those are known; the stage's record decides."""
    assert "quantized copy" not in (assembled(pair) / "README.md").read_text()
    shutil.rmtree(pair / "repository")
    metrics = read_metrics(pair)
    metrics["config"]["target"] = "small.Q4_1.gguf"
    metrics["weights"]["target"] = "1" * 64
    write_metrics(pair, metrics)
    text = (assembled(pair) / "README.md").read_text()
    assert "Measured on `small.Q4_1.gguf`, a quantized copy of the target" in text
    place, stage = pair / "drafter", {"weights": {"target": "2" * 64}}
    check_figures(metrics, place, str(pair / "target"), [])
    with pytest.raises(ValueError, match="measured on a target with other weights"):
        check_figures(metrics, place, str(pair / "target"), [stage])
    metrics["config"]["target"] = "target"
    with pytest.raises(ValueError, match="measured on a target with other weights"):
        check_figures(metrics, place, str(pair / "target"), [])


def test_a_card_tells_near_ties_and_faults_apart(pair):
    metrics = read_metrics(pair)
    metrics["results"]["gsm8k T=0"] |= {
        "samples": 9,
        "near_ties": 3,
        "faults": 1,
        "reference": 9,
        "reference_agrees": 8,
    }
    write_metrics(pair, metrics)
    text = (assembled(pair) / "README.md").read_text()
    assert "| 2 of 9, 3 near ties, **1 FAULT** | 8 of 9 |" in text and "closer than float32 rounds" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"drafter": "0" * 64},
            r"holds the figures of other weights \(0{12}\) than this drafter's .* another one there",
        ),
        ({"drafter": "0" * 64, "baseline": None}, "which are its baseline there"),
        ({"target": "1" * 64}, r"was measured on a target with other weights \(1{12}\)"),
        (None, "does not say which weights"),
    ],
)
def test_figures_of_other_weights_are_not_printed(pair, change, message):
    """Of another drafter, of its baseline, of another target (here the one that stage 2 recorded), or of nobody."""
    metrics = read_metrics(pair)
    own = metrics["weights"]
    if change and "baseline" in change:
        change = {**change, "baseline": own["drafter"]}
    write_metrics(pair, {**metrics, "weights": change and {**own, **change}})
    record = json.loads((pair / "drafter" / "provenance.json").read_text())
    (pair / "drafter" / "provenance.json").write_text(json.dumps({**record, "weights": {"target": own["target"]}}))
    with pytest.raises(ValueError, match=message):
        assembled(pair)


def test_a_fingerprint_is_that_of_the_weights(pair, tmp_path):
    drafter = random_drafter(build_target(vocab_size=300)).float()
    drafter.save_pretrained(tmp_path / "one")
    drafter.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for whole in (False, True):
        own = fingerprint(tmp_path / "one", whole)
        assert own == fingerprint(tmp_path / "shards", whole)
        (tmp_path / "one" / "optimizer.safetensors").write_bytes(b"of a checkpoint, no weights")
        assert own == fingerprint(tmp_path / "one", whole)
        (tmp_path / "one" / "optimizer.safetensors").unlink()
        weight = drafter.lm_head.weight.data[-1, -1:]  # the last byte of a tensor is read however large it is
        weight += 1
        drafter.save_pretrained(tmp_path / "changed")
        weight -= 1
        assert own != fingerprint(tmp_path / "changed", whole)
    drafter.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    assert own != fingerprint(tmp_path / "other", True)
    assert fingerprint(tmp_path / "figures") is None and fingerprint("nobody/nothing") is None


def test_of_a_large_tensor_four_blocks_are_read():
    from ppow.training.fingerprints import SAMPLED, blocks

    assert blocks(8, 8 + SAMPLED, whole=False) == [(8, SAMPLED)] and blocks(0, 10**9, whole=True) == [(0, 10**9)]
    quarter = SAMPLED // 4
    assert blocks(5, 5 + 10 * quarter, whole=False) == [(5 + i * 3 * quarter, quarter) for i in range(4)]


def recorded(preset):
    """What a run of stage 2 records of its options."""
    given = {"preset": preset, "target": "t", "drafter": "d", "data": "data/train.jsonl", "output_dir": "o"}
    return ReinforceConfig.from_dict(given).to_dict(without={"target", "drafter", "output_dir"})


def test_training_records_the_weights_of_its_target(pair):
    config = SupervisedConfig(target=str(pair / "target"), data="chats.jsonl", output_dir=str(pair / "run"))
    weights = provenance.read(provenance.write(pair / "run", config))["weights"]
    assert weights == {"target": fingerprint(pair / "target")}


@pytest.mark.parametrize(
    ("options", "says", "never"),
    [
        (recorded("ppow"), "every window of the texts, without rollouts", "group"),
        (recorded("ppow"), "plus a supervised loss (lk) at weight 3", "group"),
        (
            {**recorded("ppow"), "supervised_loss": "cst", "all_windows": False},
            "loss (cst) at weight 3",
            "every window",
        ),
        (recorded("published"), "groups of\n8 rollouts", "closed form"),
        (recorded("lk"), "**Trained with** LK's loss (`lk`, arXiv 2602.23881)", "closed form"),
        (recorded("cst"), "stage 1's supervised loss, continued (`cst`)", "closed form"),
        ({**recorded("cst"), "objective": "eal"}, "**Trained with** `eal`.\nThis is not", "closed form"),
    ],
)
def test_the_card_follows_how_the_drafter_was_trained(pair, options, says, never):
    record = json.loads((pair / "drafter" / "provenance.json").read_text())
    record["config"] |= options
    (pair / "drafter" / "provenance.json").write_text(json.dumps(record))
    text = ModelCard.load(assembled(pair) / "README.md").text
    assert says in text and never not in text


def test_a_card_names_no_folder_of_a_run():
    argv = "ppow reinforce --target=runs/t --drafter runs/s1 --data=runs/a.jsonl --output-dir=runs/x --resume --steps 5"
    told = "ppow reinforce --target=ORG/T --drafter STAGE1 --data=a.jsonl --output-dir=OUT --steps 5"
    assert public_command(argv.split(), {"target": "ORG/T", "drafter": None}) == told
    argv = (
        "ppow evaluate --target m.Q4.gguf --drafter=here --no-reference --prompts gsm8k --prompts-dir p --output-dir o"
    )
    told = "ppow evaluate --target m.Q4.gguf --drafter=ORG/D --no-reference --prompts gsm8k --output-dir OUT"
    assert public_command(argv.split(), {"drafter": "ORG/D"}) == told
    assert data_name("runs/a.jsonl") == "a.jsonl" and data_name("ORG/chats") == "ORG/chats"
    start = [{"weights": {"drafter": "1"}}]
    assert began_with_baseline({"weights": {"baseline": "1"}}, start)
    assert not any(
        began_with_baseline(given, start) for given in ({}, {"weights": {"baseline": "2"}}, {"weights": None})
    )


def test_the_cards_snippets_run(pair, monkeypatch):
    """As written, but for the two repository names, which become folders."""
    folder = assembled(pair)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("acme/drafter", str(folder)).replace("acme/target", str(pair / "target"))
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["output"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    assert isinstance(scope["tokenizer"], PreTrainedTokenizerFast)


# -- bad input ---------------------------------------------------------------------------------------------------------


def push(*arguments, capsys=None):
    status = cli.main(["push", *map(str, arguments)])
    return status, capsys.readouterr() if capsys else None


def test_a_dry_run_shows_files_and_card_and_uploads_nothing(pair, capsys):
    status, shown = push(pair / "drafter", "--repo", "acme/x", "--dry-run", capsys=capsys)
    assert status == 0 and "model.safetensors" in shown.out and "## Limits" in shown.out
    assert "name its Hub id with --target" in shown.out
    status, shown = push(pair / "drafter", "--repo", "acme/x", "--dry-run", "--target", "acme/t", capsys=capsys)
    assert status == 0 and "TARGET" not in shown.out and "name its Hub id" not in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repo", "nobody"], "expected ORG/NAME"),
        (["--repo", "acme/a b"], "expected ORG/NAME"),
        (["--repo", "acme/x", "--metrics", "nowhere"], "no metrics.json there"),
        (["--repo", "acme/x", "--target", "/models/target"], "--target /models/target: expected ORG/NAME"),
        (["--repo", "acme/x", "--tag", "v1", "--create-pr"], "not both"),
        (["--repo", "acme/x", "--dry-run", "--tag", "bad tag~"], "--tag 'bad tag~': expected a name that git takes"),
        (["--repo", "acme/x", "--dry-run", "--revision", "a..b"], "--revision 'a..b': expected a name that git takes"),
    ],
)
def test_what_cannot_be_pushed(pair, capsys, options, message):
    status, shown = push("--drafter", pair / "drafter", *options, capsys=capsys)
    assert status == 2 and message in shown.err


def test_names_of_tags_are_those_that_git_takes():
    """A leading dash too, which only `git tag` refuses."""
    letters = random.Random(0)
    names = ["".join(letters.choices("av1./-@{~ ^:?*[\\\u00e9\x7f", k=letters.randint(1, 4))) for _ in range(100)]
    for name in [*names, "v1.0", "a.lock", "a.lock/b", "x.locks", "next/one", "refs/pr/1", "-a", ""]:
        taken = name[:1] != "-" and not subprocess.run(["git", "check-ref-format", f"refs/tags/{name}"]).returncode
        with contextlib.nullcontext() if taken else pytest.raises(ValueError, match="--tag"):
            hub.check_ref(name, "--tag")


def test_a_folder_is_no_hub_id(pair, monkeypatch, capsys):
    """Even where its name looks like one."""
    monkeypatch.chdir(pair.parent)
    name = f"{pair.name}/target"
    expected = "expected the Hub id of the {0}, ORG/NAME, but this is a folder here. Push the {0} to the Hub first"
    status, shown = push(pair / "drafter", "--repo", "acme/x", "--dry-run", "--target", name, capsys=capsys)
    assert status == 2 and f"--target {name}: {expected.format('target')}" in shown.err
    for arguments, start in (
        ([f"{pair.name}/drafter"], f"the drafter {pair.name}/drafter: "),
        (["acme/drafter", "--target", name], f"--target {name}: "),
        (["acme/drafter", "--baseline", f"{pair.name}/drafter"], f"--baseline {pair.name}/drafter: "),
    ):
        status, shown = push(*arguments, "--space", "--repo", "acme/demo", "--dry-run", capsys=capsys)
        what = start.split()[0].removeprefix("--").replace("the", "drafter")
        assert status == 2 and start + expected.format(what) in shown.err


def test_the_name_to_push_to_is_refused_in_the_words_of_its_option():
    with pytest.raises(ValueError, match="--push-to-hub noslash: expected ORG/NAME"):
        hub.BackgroundPush("noslash")


def test_damaged_weights_are_named(pair, capsys):
    weights = pair / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    status, shown = push(pair / "drafter", "--repo", "acme/x", "--dry-run", capsys=capsys)
    assert status == 2 and f"{weights} is damaged or truncated" in shown.err


def test_weights_that_are_not_finite_are_not_pushed(pair, capsys):
    drafter = random_drafter(build_target()).float()
    drafter.fc.weight.data[0, 0] = torch.nan
    drafter.save_pretrained(pair / "broken")
    status, shown = push("--drafter", pair / "broken", "--repo", "acme/x", capsys=capsys)
    assert status == 2 and "not finite (fc.weight)" in shown.err


@pytest.mark.parametrize("secret", ["hf_" + "a" * 30, "/home/alice/chats.jsonl"])
def test_nothing_private_is_pushed(pair, secret):
    """What a record says too much is shortened; what slips in elsewhere is refused."""
    record = json.loads((pair / "drafter" / "provenance.json").read_text())
    (pair / "drafter" / "provenance.json").write_text(json.dumps({**record, "note": secret}))
    folder = assembled(pair)
    assert secret not in (folder / "provenance.json").read_text()
    (folder / "notes.md").write_text(f"see {secret}")
    with pytest.raises(ValueError, match=r"notes\.md holds (an access token|the local path)"):
        check_private(folder)


def test_a_path_of_this_machine_is_not_pushed_wherever_it_lies(pair):
    folder = assembled(pair)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "found_at": "/mnt/data/target"}))
    with pytest.raises(ValueError, match=r"config\.json holds a local path"):
        check_private(folder)


def test_the_data_sets_of_the_hub_are_told_from_files(pair):
    record = json.loads((pair / "drafter" / "provenance.json").read_text())
    record["config"]["data"], record["started_from"]["config"]["data"] = "mine/chats.jsonl.gz", "acme/mail"
    (pair / "drafter" / "provenance.json").write_text(json.dumps(record))
    assert ModelCard.load(assembled(pair) / "README.md").data.datasets == ["acme/mail"]
