"""The benchmark of verification runs small on a CPU, and its three ways agree."""

import importlib.util
import json

import pytest

BENCHMARK = "rollouts"
SMALL = ["--shape", "tiny", "--prompt", "24", "--answer", "24", "--windows", "3", "--group-size", "2", "--repeats", "2"]


def test_three_ways_agree_and_are_timed(benchmark, tmp_path, capsys):
    output = tmp_path / "rollouts.json"
    benchmark.main([*SMALL, "--window-size", "4", "--max-forest-nodes", "8", "--output", str(output)])
    report = json.loads((tmp_path / "raw" / output.name).read_text())
    assert set(report["verification"]) == {"forest", "cached", "naive"}
    for row in report["verification"].values():
        assert row["same_argmax_as_forest"] == 1 and len(row["seconds_runs"]) == 2
    assert report["speedup"]["forest"] == 1 and set(report["steps"]) > {"roll_out", "stage 1 step"}
    assert report["hardware"] and report["settings"]["shape"] == "tiny"
    printed = capsys.readouterr().out
    assert "| naive |" in printed
    beside = "stage 1 step, speculators"
    assert (beside in report["steps"]) == (importlib.util.find_spec("speculators") is not None)
    assert beside in report["steps"] or "`speculators` is not installed" in printed
    assert report["steps"]["stage 1 step"]["planned_seconds"] > 0


def test_an_answer_without_room_is_refused(benchmark):
    with pytest.raises(ValueError, match="has no 3 windows of 30"):
        benchmark.main([*SMALL, "--window-size", "30", "--max-forest-nodes", "99"])
