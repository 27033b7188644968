"""The command that plants faults for `ppow doctor`, on the tests' pair; and the table that the page shows of it."""

import json

import pytest

from benchmarks import diagnoses
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
    assert str(PAIR) not in json.dumps(written)


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
