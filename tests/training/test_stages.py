"""Both training stages through their public entrance: they learn, they resume bit-exactly, they refuse bad input."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ppow import PPOWConfig, PPOWDrafter
from ppow.training import checkpoints, preparation, reinforce, supervised
from ppow.training.cli import main as ppow
from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.data import Example, make_batch
from ppow.training.target import FrozenTarget
from two_processes import run_in_two_processes

STAGES = {"supervised": (supervised, SupervisedConfig), "reinforce": (reinforce, ReinforceConfig)}


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_target):
    """A tiny target, chats with answers, and a drafter of a few supervised steps."""
    folder = tmp_path_factory.mktemp("stages")
    save_target(folder / "target")
    with open(folder / "chats.jsonl", "w") as out:
        for i in range(12):
            answer = f"{i} and {i + 1} make {2 * i + 1}. A target verifies what the drafter has drafted, dog {i}."
            messages = [{"role": "user", "content": f"Add {i}."}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
    supervised.main(options(folder, "supervised", folder / "stage1", steps=2, save_every=2, keep_last=1))
    return folder


def options(home, stage, out, **changes):
    values = {
        "target": str(home / "target"),
        "data": str(home / "chats.jsonl"),
        "output_dir": str(out),
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 3e-3,
        "save_every": 2,
        "keep_last": 9,
        "log_every": 1,
        "max_length": 128,
    }
    if stage == "supervised":
        values |= {"draft_vocab_size": 200, "ttt_steps": 3}
    else:
        values |= {"drafter": str(home / "stage1"), "window_size": 4, "group_size": 3, "windows_per_sequence": 2}
        values |= {"proximity_margin": 8.0, "updates_per_rollout": 2, "preset": "published"}
    return STAGES[stage][1].from_dict(values | changes)


def flags_of(config):
    """A config as command-line flags."""
    values = config.to_dict()
    return [f"--{k}={v}" for k, v in values.items() if v is not False and v not in (None, [])]


def metrics_of(folder, without=("seconds",)):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(first, second):
    assert metrics_of(first) == metrics_of(second)
    assert [line["step"] for line in metrics_of(second)] == list(range(1, 7))
    one, two = weights_of(first), weights_of(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole_runs(home):
    """An uninterrupted run of each stage."""
    folders = {}
    for stage, (module, _) in STAGES.items():
        folders[stage] = home / f"{stage}-whole"
        module.main(options(home, stage, folders[stage]))
    return folders


def test_the_supervised_loss_falls(whole_runs):
    losses = [line["loss"] for line in metrics_of(whole_runs["supervised"])]
    assert losses[-1] < losses[0] - 0.2


def test_windows_are_drawn_by_criticality_after_the_switch(whole_runs):
    lines = metrics_of(whole_runs["reinforce"])
    assert [line["adaptive"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(line["windows"] == 4 for line in lines)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fails_in_step", [1, 4, 5])
def test_a_run_that_broke_off_resumes_bit_exactly(home, whole_runs, stage, fails_in_step, monkeypatch, tmp_path):
    module, _ = STAGES[stage]
    original = module.loss
    calls = iter(range(1000))
    per_step = 2 if stage == "supervised" else 4

    def breaks(*args):
        if next(calls) == (fails_in_step - 1) * per_step + 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        module.main(options(home, stage, tmp_path))
    assert not (tmp_path / "config.json").exists()
    monkeypatch.setattr(module, "loss", original)
    module.main(options(home, stage, tmp_path, resume=True))
    assert_same_run(whole_runs[stage], tmp_path)


def test_the_closed_form_learns_and_resumes_bit_exactly(home, tmp_path):
    """Stage 2 without rollouts: from its second checkpoint it goes on as if it had never stopped."""
    changes = {"preset": "ppow", "supervised_coef": 0.5, "learning_rate": 1e-2, "average_from": 0.2}
    reinforce.main(options(home, "reinforce", tmp_path / "whole", **changes))
    rewards = [line["reward"] for line in metrics_of(tmp_path / "whole")]
    assert max(rewards[3:]) > rewards[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("config.json", "checkpoints/step-000006"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    reinforce.main(options(home, "reinforce", tmp_path / "again", resume=True, **changes))
    assert_same_run(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("stage", STAGES)
def test_the_drafter_is_the_mean_of_its_weights(home, tmp_path, stage):
    """Of those after the steps from which on they are averaged, at a rate that stays; evaluation sees the mean too."""
    held_out = {"eval_data": str(home / "chats.jsonl"), "eval_every": 6}
    config = options(home, stage, tmp_path, average_from=0.5, save_every=1, warmup_steps=1, **held_out)
    STAGES[stage][0].main(config)
    checkpoint, found = tmp_path / "checkpoints" / "step-000006", weights_of(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_of(checkpoint).items())
    # the weights themselves, of which the optimizer's state has the twins
    steps = [load_file(tmp_path / "checkpoints" / f"step-00000{step}" / "optimizer.safetensors") for step in (4, 5, 6)]
    drafter = PPOWDrafter.from_pretrained(tmp_path)
    trained = [name for name, p in preparation.freeze_embedding(drafter).named_parameters() if p.requires_grad]
    for i, name in enumerate(trained):
        twins = [step[f"{i}.twin"] for step in steps]
        torch.testing.assert_close(found[name], torch.stack(twins).mean(0))
        assert name.endswith("norm.weight") or not torch.equal(found[name], twins[-1])
    lines = metrics_of(tmp_path)
    assert [line["learning_rate"] for line in lines] == [config.learning_rate] * 6
    target = FrozenTarget.load(config.target, "float32", "cpu")
    target.taps = drafter.config.target_taps
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    examples = preparation.load_examples(config, config.eval_data, tokenizer, supervised.EVAL_WINDOW)
    still = SimpleNamespace(config=config, accelerator=SimpleNamespace(device="cpu"))
    still.autocast = still.mean_weights = contextlib.nullcontext
    weight = {} if stage == "reinforce" else {"step_weight": config.step_weight}
    seen = supervised.evaluate(target, drafter, examples, preparation.pad_token(tokenizer), still, **weight)
    assert float(seen["eval_loss"]) == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_kill_minus_nine_and_resume(home, whole_runs, stage, tmp_path):
    """SIGKILL as soon as the second checkpoint exists; the resumed run equals an uninterrupted one."""
    config = options(home, stage, tmp_path)
    command = [sys.executable, "-m", "ppow.training.cli", stage, *flags_of(config)]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / "step-000004").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # a torn line at the end of the metrics, as a kill in the middle of a write leaves it
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    assert ppow([*command[3:], "--resume"]) == 0
    assert_same_run(whole_runs[stage], tmp_path)


LAUNCHED = {
    "supervised": ("supervised", {"optimizer": "muon", "norm_before_fc": True, "norm_output": True}),
    "published": ("reinforce", {}),
    "ppow": ("reinforce", {"preset": "ppow", "supervised_coef": 0.5, "average_from": 0.0}),
}


def test_two_processes_equal_one_with_twice_the_accumulation(home, tmp_path):
    """Of one launch, with the target whole on both and spread over them."""
    commands, pairs = [], []
    for name, (stage, changes) in LAUNCHED.items():
        given = {"steps": 2, "batch_size": 1, **changes}
        STAGES[stage][0].main(options(home, stage, tmp_path / name, **given))
        for sharded in (False, True):
            folder = tmp_path / f"{name}, sharded {sharded}"
            own = {**given, "accumulation": 1, "shard_target": sharded}
            commands.append([stage, *flags_of(options(home, stage, folder, **own))])
            pairs.append((tmp_path / name, folder))
    statuses, told = run_in_two_processes(tmp_path / "launch", commands)
    assert statuses == [["0", "0"]] * len(commands), told[-3000:]
    for first, second in pairs:
        one, two = weights_of(first), weights_of(second)
        for weight in one:
            torch.testing.assert_close(one[weight], two[weight], atol=2e-5, rtol=1e-4)
        for a, b in zip(metrics_of(first), metrics_of(second), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), second


SHARDED = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from ppow.training.target import FrozenTarget

accelerator = Accelerator(cpu=True)
(folder,) = json.loads((Path(sys.argv[1]) / "commands.json").read_text())
whole = FrozenTarget.load(folder, "float32", accelerator.device)
target = FrozenTarget.load_sharded(folder, "float32", accelerator)
whole.taps = target.taps = [0, 2, 3]
for name, parameter in target.model.named_parameters():
    assert isinstance(parameter, DTensor) == (".layers." in name), name
    if ".layers." in name:
        assert 2 * parameter.to_local().numel() == parameter.numel(), name
ids = torch.arange(12 + accelerator.process_index)[None] + 5  # the processes read different texts
for _ in range(2):
    reading, expected = target.read(ids), whole.read(ids)
    torch.testing.assert_close(reading.logits, expected.logits)
    torch.testing.assert_close(reading.taps, expected.taps)
assert target.agree(accelerator.process_index) == 1 and whole.agree(0) == 0
(Path(sys.argv[1]) / f"status-0-{accelerator.process_index}").write_text("0")
accelerator.wait_for_everyone()  # a process that leaves early breaks what the other still sends
accelerator.end_training()
"""


