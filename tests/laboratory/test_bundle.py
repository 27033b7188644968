"""The recipe of a small pair: what it does around the commands that it runs."""

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


def write(benchmark, text, gpus: int, names=("heldout", "stage2", "train")):
    """-> prompts in what is held out, in stage 2's texts, and in stage 1's."""
    work = text / "work"
    work.mkdir()
    files = tuple(work / f"{name}.jsonl" for name in names)
    chosen = [("math", 40, 0.0), ("math", 39, 1.0), ("math", 5, 0.5)]
    benchmark.write_texts(text, chosen, work, text / "target", {"batch_size": 4}, files, gpus)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[row["messages"][0]["content"] for row in part] for part in rows]


@pytest.mark.parametrize("gpus", [1, 2])
def test_texts_are_written_once_each_on_as_many_gpus(benchmark, text, gpus, monkeypatch):
    ran = []

    def answer(command, environment, data, output, **options):
        ran.append((environment["CUDA_VISIBLE_DEVICES"], options["temperature"]))
        output.write_bytes(data.read_bytes())

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(benchmark, "ppow", answer)
    held_out, stage2, train = write(benchmark, text, gpus)
    assert len(held_out) + len(stage2) + len(train) == 84
    assert len({*held_out, *stage2, *train}) == 40 == len({*held_out}) + len({*stage2}) + len({*train})
    assert len({*train}) > len({*stage2}) > 0
    assert sorted(temperature for _, temperature in ran) == [0.0, 0.5, 1.0]
    assert {gpu for gpu, _ in ran} <= {"3", "5"} and (gpus == 2 or {gpu for gpu, _ in ran} == {"3"})


def test_stages_may_share_their_texts(benchmark, text, monkeypatch):
    monkeypatch.setattr(benchmark, "ppow", lambda *given, data, output, **more: output.write_bytes(data.read_bytes()))
    held_out, stage2, train = write(benchmark, text, 1, ("heldout", "train", "train"))
    assert stage2 == train and len(held_out) + len(train) == 84


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
    monkeypatch.setattr(benchmark, "start", lambda module, *more, **options: ran.append(module))
    monkeypatch.setattr(benchmark, "write_texts", lambda *given: ran.append("texts"))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--until", "regenerate"])
    benchmark.main()  # texts can be shared by any number
    assert ran == ["benchmarks.pretrain", "texts"]
