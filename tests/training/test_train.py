"""The whole road with one command: what it makes, decides, refuses, and that a kill anywhere changes nothing."""

import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import small_pair
from gguf_target import write_gguf
from ppow import PPOWDrafter
from ppow.training import cli, outlook, plan, push, recipes, supervised, train
from ppow.training.config import TrainConfig
from ppow.training.files import write_json
from ppow.training.own_prompts import plain
from ppow.training.recipes import PARTS, Choices, held_out_of, mixed_of, parts_of, rate_for, recipe_of
from ppow.training.train import Road

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "regenerate": {"max_new_tokens": 24},
    "supervised": {"steps": 6, "max_length": 64, "ttt_steps": 3, "draft_vocab_size": 200, "save_every": 2},
    "reinforce": {"steps": 4, "max_length": 64, "window_size": 3, "save_every": 2},
    "evaluate": {"limit": 2, "temperatures": [0.0], "max_new_tokens": 8, "warmup": 1},
}
WITHOUT_COUNTS = {
    name: {k: v for k, v in given.items() if k not in ("steps", "limit", "save_every")}
    for name, given in SECTIONS.items()
}
BYTES = (
    "prompts.jsonl",
    "heldout.jsonl",
    "answers.jsonl",
    "mixed-answers.jsonl",
    "stage1/model.safetensors",
    "stage2/model.safetensors",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_target, tiny_tokenizer):
    """A tiny target, 24 chats of which two ask the same, and the settings of a short run."""
    folder = tmp_path_factory.mktemp("train")
    target = save_target(folder / "target")
    write_gguf(folder / "target.gguf", target, tiny_tokenizer)
    asked = [f"Add {i % 23} and two, quick fox." for i in range(24)]
    rows = [{"prompt": text, "completion": "Three."} for text in asked] + [{"text": "A text asks nothing."}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text(json.dumps(SECTIONS))
    (folder / "open.json").write_text(json.dumps(WITHOUT_COUNTS))
    return folder


def command(home, out, *more, settings="settings.json"):
    given = [f"--target={home / 'target'}", f"--data={home / 'chats.jsonl'}", f"--config={home / settings}"]
    return ["train", *given, f"--output-dir={out}", *more]


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing disturbed."""
    assert cli.main(command(home, home / "whole")) == 0
    return home / "whole"


def contents(folder):
    return {name: (folder / name).read_bytes() for name in BYTES}


def record_of(folder):
    return json.loads((folder / "train.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- what it makes -----------------------------------------------------------------------------------------------------


def test_one_command_leaves_what_the_single_ones_would(home, whole, capsys):
    aside, rest, answers = (rows_of(whole / f"{name}.jsonl") for name in ("heldout", "prompts", "answers"))
    assert (len(aside), len(rest)) == (1, 23)
    words = [{plain(row["messages"][0]["content"]) for row in rows} for rows in (aside, rest)]
    assert words[0].isdisjoint(words[1]) and len(words[0] | words[1]) == 23
    assert [row["messages"][0] for row in answers] == [row["messages"][0] for row in rest]
    assert all(row["messages"][-1]["content"] != "Three." for row in answers)  # the target's own word
    assert len(rows_of(whole / "heldout-answers.jsonl")) == 1
    metrics = json.loads((whole / "figures" / "metrics.json").read_text())
    assert list(metrics["results"]) == list(metrics["baseline"]) == ["heldout T=0"]
    # the repository is the one of ppow push: weights, code, card, figures, record; and it says how to repeat each stage
    drafter = whole / "drafter"
    assert PPOWDrafter.from_pretrained(drafter).config.norm_output
    card = (drafter / "README.md").read_text()
    assert (drafter / "modeling_ppow.py").exists() and "heldout T=0" in card
    record = json.loads((drafter / "provenance.json").read_text())
    assert record["command"] == "reinforce" and record["started_from"]["command"] == "supervised"
    assert not (whole / ".timing").exists() and record_of(whole)["done"] == list(PARTS)


def test_a_finished_run_is_left_as_it_is(home, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    assert cli.main(command(home, whole)) == 2
    assert "already holds a run. Pass --resume to go on with it" in capsys.readouterr().err
    assert cli.main(command(home, whole, "--resume")) == 0
    told = capsys.readouterr().out
    metrics = json.loads((whole / "figures" / "metrics.json").read_text())
    one, two = (metrics[key]["heldout T=0"]["acceptance_length"] for key in ("baseline", "results"))
    assert f"heldout T=0: acceptance length {one:.2f} after stage 1, {two:.2f} after stage 2; speedup " in told
    assert told.endswith(f"Next: ppow push {whole / 'stage2'} --repo ORG/NAME --metrics {whole / 'figures'}\n")
    assert "part " not in told and before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}


def test_the_drafter_is_pushed_at_the_end(home, whole, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(push, "main", pushed.append)
    assert cli.main(command(home, whole, "--resume", "--push-to-hub=org/name")) == 0
    (config,) = pushed
    assert (config.repo, config.drafter, config.metrics) == ("org/name", str(whole / "stage2"), str(whole / "figures"))
    assert "Next: " not in capsys.readouterr().out


def test_the_last_words_name_a_command_that_works(home, whole, capsys):
    push = ["push", str(whole / "stage2"), "--repo=org/name", f"--metrics={whole / 'figures'}", "--dry-run"]
    assert cli.main(push) == 0 and "README.md" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "count"), [([], 12), (["--budget=1s", "--prompts=none"], 8)])
def test_without_data_the_target_writes_prompts_and_some_are_held_out(tmp_path, monkeypatch, capsys, more, count):
    """As many as asked for, or for a budget that is too short two steps' worth."""
    monkeypatch.setattr(recipes, "_PROMPT", 40)
    monkeypatch.setattr(Road, "_supervised", lambda self: signal.raise_signal(signal.SIGTERM))
    batch = {"batch_size": 4, "accumulation": 1}
    settings = {"prompts": 12, "supervised": batch, "reinforce": batch}
    settings["regenerate"] = {"max_new_tokens": 8, "temperature": 1.0, "greedy_share": 0.5}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out = tmp_path / "run"
    given = [f"--target={small_pair.TARGET}", f"--config={tmp_path / 'settings.json'}", f"--output-dir={out}"]
    assert cli.main(["train", *given, *more]) == 143, capsys.readouterr().err
    written, aside, answers = (rows_of(out / f"{name}.jsonl") for name in ("prompts", "heldout", "answers"))
    assert len(written) == count + 1 and aside == written[count:]
    assert [row["messages"][0] for row in answers] == [row["messages"][0] for row in written[:count]]
    assert {row["by"]["temperature"] for row in answers} == {0.0, 1.0}
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".jsonl") == ["train.json"]
    told = capsys.readouterr().out
    assert ("8 prompts, at " in told and "fewer are worth nothing" in told) == (count == 8)