def test_a_sharded_target_holds_its_share_and_reads_the_same(home, tmp_path):
    assert run_in_two_processes(tmp_path, [str(home / "target")], SHARDED)[0] == [["0", "0"]]
    with pytest.raises(ValueError, match="accelerate launch"):
        supervised.main(options(home, "supervised", tmp_path / "run", shard_target=True))


def test_what_a_run_leaves_behind(home, whole_runs):
    folder = whole_runs["reinforce"]
    drafter = PPOWDrafter.from_pretrained(folder)
    assert drafter.config.draft_vocab_size == 200 and drafter.pruned
    before = PPOWDrafter.from_pretrained(home / "stage1")
    assert torch.equal(before.embed_tokens.weight, drafter.embed_tokens.weight)  # frozen: the target's
    assert torch.equal(before.d2t, drafter.d2t)
    assert not torch.equal(before.fc.weight, drafter.fc.weight)
    record = json.loads((folder / "provenance.json").read_text())
    assert record["config"]["window_size"] == 4
    assert str(home) not in (folder / "provenance.json").read_text()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_a_confidence_head_is_trained_kept_and_resumed(home, tmp_path):
    changes = {"preset": "ppow", "supervised_coef": 0.5, "confidence_head": True, "updates_per_rollout": 1}
    reinforce.main(options(home, "reinforce", tmp_path / "run", steps=4, **changes))
    drafter = PPOWDrafter.from_pretrained(tmp_path / "run")
    assert drafter.config.confidence_head and not PPOWDrafter.from_pretrained(home / "stage1").config.confidence_head
    fresh = torch.zeros_like(drafter.confidence_head.weight)
    fresh[:, -1] = 1
    assert not torch.allclose(drafter.confidence_head.weight, fresh, atol=1e-4)
    losses = [line["confidence_loss"] for line in metrics_of(tmp_path / "run") if "confidence_loss" in line]
    assert len(losses) == 4
    # stage 1 and rollouts leave it as it is
    config = options(home, "reinforce", tmp_path / "rolled", steps=2, drafter=str(tmp_path / "run"))
    reinforce.main(config)
    rolled = PPOWDrafter.from_pretrained(tmp_path / "rolled")
    assert torch.equal(rolled.confidence_head.weight, drafter.confidence_head.weight)
    assert not torch.equal(rolled.fc.weight, drafter.fc.weight)


