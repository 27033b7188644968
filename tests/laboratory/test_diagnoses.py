"""The command that plants faults for `ppow doctor`, on the tests' pair; and the table that the page shows of it."""

import json

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import diagnoses
from gguf_target import write_gguf
from small_pair import PAIR


def test_planted_faults_are_named_and_a_miss_is_told(tmp_path, monkeypatch, capsys):
    damages = {name: diagnoses.DAMAGES[name] for name in ("d2t permuted", "512 positions")}
    damages["nothing that anybody knows"] = diagnoses.Damage(lambda drafter: None, "a fault without a name")
    monkeypatch.setattr(diagnoses, "DAMAGES", damages)
    pair = ["--target", str(PAIR / "target"), "--drafter", str(PAIR / "drafter")]
    small = ["--limit", "3", "--max-new-tokens", "16", "--threads", "1", "--output", str(tmp_path / "found.json")]
    rows = diagnoses.main(pair + small)["rows"]
    assert [row["drafter"] for row in rows] == [*damages, *diagnoses.HEALTHY]
    assert list(map(diagnoses.holds, rows)) == [True, True, False, True, True, True]
    assert [row["found"][:1] for row in rows[:3]] == [["draft vocabulary in order"], ["positions"], []]
    assert rows[0]["length"] < rows[1]["length"] and rows[1]["length"] == rows[3]["length"] == rows[5]["length"]
    written = json.loads((tmp_path / "found.json").read_text())
    shown = diagnoses.table(written)
    assert "named first in 2 of 3 damaged drafters, and 3 of 3 healthy ones have none" in shown
    assert "| nothing is wrong (expected: a fault without a name) |" in shown
    assert f"float32; on {written['hardware']['cpu']}, 1 thread, " in shown
    assert str(PAIR) not in json.dumps(written)


@pytest.fixture
def asked(monkeypatch):
    """Nothing is examined: -> the names that would be, and healthy drafters are called so, all others faulty."""
    names = []

    def examine(name, arguments, folder):
        names.append(name)
        planted = diagnoses.DAMAGES[name].fault if name in diagnoses.DAMAGES else None
        return {"drafter": name, "planted": planted, "found": [planted] if planted else [], "seconds": 1.5}

    monkeypatch.setattr(diagnoses, "examine", examine)
    return names


def test_a_few_are_examined_and_a_later_call_goes_on(asked, monkeypatch, tmp_path, capsys):
    pair = ["--target", str(PAIR / "target"), "--drafter", str(PAIR / "drafter"), "--output", str(tmp_path / "x.json")]
    diagnoses.main([*pair, "--only", "512,as it is"])
    assert asked == ["512 positions", "as it is"]
    diagnoses.main([*pair, "--only", "512,d2t"])
    assert asked[2:] == [name for name in diagnoses.DAMAGES if "d2t" in name]  # 512 is there
    asked.clear()
    report = diagnoses.main(pair)
    everything = [*diagnoses.DAMAGES, *diagnoses.HEALTHY]
    assert [row["drafter"] for row in report["rows"]] == everything and len(asked) == len(everything) - 6
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == report["rows"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5 + len(everything)  # what is known is told, too
    asked.clear()
    diagnoses.main([*pair, "--only", "512", "--limit", "3"])
    hardware = diagnoses.provenance.hardware() | {"gpus": ["A GPU"]}
    monkeypatch.setattr(diagnoses.provenance, "hardware", lambda: hardware)
    report = diagnoses.main([*pair, "--only", "512", "--limit", "3"])
    assert asked == ["512 positions"] * 2  # with another setting, and on another machine
    assert "answers of 64 tokens, float32; on A GPU, 2 to 2 s each." in diagnoses.table(report)


def test_a_part_that_is_in_no_name(asked):
    pair = ["--target", str(PAIR / "target"), "--drafter", str(PAIR / "drafter")]
    with pytest.raises(ValueError, match="--only: 'no such' is in no drafter's name; there are: taps one layer too"):
        diagnoses.main([*pair, "--only", "512,no such"])
    assert not asked


def test_a_gguf_target_is_read_once(monkeypatch, save_target, tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "target.gguf", save_target(tmp_path / "target"), tiny_tokenizer)
    targets = []

    def examine(name, arguments, folder):
        targets.append(arguments.target)
        AutoModelForCausalLM.from_pretrained(arguments.target)
        return {"drafter": name, "planted": None, "found": [], "seconds": 1.0}

    monkeypatch.setattr(diagnoses, "examine", examine)
    pair = ["--target", str(tmp_path / "target.gguf"), "--drafter", str(PAIR / "drafter")]
    report = diagnoses.main([*pair, "--only", "as it is,bfloat16", "--output", str(tmp_path / "x.json")])
    assert len(targets) == 4 and set(targets) != {str(tmp_path / "target.gguf")} and len(set(targets)) == 1
    assert report["settings"]["target"] == "target.gguf"


@pytest.mark.parametrize(
    ("planted", "found", "expected"),
    [
        ("bfloat16", ["bfloat16", "positions"], True),
        ("bfloat16", ["positions", "bfloat16"], False),
        ("bfloat16", [], False),
        (None, [], True),
        (None, ["bfloat16"], False),
    ],
)
def test_a_row_holds_where_the_planted_fault_comes_first(planted, found, expected):
    assert diagnoses.holds({"planted": planted, "found": found}) is expected


def test_the_page_shows_the_summary_that_the_command_wrote():
    found = diagnoses.PAGE.read_text(encoding="utf-8").partition(diagnoses.START)[2].partition(diagnoses.END)[0]
    report = json.loads(diagnoses.SUMMARY.read_text()) if diagnoses.SUMMARY.exists() else {"rows": []}
    assert found == (diagnoses.table(report) if report["rows"] else "")  # without one no table stands there
    assert all(map(diagnoses.holds, report["rows"]))
