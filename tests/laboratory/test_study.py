"""The whole comparison as one command: its order, what it hands on, what it keeps."""

import json
import shutil

import pytest

from small_pair import STAGE1, TARGET

BENCHMARK = "study"


@pytest.fixture
def made(benchmark, monkeypatch):
    """What bundle.py would make, made of the tests' pair; -> its calls."""
    calls = []

    def bundle(folder, options, until, gpus):
        calls.append((folder.name, until, list(gpus), [option for option in options if "supervised" in option]))
        if until == "regenerate":
            shutil.copytree(TARGET, folder / "target", dirs_exist_ok=True)
            question = {"role": "user", "content": "What is 12 plus 30?"}
            answer = {"role": "assistant", "content": "Let us see.\u2028It is more than nobody would think, my friend."}
            for name, rows in (("train", 4), ("stage2", 4), ("heldout", 2)):
                row = json.dumps({"messages": [question, answer]}, ensure_ascii=False) + "\n"
                (folder / f"{name}.jsonl").write_text(row * rows, encoding="utf-8")
        else:
            assert (folder / "target" / "config.json").exists() and (folder / "train.jsonl").exists()
            shutil.copytree(STAGE1, folder / "supervised", dirs_exist_ok=True)
            rows = [{"step": n, "acceptance_length": float(n), "agreement": [n / 10, 0.0]} for n in (1, 2, 3)]
            rows[1] |= {"eval_acceptance_length": 4.0, "eval_agreement": [0.5, 0.0]}
            (folder / "supervised" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(benchmark, "bundle", bundle)
    comparisons = [
        ("near", "stage2", 45, "cst 3e-4", 1),
        ("thin", "stage2", 45, "stage1", 1),
        ("near", "train", 45, "stage1", 1),
        ("near", "stage2", 45, "stage1", 1),
    ]
    monkeypatch.setattr(benchmark, "COMPARISONS", comparisons)
    return calls


def options(tmp_path, *more) -> list[str]:
    prompts = tmp_path / "prompts"
    prompts.mkdir(exist_ok=True)
    (prompts / "mt_bench.jsonl").write_text(json.dumps({"turns": ["Hello?"]}) + "\n")
    given = ["--text", str(tmp_path), "--prompts", str(prompts), "--work", str(tmp_path / "work"), "--domains=mt_bench"]
    small = ["--steps=1", "--batch-size=2", "--max-new-tokens=12", "--tree-prompts=0", "--bootstrap=50"]
    return [*given, *small, "--dtype=float32", *more]


def test_every_drafter_is_trained_and_compared_once(benchmark, made, tmp_path, monkeypatch, capsys):
    report = benchmark.main(options(tmp_path, "--set=supervised.steps=7"))
    assert made[0] == ("near", "regenerate", [0], ["--set=supervised.steps=7"])
    shapes = {name: found for name, until, _, found in made if until == "supervised"}
    assert list(shapes) == ["near", "thin", "blind"] and shapes["near"] == ["--set=supervised.steps=7"]
    assert "--set=supervised.taps=0" in shapes["blind"]
    assert list(report) == ["near, stage2, 45 s", "thin, stage2, 45 s", "near, train, 45 s"]
    assert set(report["near, stage2, 45 s"]["T=0"]) == {"cst 3e-4", "stage1"}
    assert list(report["thin, stage2, 45 s"]["T=1"]) == ["stage1"]
    assert json.loads((tmp_path / "work" / "study.json").read_text()) == report
    pair = json.loads((tmp_path / "work" / "pair.json").read_text())
    assert pair["texts"] == {"train": 4, "stage2": 4, "heldout": 2} and pair["target"]["heldout_loss"] > 0
    (span,) = pair["stage 1"]["thin"]  # of steps 1 and 2; nothing was measured after the third
    assert span["to_step"] == 2 and span["acceptance_length"] == 1.5 and span["eval_first_draft_agreement"] == 0.5
    assert span["first_draft_agreement"] == pytest.approx(0.15) and pair["settings"]["set"] == "['supervised.steps=7']"
    names = ("near-stage2", "thin-stage2", "near-train")
    raw = tmp_path / "work" / "raw"
    near, thin, known = (json.loads((raw / f"objectives-{n}-45s.json").read_text()) for n in names)
    assert near["texts_crc32"] == thin["texts_crc32"]  # the target's answers are written once
    assert thin["settings"]["data"].endswith("stage2.jsonl") and known["settings"]["data"].endswith("train.jsonl")
    assert "| thin, stage2, 45 s | stage1 |" in capsys.readouterr().out
    monkeypatch.setattr(benchmark.objectives, "load", None)  # no arm is done again
    assert benchmark.main(options(tmp_path, "--set=supervised.steps=7")) == report


def test_some_drafters_alone(benchmark, made, tmp_path, capsys):
    report = benchmark.main(options(tmp_path, "--drafters=near"))
    assert [name for name, until, _, _ in made if until == "supervised"] == ["near"]
    assert list(report) == ["near, stage2, 45 s", "near, train, 45 s"]
    pair = json.loads((tmp_path / "work" / "pair.json").read_text())
    assert list(pair["stage 1"]) == ["near"] and pair["settings"]["drafters"] == "['near']"
    for unfit in ("thin", "near,thick"):  # what is shared lies with near
        with pytest.raises(SystemExit):
            benchmark.main(options(tmp_path, f"--drafters={unfit}"))
        assert f"--drafters {unfit}: expected near" in capsys.readouterr().err


def test_a_drafter_takes_one_gpu_and_the_first_what_is_left(benchmark):
    assert [benchmark.shares(gpus, 3) for gpus in (1, 2, 3)] == [[[0]], [[0], [1]], [[0], [1], [2]]]
    assert benchmark.shares(4, 3) == [[0, 1], [2], [3]] and benchmark.shares(4, 1) == [[0, 1, 2, 3]]
    assert benchmark.shares(8, 3) == [[0, 1, 2, 3], [4], [5]]


def test_unfit_options_are_refused_before_anything_runs(benchmark, made, tmp_path, capsys):
    for unfit, said in (("--arms=lk", "the study says this itself"), ("--no-such-option", "unrecognized arguments")):
        with pytest.raises(SystemExit):
            benchmark.main(options(tmp_path, unfit))
        assert said in capsys.readouterr().err
    assert not made


def test_answers_to_other_prompts_are_refused(benchmark, made, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "texts.json").write_text(json.dumps({"made_for": {"prompts": "gsm8k"}, "texts": {}}))
    with pytest.raises(ValueError, match="was written for .*gsm8k"):
        benchmark.main(options(tmp_path))


def test_one_comparison_that_fails_does_not_cost_the_others(benchmark, made, tmp_path, monkeypatch):
    compare = benchmark.compare

    def unlucky(work, name, texts, given):
        if name == "near":
            raise RuntimeError("a process failed")
        compare(work, name, texts, given)

    monkeypatch.setattr(benchmark, "compare", unlucky)
    with pytest.raises(RuntimeError, match="objectives-near-stage2-45s.json: a process failed"):
        benchmark.main(options(tmp_path))
    report = json.loads((tmp_path / "work" / "study.json").read_text())
    assert report["near, stage2, 45 s"] == {} and list(report["thin, stage2, 45 s"]["T=0"]) == ["stage1"]
