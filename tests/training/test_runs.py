"""Runs as they begin and end: one at a time in a folder, stopped by SIGTERM, diverged, out of disk, told about."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from ppow import PPOWDrafter
from ppow.training import checkpoints, cli, files, loop, reinforce, report, supervised
from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.files import append, claim_file, claim_folder, whole, write_json
from ppow.training.metrics import MetricsLog, read_metrics
from two_processes import run_in_two_processes

STAGES = {"supervised": supervised, "reinforce": reinforce}


@pytest.fixture(scope="module")
def home(tmp_path_factory, save_target):
    """A tiny target, chats of which three teach nothing, and a drafter of two supervised steps."""
    folder = tmp_path_factory.mktemp("runs")
    save_target(folder / "target")
    answers = [f"{i} and {i + 1} make {2 * i + 1}. A target verifies what was drafted, dog {i}." for i in range(8)]
    with open(folder / "chats.jsonl", "w") as out:
        for answer in [*answers, "."]:
            messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")
        for _ in range(2):
            messages = [{"role": "user", "content": "long " * 99}, {"role": "assistant", "content": answers[0]}]
            out.write(json.dumps({"messages": messages}) + "\n")
    assert cli.main(stage(folder, "supervised", folder / "stage1", "--steps=2")) == 0
    return folder


def stage(home, name, out, *more):
    """The command line of a stage: 6 steps, a checkpoint every 100."""
    common = [f"--target={home / 'target'}", f"--data={home / 'chats.jsonl'}", f"--output-dir={out}", "--steps=6"]
    common += ["--batch-size=2", "--lr=3e-3", "--log-every=1", "--save-every=100", "--max-length=64", "--drop-long"]
    own = ["--draft-vocab-size=200", "--ttt-steps=3"]
    if name == "reinforce":
        own = [f"--drafter={home / 'stage1'}", "--window-size=3", "--supervised-coef=0"]
    return [name, *common, *own, *more]


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


# -- one run in a folder -----------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_reads_or_writes_anything(home, tmp_path, capsys):
    commands = [stage(home, name, tmp_path / "run") for name in STAGES]
    commands.append(["evaluate", "--target=t", "--drafter=d", f"--output-dir={tmp_path / 'run'}"])
    with claim_folder(tmp_path / "run"):
        for command in commands:
            assert cli.main(command) == 2
            told = capsys.readouterr().err
            assert "Another run is writing to --output" in told and f"process {os.getpid()} of " in told
            assert "choose another place" in told
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()  # nothing was put there


def test_a_second_run_into_one_file_is_refused(tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    with claim_file(output):
        assert cli.main(["regenerate", "--target=t", f"--data={tmp_path}", f"--output={output}"]) == 2
    assert f"Another run is writing to --output {output}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_claim(tmp_path):
    body = "import sys, time; from ppow.training.files import claim_folder\n"
    body += "with claim_folder(sys.argv[1]): print('mine', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", body, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=f"Another run .*process {child.pid} of "), claim_folder(tmp_path / "run"):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert hidden(tmp_path) == [".lock"]  # which nobody holds
    with claim_folder(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_a_claim_is_of_the_file_that_its_name_leads_to(tmp_path, monkeypatch):
    """The former holder takes the lock file away after it was opened here and before it is locked."""
    original, calls = files._lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            os.unlink(file.name)
        return original(file)

    monkeypatch.setattr(files, "_lock", late)
    with claim_folder(tmp_path):
        monkeypatch.undo()
        assert len(calls) == 2
        with pytest.raises(ValueError, match="Another run"), claim_folder(tmp_path):
            pass


def test_files_are_claimed_too_and_what_cannot_be_claimed_is_named(tmp_path):
    with claim_file(tmp_path / "out.jsonl"):
        with pytest.raises(ValueError, match=r"--output \S*out.jsonl \(process"), claim_file(tmp_path / "out.jsonl"):
            pass
        with claim_file(tmp_path / "other.jsonl"):
            pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output-dir \S*file is a file; name a folder"):
        claim_folder(tmp_path / "file").__enter__()
    with pytest.raises(OSError, match=r"--output-dir \S*below cannot be written to: .*Not a directory"):
        claim_folder(tmp_path / "file" / "below").__enter__()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        claim_file(tmp_path).__enter__()


def test_a_run_whose_folder_is_taken_away_stops_and_makes_none(home, tmp_path, monkeypatch, capsys):
    original, calls = supervised.loss, []

    def removing(*args):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "run")
        return original(*args)

    monkeypatch.setattr(supervised, "loss", removing)
    assert cli.main(stage(home, "supervised", tmp_path / "run")) == 2
    assert "metrics.jsonl was removed or replaced" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been(home, tmp_path, monkeypatch, capsys, name):
    assert cli.main(stage(home, name, tmp_path / "whole")) == 0
    module, save = STAGES[name], checkpoints.save
    original, calls = module.loss, []

    def signalling(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    def saving(*args):
        signal.raise_signal(signal.SIGTERM)  # a launcher passes it on again
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "loss", signalling)
        patch.setattr(checkpoints, "save", saving)
        before = signal.getsignal(signal.SIGTERM)
        assert cli.main(stage(home, name, tmp_path / "run")) == 143
        assert signal.getsignal(signal.SIGTERM) is before
    told = capsys.readouterr().err
    assert f"ppow: stopped by SIGTERM after step 3 of 6; it is saved in {tmp_path / 'run'}" in told
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-000003"
    assert not (tmp_path / "run" / "config.json").exists() and hidden(tmp_path) == []
    assert cli.main(stage(home, name, tmp_path / "run", "--resume")) == 0
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_sigterm_before_the_first_step_ends_at_once(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervised, "load_target", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert cli.main(stage(home, "supervised", tmp_path / "run")) == 143
    assert "ppow: stopped by SIGTERM; " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


SIGNALLED = """
import json, os, signal, sys
from pathlib import Path
from accelerate.state import PartialState
from ppow.training import cli, supervised
from ppow.training.files import claim_folder
PartialState.destroy_process_group = lambda self, group=None: self.wait_for_everyone()  # the next command uses it
original, calls = supervised.loss, []
def signalling(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        signal.raise_signal(signal.SIGTERM)
    return original(*args)
supervised.loss = signalling
folder = Path(sys.argv[1])
stopped, resumed = json.loads((folder / "commands.json").read_text())
(folder / f"status-0-{os.environ['RANK']}").write_text(str(cli.main(stopped)))
supervised.loss = original
if os.environ["RANK"] == "0":
    with claim_folder(folder / "run"):
        status = cli.main(resumed)
else:
    try:
        cli.main(resumed)
    except SystemExit as told:  # the first process has said why
        status = told.code
(folder / f"status-1-{os.environ['RANK']}").write_text(str(status))
"""


def test_several_processes_stop_after_the_same_step_and_are_refused_as_one(home, tmp_path):
    command = stage(home, "supervised", tmp_path / "run")
    statuses, told = run_in_two_processes(tmp_path, [command, [*command, "--resume"]], SIGNALLED)
    assert statuses == [["143", "143"], ["2", "2"]], told[-3000:]
    assert told.count("stopped by SIGTERM after step 2 of 6") == 1
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "step-000002"
    assert told.count("Another run is writing to") == 1


# -- divergence --------------------------------------------------------------------------------------------------------


def test_a_diverged_run_keeps_its_last_good_checkpoint(home, tmp_path, monkeypatch, capsys):
    original, calls = supervised.loss, []

    def poisoned(*args):
        calls.append(1)
        value, metrics = original(*args)
        return value * (float("inf") if len(calls) == 5 else 1.0), metrics

    monkeypatch.setattr(supervised, "loss", poisoned)
    assert cli.main(stage(home, "supervised", tmp_path / "run", "--save-every=2")) == 2
    told, good = capsys.readouterr().err, tmp_path / "run" / "checkpoints" / "step-000004"
    assert "Step 5: the loss is not finite" in told and f"--drafter {good}" in told
    assert "--learning-rate below 0.003" in told
    assert checkpoints.latest(good.parent) == good and not (tmp_path / "run" / "config.json").exists()
    weights = PPOWDrafter.from_pretrained(good).state_dict().values()
    assert all(bool(torch.isfinite(weight).all()) for weight in weights)


def test_weights_that_are_not_finite_are_never_saved(home, tmp_path, monkeypatch, capsys):
    def overflowing(self, *_):
        for group in self.param_groups:
            group["params"][-1].data[..., -1] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    assert cli.main(stage(home, "supervised", tmp_path / "run", "--save-every=1")) == 2
    assert "Step 1: some weights are not finite" in capsys.readouterr().err
    assert checkpoints.latest(tmp_path / "run" / "checkpoints") is None


# -- a full disk -------------------------------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {
    "checkpoint": (checkpoints, "save_file", r"Could not write the checkpoint \S*step-000006"),
    "drafter": (loop, "move_in", r"Could not write \S*run: .*No space left on device.* bytes are free there"),
    "record": (files.os, "replace", r"Could not write \S*provenance.json: .*No space"),
    "metrics": (files.os, "fsync", r"No space left on device"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_names_what_was_not_written_and_leaves_no_debris(home, tmp_path, monkeypatch, capsys, what):
    owner, function, message = FULL[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, no_space)
        assert cli.main(stage(home, "supervised", tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert hidden(tmp_path) == [] and not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(ValueError, match=message):
        raise ValueError(told)
    assert cli.main(stage(home, "supervised", tmp_path / "run", "--resume")) == 0  # once there is room


def test_a_line_that_does_not_fit_is_not_there_at_all(tmp_path, monkeypatch):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log(1, {"loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", no_space)
            with pytest.raises(OSError, match=r"Could not write \S*m.jsonl: .*No space left.*bytes are free there"):
                log.log(2, {"loss": 1.0})
        assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.0}]
        log.log(2, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process with a limit of its own")
def test_writes_that_the_system_really_refuses(tmp_path):
    """RLIMIT_FSIZE makes the kernel take a part of the content only."""
    body = """
import resource, signal, sys
from pathlib import Path
from ppow.training.files import append, write_json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
folder = Path(sys.argv[1])
for write in (lambda: write_json(folder / "a.json", "x" * 5000), lambda: append(out, b"y" * 5000)):
    with open(folder / "b.jsonl", "ab", buffering=0) as out:
        try:
            write()
        except OSError as error:
            print(error)
"""
    (tmp_path / "b.jsonl").write_bytes(b"before\n")
    done = subprocess.run([sys.executable, "-c", body, tmp_path], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert "a.json: " in first and "b.jsonl: " in second and done.stdout.count("bytes are free there") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl"]
    assert (tmp_path / "b.jsonl").read_bytes() == b"before\n"


def test_interruptions_leave_no_partial_file_and_devices_are_not_replaced(tmp_path):
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        write_json(tmp_path / "pipe", {})
    with open(tmp_path / "b", "ab", buffering=0) as file:
        append(file, b"one\n")
    assert (tmp_path / "b").read_bytes() == b"one\n"


# -- what a run tells --------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_trains_on_and_what_comes_next(home, tmp_path, capsys):
    held_out = f"--eval-data={home / 'chats.jsonl'}"
    assert cli.main(stage(home, "supervised", tmp_path / "one", held_out, "--eval-every=3", "--dtype=bfloat16")) == 0
    told = capsys.readouterr().out
    assert told.startswith("cpu, ") and "1 process, bfloat16, seed 0" in told
    assert "chats.jsonl: 9 texts kept, 2 dropped (2: the answer starts beyond max_length=64 (--drop-long))\n" in told
    assert f"held out {home / 'chats.jsonl'}: " in told
    assert f"The drafter is in {tmp_path / 'one'}" in told and "steps 1 to 6: loss " in told
    assert "held-out acceptance length " in told
    assert (tmp_path / "one" / "training.png").read_bytes().startswith(b"\x89PNG")
    following = shlex.split(told.splitlines()[-1].removeprefix("Next: "))
    assert following[:2] == ["ppow", "reinforce"]
    config = ReinforceConfig.from_args(following[2:])
    assert (config.drafter, config.data) == (str(tmp_path / "one"), str(home / "chats.jsonl"))
    assert config.max_length == 64 and config.drop_long and config.dtype == "bfloat16"
    assert cli.main(stage(home, "reinforce", tmp_path / "two", "--steps=1")) == 0
    told = capsys.readouterr().out
    beyond = "2: the answer starts beyond max_length=64 (--drop-long)"
    assert f"8 texts kept, 3 dropped ({beyond}; 1: no answer of 3 tokens in a row)\n" in told
    following = shlex.split(told.splitlines()[-1].removeprefix("Next: "))
    assert following[:2] == ["ppow", "evaluate"] and following[-2:] == ["--output-dir", f"{tmp_path / 'two'}-figures"]
    assert following[following.index("--baseline") + 1] == str(home / "stage1")


def test_the_curve_never_fails_a_run(tmp_path, monkeypatch):
    lines, log = [{"step": 1, "loss": None}, {"step": 2, "loss": 1.5, "reward": 0.1}], tmp_path / "metrics.jsonl"
    assert str(tmp_path / "c.png") in report.draw(lines, tmp_path / "c.png", log) and (tmp_path / "c.png").exists()
    assert "was not drawn" in report.draw(lines, tmp_path / "c.png" / "below.png", log)
    assert "No step was logged" in report.draw([], tmp_path / "d.png", log)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in report.draw(lines, tmp_path / "d.png", log)
    assert report.figures(lines) == "steps 1 to 2: loss 1.500 to 1.500, reward 0.100 to 0.100"


def test_options_of_the_texts_are_carried_to_the_next_stage():
    given = ["--target", "org/t", "--data", "my chats", "--output-dir", "runs/a b/", "--limit", "9"]
    told = report.next_command(SupervisedConfig.from_args(given))
    assert told == (
        "ppow reinforce --target org/t --drafter 'runs/a b' --data 'my chats' --limit 9 --output-dir 'runs/a b-ppow'"
    )


# -- names that lead nowhere -------------------------------------------------------------------------------------------


@pytest.fixture
def far_hub(monkeypatch):
    """No offline mode, and a Hub that nobody answers for: its clients try again for half a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./targt", r"--target ./targt is no folder here. Did you mean target\?"),
        ("../nosuch", "--target ../nosuch is no folder here"),
        ("/nosuch/target", "is no folder here. There is no /nosuch either"),
        ("~/target", "Only a shell knows what ~ stands for"),
        ("targt/", "--target targt/ is no folder here"),
        ("runs/old/target", "There is no runs/old either"),
        ("runs/stagee1", r"runs/stagee1 is no folder here, and http://127.0.0.1:9 cannot be reached .*runs/stage1\?"),
        ("meta-lama/Llama-3.1-8B", "is no folder here, and http://127.0.0.1:9 cannot be reached"),
        ("org/a b", "is no folder here, and no Hub id"),
        ("chats.jsonl", "--target chats.jsonl is a file; give the folder of the model"),
        ("runs", "--target runs: this folder holds no config.json, so no model"),
        ("runs/stage1", "Its run has not ended: go on with --resume"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered_at_once(home, tmp_path, monkeypatch, far_hub, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    (tmp_path / "runs" / "stage1" / "checkpoints").mkdir(parents=True)
    shutil.copy(home / "chats.jsonl", tmp_path)
    started = time.monotonic()
    for command in (["supervised", "--data=chats.jsonl", "--output-dir=out"], ["regenerate", "--data=chats.jsonl"]):
        more = ["--output=o.jsonl"] if command[0] == "regenerate" else []
        assert cli.main([*command, "--target", name, *more]) == 2
        told = capsys.readouterr().err
        with pytest.raises(ValueError, match=message):
            raise ValueError(told)
    assert time.monotonic() - started < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "runs", "target"]


def test_every_entrance_answers_a_wrong_path(tmp_path, far_hub, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    pair = ["--target=./nosuch", "--drafter=./nosuch"]
    for command in (
        ["evaluate", *pair, "--prompts=p.jsonl", "--output-dir=o"],
        ["demo", *pair],
        ["space", *pair, "--port=0"],
        ["import", "./nosuch", "--target=./nosuch"],
        ["export", "./nosuch", "--format=vllm"],
        ["push", "./nosuch", "--repo=a/b"],
    ):
        assert cli.main(command) == 2, command
        assert "./nosuch is no folder here" in capsys.readouterr().err, command
    with pytest.raises(ValueError, match="There is no folder ./nosuch"):
        PPOWDrafter.from_pretrained("./nosuch")
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "o").iterdir()) == []