def test_a_prompt_that_is_held_out_is_not_trained_on_in_another_row(home, tmp_path, monkeypatch, capsys):
    """Two prompts, three rows each; one row is held out."""
    rows = [{"prompt": text, "response": str(i)} for text in ("Add one.", "Add two!") for i in range(3)]
    tool = [{"role": "user", "content": "Ask."}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rows.append({"messages": [*tool, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "7."}]})
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Road, "_answers", lambda self: signal.raise_signal(signal.SIGTERM))
    for seed in range(4):
        out = tmp_path / f"run{seed}"
        assert cli.main(command(home, out, f"--data={tmp_path / 'chats.jsonl'}", f"--seed={seed}")) == 143
        aside, rest = (rows_of(out / f"{name}.jsonl") for name in ("heldout", "prompts"))
        asked = [row["messages"][0]["content"] for row in rest]
        assert len(aside) == 1 and asked.count("Ask.") == 1 and len(rest) == 4  # what a tool answers cannot be held out
        assert aside[0]["messages"][0]["content"] not in asked
        assert "2 rows left out: they repeat a held-out prompt" in capsys.readouterr().err


def test_rows_may_hold_what_json_does_not(home, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    when = [datetime.datetime(2026, 1, 1)] * 3
    table = pyarrow.table({"prompt": ["Add one.", "Add two.", "Add three."], "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    monkeypatch.setattr(Road, "_answers", lambda self: signal.raise_signal(signal.SIGTERM))
    assert cli.main(command(home, tmp_path / "run", f"--data={tmp_path / 'chats.parquet'}")) == 143
    assert len(rows_of(tmp_path / "run" / "prompts.jsonl")) == 2


CALL = {"type": "function", "function": {"name": "ask", "arguments": {}}}


def test_a_gguf_file_goes_the_same_road(home, whole, tmp_path):
    argv = command(home, tmp_path / "run", f"--target={home / 'target.gguf'}")
    assert cli.main(argv) == 0
    assert contents(tmp_path / "run")["heldout.jsonl"] == contents(whole)["heldout.jsonl"]
    one, two = (PPOWDrafter.from_pretrained(run / "stage2").state_dict() for run in (whole, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


# -- killed, stopped, gone on with -------------------------------------------------------------------------------------

# A process that imports everything and computes nothing, so that its children may: each is a start of the command. One
# that is to be killed counts what it does to files below its run, and sends itself SIGKILL at the given one.
KILLED = """
import json, os, signal, sys
from ppow.training import cli, train
argv, runs, folder = json.loads(sys.argv[1])
for place, resume in runs:
    child = os.fork()
    if child == 0:
        seen = [0]
        def watch(event, args):
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir") and args:
                if isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(folder):
                    seen[0] += 1
                    if seen[0] == place:
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        sys.stdout = open(os.devnull, "w")
        status = cli.main([*argv, *(["--resume"] if resume else [])])
        print("events", seen[0], file=sys.__stdout__, flush=True)
        os._exit(status)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kills_anywhere_change_no_byte_of_the_drafter(home, whole, tmp_path):
    """Three at places drawn with a seed, of the file operations of a whole run."""
    places = sorted(random.Random(7).sample(range(5, EVENTS), 3))
    runs = [
        (place, index > 0) for index, place in enumerate((places[0], *(b - a for a, b in zip(places, places[1:])), 0))
    ]
    argv = json.dumps([command(home, tmp_path / "run"), runs, str(tmp_path / "run")])
    done = subprocess.run([sys.executable, "-c", KILLED, argv], capture_output=True, text=True, timeout=200)
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [-signal.SIGKILL] * 3 + [0], done.stderr[-3000:]
    assert contents(tmp_path / "run") == contents(whole)
    weights = [(run / "drafter" / "model.safetensors").read_bytes() for run in (tmp_path / "run", whole)]
    assert weights[0] == weights[1]


EVENTS = 900  # file operations of a whole run, or a few less


def test_sigterm_saves_and_says_how_to_go_on(home, whole, tmp_path, monkeypatch, capsys):
    original, calls, at = supervised.loss, [], 3

    def signalling(*args):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(supervised, "loss", signalling)
    monkeypatch.setattr(supervised, "evaluate", lambda *_: {})
    assert cli.main(command(home, tmp_path / "run")) == 143
    told = capsys.readouterr().err
    assert "stopped by SIGTERM after step 3 of 6" in told and "`ppow train` goes on with --resume." in told
    assert "running" not in record_of(tmp_path / "run") and record_of(tmp_path / "run")["seconds"]["supervised"] > 0
    calls.clear()
    assert cli.main(command(home, tmp_path / "run", "--resume")) == 143  # in the last step, which ends stage 1
    assert "stopped by SIGTERM after part 5 of 8, which is done. `ppow train` goes on with" in capsys.readouterr().err
    assert not (tmp_path / "run" / "stage2").exists()
    monkeypatch.undo()
    assert cli.main(command(home, tmp_path / "run", "--resume")) == 0
    assert contents(tmp_path / "run") == contents(whole)


def test_the_time_of_a_killed_start_counts(home, whole, tmp_path):
    """Until the last file that it wrote."""
    record = record_of(whole)
    out = tmp_path / "run"
    out.mkdir()
    (out / "train.json").write_text(json.dumps(record | {"running": {"part": "answers", "since": 1000.0}}))
    (out / "answers.jsonl").touch()
    for path in out.iterdir():
        os.utime(path, (1060.0, 1060.0))
    config = TrainConfig.from_args([*command(home, out)[1:], "--resume"])
    found = Road(config, LlamaConfig.from_pretrained(home / "target")).record
    assert found["seconds"]["answers"] == pytest.approx(record["seconds"]["answers"] + 60.0)
    assert "running" not in found


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--seed=1", "seed was 0, is 1"),
        ("--prompts=5", "prompts was None, is 5"),
        ("--budget=1h", "budget was None, is '1h'"),
        ("--target=tests/pair/target", "is 'tests/pair/target'"),
        ('--supervised={"steps": 7}', "supervised.steps was 6, is 7"),
    ],
)
def test_another_run_is_not_mixed_in(home, whole, monkeypatch, capsys, more, told):
    monkeypatch.chdir(ROOT)
    before = (whole / "train.json").read_bytes()
    assert cli.main(command(home, whole, "--resume", more)) == 2
    error = capsys.readouterr().err
    assert "holds a run with other options" in error and told in error
    assert (whole / "train.json").read_bytes() == before


def test_other_weights_under_the_same_name_are_refused(home, whole, tmp_path, tiny_config, capsys):
    record = record_of(whole) | {"target": "0" * 64}
    (tmp_path / "train.json").write_text(json.dumps(record))
    assert cli.main(command(home, tmp_path, "--resume")) == 2
    assert "holds other weights" in capsys.readouterr().err


def test_what_cannot_be_right_is_refused_before_anything_is_written(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    (tmp_path / "texts.jsonl").write_text('{"text": "Nothing is asked."}\n')
    (tmp_path / "one.jsonl").write_text('{"prompt": "Add one."}\n')
    for more, told in [
        (f"--data={tmp_path / 'none.jsonl'}", "does not exist"),
        (f"--data={tmp_path / 'texts.jsonl'}", "has 0 rows with a user turn to answer"),
        (f"--data={tmp_path / 'one.jsonl'}", "1 can be held out to measure on and 0 are left"),
        ('--supervised={"batch_size": 40}', "One step of `ppow supervised` takes 40 texts (batch_size given)"),
        (f"--target={tmp_path / 'nowhere'}", "is no folder here"),
        ("--push-to-hub=name", "expected ORG/NAME"),
    ]:
        assert cli.main(command(home, out, more)) == 2
        assert told in capsys.readouterr().err, told
        assert not any(path.suffix == ".jsonl" for path in out.glob("*"))  # so the next one is refused by no earlier
    out.mkdir(exist_ok=True)
    (out / "train.json").unlink(missing_ok=True)
    (out / "notes.txt").touch()
    assert cli.main(command(home, out)) == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    (out / "train.json").write_text('{"steps": 3}')
    assert cli.main(command(home, out, "--resume")) == 2
    assert "was not written by `ppow train`" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command(home, out)) == 2
    assert "runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--budget=2 hours"], "budget must be a time such as 2h, 30m, 90s or 1h30m, got '2 hours'"),
        (["--budget=0s"], "budget must be a time"),
        (['--supervised={"stepz": 3}'], "supervised: supervised has no key 'stepz'; the nearest is 'steps'"),
        (['--reinforce={"window_size": 0}'], "reinforce: window_size must be an integer >= 1, got 0"),
        (['--evaluate={"prompts": ["gsm8k"]}'], "evaluate: `ppow train` sets prompts itself"),
        (['--regenerate={"seed": 1}'], "regenerate: `ppow train` sets seed itself"),
        (['--regenerate={"greedy_share": 0.5}'], "regenerate: greedy_share=0.5 leaves chats to be sampled"),
        (['--regenerate={"endpoint": "http://x/v1"}'], "regenerate: With --endpoint, name the model"),
        (["--supervised=3"], "supervised must be an object of JSON, got 3"),
        (["--supervised={"], "--supervised must be an object of JSON, got '{'"),
    ],
)
def test_settings_are_checked_when_the_command_starts(more, told):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_args(["--target=t", "--output-dir=o", *more])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("budget", "seconds"), [("2h", 7200), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1H2M3S", 3723), (None, None)]
)
def test_budgets_are_times(budget, seconds):
    assert TrainConfig(target="t", output_dir="o", budget=budget).seconds() == seconds


# -- what is decided ---------------------------------------------------------------------------------------------------


def test_a_budget_decides_counts_by_timing_a_few(home, tmp_path, monkeypatch, capsys):
    out, fewest = tmp_path / "run", {"supervised": 11, "reinforce": 6, "evaluate": 4}
    monkeypatch.setattr(train, "FEWEST", fewest)
    assert cli.main(command(home, out, "--budget=1s", settings="open.json")) == 0
    told = capsys.readouterr().out
    decided = record_of(out)["decided"]
    assert decided["regenerate"]["limit"] <= 23 and decided["evaluate"]["limit"] == 4
    assert (decided["supervised"]["steps"], decided["reinforce"]["steps"]) == (11, 6)
    assert "11 steps, at" in told and "though 0 s are left for them: fewer are worth nothing" in told
    assert not [path for path in out.iterdir() if path.name[0] == "."]
    lines = rows_of(out / "stage1" / "metrics.jsonl")
    assert lines[-1]["step"] == 11
    before = contents(out)
    assert cli.main(command(home, out, "--budget=1s", "--resume", settings="open.json")) == 0
    assert contents(out) == before


def test_time_that_was_not_spent_goes_to_what_comes_later(home, whole, monkeypatch):
    """By hand: 100 s, of which 30 were spent on what had 29; the rest is shared as 5 : 44 : 14 : 8."""
    road = object.__new__(Road)
    road.config, road.parts = TrainConfig(target="t", output_dir="o", budget="100s"), PARTS
    road.record = {"seconds": {"prompts": 5.0, "answers": 25.0}}
    assert road.left("mixed") == pytest.approx(70 * 5 / 71) and road.left("supervised") == pytest.approx(70 * 44 / 66)
    assert road.left("prompts", "answers", "heldout") == pytest.approx(70 * 29 / 100)
    road.record["seconds"]["supervised"] = 60.0  # ran over: those behind it share 10 s
    assert road.left("reinforce") == pytest.approx(10 * 14 / 22) and road.left("evaluate") == pytest.approx(10)
    road.record["seconds"]["supervised"] = 90.0
    assert road.left("reinforce") == 0
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1)


def test_stage_2_learns_from_answers_that_are_half_sampled_unless_the_options_say_how_they_are_chosen(home, whole):
    """As many as its steps take, or all; who gives a temperature has stage 2 learn from the answers of stage 1."""
    greedy, mixed = (rows_of(whole / f"{name}.jsonl") for name in ("answers", "mixed-answers"))
    assert [row["messages"][0] for row in mixed] == [row["messages"][0] for row in greedy]
    same = sum(one["messages"] == other["messages"] for one, other in zip(greedy, mixed))
    assert 0.2 * len(greedy) < same < 0.8 * len(greedy)
    data = [json.loads((whole / f"stage{i}" / "provenance.json").read_text())["config"]["data"] for i in (1, 2)]
    assert [Path(each).name for each in data] == [
        "answers.jsonl",
        "mixed-answers.jsonl",
    ]
    for given, mixes in (({}, True), ({"temperature": 0.0}, False), ({"temperature": 0.7}, False)):
        config = TrainConfig(target="t", output_dir="o", regenerate=given)
        assert ("mixed" in parts_of(choices(config=config, **LLAMA_8B).all())) == mixes
    stage = {"steps": 500, "batch_size": 8, "accumulation": 2}
    assert mixed_of(60_000, stage) == 8_000 and mixed_of(5_000, stage) == 5_000
    assert mixed_of(60_000, {**stage, "steps": 1}) == 32  # some may be too short to learn from


def test_greedy_answers_are_not_written_twice(home, whole, tmp_path):
    """They are copied: here changed ones, which the target would not write."""
    shutil.copytree(whole, tmp_path / "run")
    answers, mixed = tmp_path / "run" / "answers.jsonl", tmp_path / "run" / "mixed-answers.jsonl"
    before = rows_of(mixed)
    mixed.unlink()
    rows = rows_of(answers)
    for row in rows:
        row["messages"][-1]["content"] += " (copied)"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = record_of(tmp_path / "run")
    record["done"].remove("mixed")
    write_json(tmp_path / "run" / "train.json", record)
    assert cli.main(command(home, tmp_path / "run", "--resume")) == 0
    for now, then in zip(rows_of(mixed), before, strict=True):
        assert (now == then) == (now["by"]["temperature"] == 1)
        assert now["messages"][-1]["content"].endswith("(copied)") == (now["by"]["temperature"] == 0)


def test_a_run_of_an_earlier_version_goes_on_without_that_part(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    record = record_of(tmp_path / "run")
    del record["decided"]["mixed"]
    record["done"].remove("mixed")
    (tmp_path / "run" / "mixed-answers.jsonl").unlink()
    write_json(tmp_path / "run" / "train.json", record)
    assert cli.main(command(home, tmp_path / "run", "--resume")) == 0
    assert (
        not (tmp_path / "run" / "mixed-answers.jsonl").exists() and "mixed" not in record_of(tmp_path / "run")["done"]
    )


def test_without_that_part_a_run_is_what_it_says(home, tmp_path):
    given = json.loads((home / "settings.json").read_text())
    given["regenerate"] = {**given["regenerate"], "temperature": 0.0}
    (tmp_path / "settings.json").write_text(json.dumps(given))
    assert cli.main(command(home, tmp_path / "run", settings=tmp_path / "settings.json")) == 0
    assert not (tmp_path / "run" / "mixed-answers.jsonl").exists()
    assert record_of(tmp_path / "run")["done"] == [name for name in PARTS if name != "mixed"]


def test_the_rule_of_the_learning_rate_by_hand():
    assert [rate_for(width) for width in (128, 256, 576, 4096)] == [6e-3, 6e-3, 3e-3, 1e-4]
    # half-way in logarithms between the two points lies the mean of the rates there
    assert rate_for(round(math.sqrt(576 * 4096))) == pytest.approx(math.sqrt(3e-3 * 1e-4), rel=0.02)
    assert [recipe_of(count).draft_vocabulary for count in (1e8, 1.9e9, 8e9, 7e10)] == [16384, 16384, 32000, 32000]
    assert [held_out_of(rows) for rows in (2, 19, 40, 4000, 10**6)] == [1, 1, 2, 200, 200]


def choices(device="h100", config=None, **shape):
    target = LlamaConfig(**{"num_key_value_heads": 8, "max_position_embeddings": 8192, "vocab_size": 128256, **shape})
    config = config or TrainConfig(target="t", output_dir="o")
    return Choices(config, target, plan.DEVICES[device], True)


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def test_the_table_fills_the_memory_of_a_device_and_options_come_first():
    found = choices(**LLAMA_8B).all()
    stage = found["supervised"]
    assert (stage["learning_rate"], stage["draft_vocab_size"], stage["dtype"]) == (1e-4, 32000, "bfloat16")
    assert stage["batch_size"] * stage["accumulation"] == 16 and found["reinforce"]["learning_rate"] == 5e-5
    larger = choices("h200", **LLAMA_8B).all()["supervised"]
    assert larger["batch_size"] > stage["batch_size"] and larger["batch_size"] * larger["accumulation"] == 16
    for name in ("supervised", "reinforce"):
        made = choices(**LLAMA_8B)
        total = made.step(name, {"steps": 100, **found[name]}, stage)["memory_gib"]["total"] * plan.GIB
        assert total <= made.most()
    given = TrainConfig(
        target="t",
        output_dir="o",
        supervised={"learning_rate": 3e-4, "batch_size": 4},
        reinforce={"preset": "published"},
    )
    found = choices(config=given, **LLAMA_8B).all()
    assert found["supervised"]["learning_rate"] == 3e-4 and found["supervised"]["accumulation"] == 4
    assert "learning_rate" not in found["reinforce"]  # the preset has its own


def test_a_target_that_leaves_no_room_is_told_of(home, tmp_path, monkeypatch, capsys):
    small = plan.Device("a toy", 2e6, 1e9, {"float32": 1e9, "bfloat16": 1e9})
    monkeypatch.setattr(plan, "this_device", lambda: small)
    assert cli.main(command(home, tmp_path / "run")) == 2
    assert "A step of `ppow supervised` with one text of 64 tokens takes up to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_plan_loads_nothing_and_says_what_fits(home, tmp_path, capsys):
    given = dict(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    LlamaConfig(**given, num_key_value_heads=8).save_pretrained(tmp_path / "large")
    LlamaConfig(**LLAMA_8B, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path / "8b")
    for name, fits in (("large", False), ("8b", True)):
        argv = [
            "train",
            f"--target={tmp_path / name}",
            f"--output-dir={tmp_path / 'run'}",
            "--plan=h100",
            "--budget=8h",
        ]
        assert cli.main(argv) == 0
        told = capsys.readouterr().out
        assert ("DOES NOT FIT" not in told) == fits == ("This does not fit." not in told)
        titles = [part.title for part in PARTS.values() if part.share]
        lines = [next(line for line in told.splitlines() if line.startswith(title)) for title in (*titles, "together")]
        assert all(" GiB" in line for line in lines) and not (tmp_path / "run").exists()
    shared = '--supervised={"share_head": true, "intermediate_size": 96}'
    for more in ([], [shared]):
        assert cli.main(command(home, tmp_path / "run", "--plan=here", *more)) == 0
    assert not (tmp_path / "run").exists()


def test_the_page_says_what_the_code_does():
    page = (ROOT / "docs" / "train.md").read_text()
    for row in recipes.RECIPES:
        size = f"{row.below:g}B" if row.below < math.inf else "above"
        counts = f"{row.prompts:,} | {row.answer}, {row.length:,} | {row.texts} | {row.draft_vocabulary:,} | "
        line = next(line for line in page.splitlines() if line.startswith(f"| {size}"))
        assert line.endswith(f"| {counts}{row.steps:,}, {row.reinforce_steps} |")
    assert " | ".join(f"{100 * part.share:.0f}%" for part in PARTS.values() if part.share) in page
    made = choices(**LLAMA_8B, head_dim=128)
    decided = made.all()
    for row in outlook.planned(made, decided, decided["prompts"]["count"], decided["evaluate"]["limit"]):
        if row.part != "heldout":
            times = outlook.duration(row.seconds[0]), outlook.between(*row.seconds[1:])
            assert f" | {row.memory:.1f} GiB | {times[0]} | {times[1]} |" in page


def test_what_a_token_takes_is_what_was_measured():
    found = []
    for name in ("decoding-llama-3.1-8b.json", "decoding-llama-3.1-8b-h100.json"):
        report = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        stock = next(s for s in report["systems"] if s["name"] == "stock generate" and s["batch"] == 1)
        found.append(1 / stock["tokens_per_second"] / 32)
    assert plan.EAGER == round(sum(found) / len(found), 5)


def test_openings_and_chats_are_not_given_together(home, tmp_path):
    with pytest.raises(
        ValueError, match="openings='o.jsonl' begins prompts that the target writes, and data='d.jsonl'"
    ):
        TrainConfig(target="T", output_dir=str(tmp_path), data="d.jsonl", openings="o.jsonl")
    given = ["train", f"--target={home / 'target'}", f"--output-dir={tmp_path / 'run'}"]
    assert cli.main([*given, f"--openings={tmp_path / 'none.jsonl'}"]) == 2 and not (tmp_path / "run").exists()