def test_a_head_alone_leaves_the_drafts_as_they_are(home, tmp_path):
    reinforce.main(options(home, "reinforce", tmp_path / "run", steps=4, preset="head"))
    drafter, before = (PPOWDrafter.from_pretrained(place) for place in (tmp_path / "run", home / "stage1"))
    ours, theirs = drafter.state_dict(), before.state_dict()
    assert set(ours) - set(theirs) == {"confidence_head.weight", "confidence_head.bias"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert float(drafter.confidence_head.bias.abs().sum()) > 0
    losses = [line["confidence_loss"] for line in metrics_of(tmp_path / "run") if "confidence_loss" in line]
    assert len(losses) == 4
    with pytest.raises(ValueError, match="freeze_drafter leaves nothing to train without confidence_head: --preset"):
        options(home, "reinforce", tmp_path / "none", steps=4, preset="ppow", freeze_drafter=True)
    with pytest.raises(ValueError, match="the head alone is trained, by AdamW .* optimizer=muon"):
        options(home, "reinforce", tmp_path / "none", steps=4, preset="head", optimizer="muon")


def test_warm_start_and_held_out_figures(home, tmp_path):
    config = options(
        home,
        "supervised",
        tmp_path,
        steps=2,
        drafter=str(home / "stage1"),
        draft_vocab_size=None,
        eval_data=str(home / "chats.jsonl"),
        eval_every=1,
        dtype="bfloat16",
    )
    supervised.main(config)
    lines = metrics_of(tmp_path)
    assert all(len(line["eval_agreement"]) == 10 and 1 <= line["eval_acceptance_length"] <= 11 for line in lines)
    assert weights_of(tmp_path)["fc.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_drafter_of_other_width(home, tmp_path):
    config = options(
        home, "supervised", tmp_path, steps=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    supervised.main(config)
    drafter = PPOWDrafter.from_pretrained(tmp_path)
    assert drafter.config.hidden_size == 16 and drafter.config.target_hidden_size == 32


def test_starting_over_a_run_needs_a_word(home, whole_runs):
    with pytest.raises(ValueError, match="already holds a run"):
        supervised.main(options(home, "supervised", whole_runs["supervised"]))


@pytest.mark.parametrize("model", ["target", "stage1"])
def test_a_folder_with_somebody_elses_model_is_left_alone(home, tmp_path, model):
    folder = tmp_path / "model"
    shutil.copytree(home / model, folder, ignore=shutil.ignore_patterns("checkpoints"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a model that no run here has made"):
        supervised.main(options(home, "supervised", folder, resume=True))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_of_the_other_stage_is_not_resumed(home, whole_runs):
    with pytest.raises(ValueError, match="holds a run of `ppow supervised`"):
        reinforce.main(options(home, "reinforce", whole_runs["supervised"], resume=True))


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_a_finished_run_changes_nothing(home, whole_runs, stage, capsys):
    folder = whole_runs[stage]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    STAGES[stage][0].main(options(home, stage, folder, resume=True))
    assert f"all 6 steps are done, in {folder}" in capsys.readouterr().out
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["provenance.json"]  # it records that the command was given again


def test_an_interrupted_final_save_is_made_good(home, whole_runs, monkeypatch, tmp_path):
    """The last save broke off between two moves: no config.json, so nothing loads, until the run is resumed."""
    finished = whole_runs["supervised"]
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    supervised.main(options(home, "supervised", tmp_path / "run", resume=True))
    one, two = weights_of(finished), weights_of(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert PPOWDrafter.from_pretrained(tmp_path / "run").config.vocab_size


def test_a_run_of_another_version_goes_on_only_as_what_it_was(home, whole_runs, tmp_path):
    """An option that is new has its default; one that is gone may have meant something else."""
    folder = tmp_path / "run"
    shutil.copytree(whole_runs["supervised"], folder)
    path = checkpoints.latest(folder / "checkpoints") / "state.json"
    record = json.loads(path.read_text())
    del record["state"]["config"]["optimizer"]
    path.write_text(json.dumps(record))
    supervised.main(options(home, "supervised", folder, resume=True))
    record["state"]["config"]["loss"] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"options that this one does not know \(loss\).*--drafter .*step-000006"):
        supervised.main(options(home, "supervised", folder, resume=True))


def test_resuming_with_other_options_names_them(home, whole_runs):
    config = options(home, "supervised", whole_runs["supervised"], resume=True, learning_rate=1e-5, ttt_steps=2)
    with pytest.raises(ValueError, match="learning_rate, ttt_steps changed"):
        supervised.main(config)


@pytest.mark.parametrize("change", ["place", "content", "eval_data"])
def test_what_the_data_holds_is_compared_when_resuming_not_where_it_lies(home, whole_runs, tmp_path, change):
    shutil.copytree(whole_runs["supervised"], tmp_path / "run")
    text = (home / "chats.jsonl").read_text()
    moved = tmp_path / "moved.jsonl"
    moved.write_text(text.replace("dog 3", "dog 4") if change == "content" else text)
    changes = {"data": str(moved)} | ({"eval_data": str(moved)} if change == "eval_data" else {})
    config = options(home, "supervised", tmp_path / "run", resume=True, **changes)
    if change == "place":
        supervised.main(config)
        return
    with pytest.raises(ValueError, match=f"what {'data' if change == 'content' else change} holds changed since"):
        supervised.main(config)


def test_bad_rows_and_those_beyond_the_targets_positions_are_skipped_and_named(home, tmp_path, capsys):
    late = {"messages": [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "ok"}]}
    data = tmp_path / "chats.jsonl"
    data.write_text(f"{{\n{json.dumps(late)}\n" + (home / "chats.jsonl").read_text())
    changes = {"data": str(data), "max_length": 4096, "steps": 1}
    with pytest.raises(ValueError, match="chats.jsonl:1: not valid JSON.*--skip-bad-rows"):
        supervised.main(options(home, "supervised", tmp_path / "run", **changes))
    supervised.main(options(home, "supervised", tmp_path / "run", skip_bad_rows=True, **changes))
    told = capsys.readouterr().err
    assert "2 bad rows skipped" in told and re.search(r"chats.jsonl:2: .*the target has only 512 positions", told)


def test_too_little_data(home, tmp_path):
    with pytest.raises(ValueError, match="takes 40 texts, the data has 12"):
        supervised.main(options(home, "supervised", tmp_path, batch_size=20))


def test_answers_too_short_for_a_window(home, tmp_path):
    with pytest.raises(ValueError, match="answer of 100 tokens"):
        reinforce.main(options(home, "reinforce", tmp_path, window_size=100))


def test_a_drafter_for_another_target(home, tmp_path):
    other = LlamaForCausalLM(LlamaConfig(**(PPOW_OTHER | {"vocab_size": 400})))
    other.save_pretrained(tmp_path / "target")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(home / "target").save_pretrained(tmp_path / "target")
    for stage in STAGES:
        given = {"target": str(tmp_path / "target"), "drafter": str(home / "stage1")}
        if stage == "supervised":
            given["draft_vocab_size"] = None
        with pytest.raises(ValueError, match="was made for"):
            STAGES[stage][0].main(options(home, stage, tmp_path / stage, **given))


PPOW_OTHER = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def test_a_gradient_that_is_not_finite_stops_the_run(home, tmp_path, monkeypatch):
    original = supervised.loss

    def poisoned(*args):
        value, metrics = original(*args)
        return value * torch.tensor(float("nan")), metrics

    monkeypatch.setattr(supervised, "loss", poisoned)
    with pytest.raises(ValueError, match="Step 1: the loss is not finite, the run has diverged.*Start anew"):
        supervised.main(options(home, "supervised", tmp_path))
    assert checkpoints.latest(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("size", [16, 48, 128])
def test_held_out_figures_rest_on_the_same_texts_whatever_the_batch(size, monkeypatch):
    seen = []

    def loss(target, drafter, batch, *more):
        seen.extend(batch.input_ids[:, 0].tolist())
        return torch.tensor(1.0), {"acceptance_length": torch.tensor(2.0)}

    monkeypatch.setattr(supervised, "loss", loss)
    trainer = SimpleNamespace(
        config=SimpleNamespace(batch_size=size),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        autocast=contextlib.nullcontext,
        mean_weights=contextlib.nullcontext,
    )
    texts = [Example([number, 1, 2], [0, 1, 1]) for number in range(200)]
    found = supervised.evaluate(None, torch.nn.Linear(1, 1), texts, 0, trainer)
    assert seen == list(range(64)) and found["eval_loss"] == 1 and found["eval_acceptance_length"] == 2


def test_a_shared_head_is_not_trained_and_not_stored(home, tmp_path):
    """Both stages train the rest, as they would beside a copy of the target's rows that is frozen."""
    supervised.main(options(home, "supervised", tmp_path / "stage1", steps=2, share_head=True))
    first = load_file(tmp_path / "stage1" / "model.safetensors")
    assert "lm_head.weight" not in first
    for preset in ("published", "ppow"):  # rollouts, and texts
        out, changes = tmp_path / f"stage2-{preset}", {"drafter": str(tmp_path / "stage1"), "preset": preset}
        reinforce.main(options(home, "reinforce", out, steps=2, **changes))
        second = load_file(out / "model.safetensors")
        assert first.keys() == second.keys()
        assert {name for name in first if not torch.equal(first[name], second[name])} == first.keys() - {"d2t", "t2d"}
    start = PPOWDrafter.from_pretrained(tmp_path / "stage1")
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    owning = PPOWDrafter(PPOWConfig.from_dict(start.config.to_dict() | {"share_target_head": False}))
    head = {"lm_head.weight": target.get_output_embeddings().weight.detach()[start.draft_columns()]}
    owning.load_state_dict(start.state_dict() | head)
    reading, text = FrozenTarget(target, start.config.target_taps), [Example(list(range(9, 29)), [0] * 5 + [1] * 15)]
    losses = [supervised.loss(reading, each, make_batch(text, 0, "cpu", 0), 3, 0.8)[0] for each in (start, owning)]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match="share_head shape a fresh drafter"):
        options(home, "supervised", tmp_path / "other", share_head=True, draft_vocab_size=None, drafter="x")
    with pytest.raises(ValueError, match="share_head: not for a fresh drafter of architecture block"):
        options(home, "supervised", tmp_path / "other", share_head=True, ttt_steps=7, architecture="block")


def test_a_shared_embedding_is_a_copy_less_and_nothing_else(home, tmp_path):
    """The copy is frozen, so from one start both train alike; and they decode alike."""
    supervised.main(options(home, "supervised", tmp_path / "fresh", steps=2, share_embeddings=True))
    start = PPOWDrafter.from_pretrained(tmp_path / "fresh")
    assert start.config.share_target_embeddings and start.get_input_embeddings() is None
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    start.config.share_target_embeddings = False
    owning = PPOWDrafter(start.config)
    embedding = {"embed_tokens.weight": target.get_input_embeddings().weight.detach()}
    owning.load_state_dict(start.state_dict() | embedding)
    owning.save_pretrained(tmp_path / "owning")
    trained = []
    for name in ("fresh", "owning"):
        out = tmp_path / f"{name}-on"
        changes = {"drafter": str(tmp_path / name), "draft_vocab_size": None}
        supervised.main(options(home, "supervised", out, steps=2, **changes))
        trained.append(load_file(out / "model.safetensors"))
    shared, copy = trained
    assert torch.equal(copy.pop("embed_tokens.weight"), embedding["embed_tokens.weight"])
    assert copy.keys() == shared.keys() and all(torch.equal(copy[name], shared[name]) for name in copy)
    ids = torch.tensor([[5, 9, 7]])
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)
    drafter = PPOWDrafter.from_pretrained(tmp_path / "fresh-on")
    assert torch.equal(plain, target.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=drafter))
