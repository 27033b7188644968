"""The comparison of one process with several, small on a CPU."""

import json

import pytest

BENCHMARK = "scaling"


def test_rollouts_of_all_processes_count(benchmark, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    small = ["--steps", "3", "--warmup", "1", "--batch-size", "1", "--dtype", "float32", "--max-length", "64"]
    report = benchmark.main(["--shape", "tiny", "--processes", "2", *small, "--output", str(output)])
    (row,) = report["runs"]
    assert row["rollouts_per_step"] == 2 * 64 and row["speedup"] == 1  # of one text in each of two processes
    assert row["rollouts_per_second"] == pytest.approx(128 / row["seconds_per_step"])
    assert json.loads((tmp_path / "raw" / output.name).read_text()) == report and report["settings"]["target"] is None
    assert "2 processes:" in capsys.readouterr().out


def test_a_shape_and_a_pair_exclude_each_other(benchmark):
    for given in (["--shape", "tiny", "--target", "x", "--drafter", "y", "--data", "z"], ["--target", "x"]):
        with pytest.raises(SystemExit):
            benchmark.main(given)
