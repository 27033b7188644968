"""The recipe of the bundled pair: what it does around the commands that it runs."""

import json
import lzma
import subprocess
import sys

import pytest

BENCHMARK = "bundle"


@pytest.fixture
def text(tmp_path):
    """A folder with one group of chats."""
    chats = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}."}] for i in range(40)]
    with lzma.open(tmp_path / "math-00.jsonl.xz", "wt") as out:
        out.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)
    return tmp_path


def write(benchmark, text, gpus: int):
    work = text / "work"
    work.mkdir()
    train, held_out = work / "train.jsonl", work / "heldout.jsonl"
    chosen = [("math", 12, 0.0), ("math", 9, 1.0), ("math", 5, 0.5)]
    benchmark.write_texts(text, chosen, work, text / "target", {"batch_size": 4}, train, held_out, gpus)
    return [json.loads(line) for path in (train, held_out) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("gpus", [1, 2])
def test_texts_are_written_once_each_on_as_many_gpus(benchmark, text, gpus, monkeypatch):
    ran = []

    def answer(command, environment, data, output, **options):
        ran.append((environment["CUDA_VISIBLE_DEVICES"], options["temperature"]))
        output.write_bytes(data.read_bytes())

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(benchmark, "ppow", answer)
    assert len(write(benchmark, text, gpus)) == 26
    assert sorted(temperature for _, temperature in ran) == [0.0, 0.5, 1.0]
    assert {gpu for gpu, _ in ran} <= {"3", "5"} and (gpus == 2 or {gpu for gpu, _ in ran} == {"3"})


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_failed_command_ends_the_recipe(benchmark, text, gpus, monkeypatch):
    def fail(*command, **options):
        raise subprocess.CalledProcessError(2, "ppow")

    monkeypatch.setattr(benchmark, "ppow", fail)
    with pytest.raises(subprocess.CalledProcessError):
        write(benchmark, text, gpus)
    assert not (text / "work" / "train.jsonl").exists()


def test_texts_that_gpus_cannot_share_are_refused(benchmark, text, monkeypatch, capsys):
    given = ["--text", str(text), "--prompts", str(text), "--work", str(text / "work"), "--gpus", "3"]
    monkeypatch.setattr(benchmark.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["bundle.py", *given, "--set", "supervised.batch_size=32"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "3 GPUs cannot share supervised's batch_size 32" in capsys.readouterr().err
    ran = []
    monkeypatch.setattr(benchmark, "ppow", lambda command, *more, **options: ran.append(command))
    monkeypatch.setattr(benchmark, "write_texts", lambda *given: ran.append("texts"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--until", "regenerate"])
    benchmark.main()  # texts can be shared by any number
    assert ran == ["pretrain", "texts"]
