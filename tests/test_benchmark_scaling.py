"""The comparison of one process with several, small on a CPU."""

import json

import pytest

BENCHMARK = "scaling"


def test_two_processes_take_twice_the_rollouts(benchmark, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    small = ["--steps", "3", "--warmup", "1", "--batch-size", "1", "--dtype", "float32", "--max-length", "64"]
    report = benchmark.main(["--shape", "tiny", *small, "--output", str(output)])
    one, two = report["runs"]
    assert (one["rollouts_per_step"], two["rollouts_per_step"]) == (64, 128)
    assert one["speedup"] == 1 and two["rollouts_per_second"] == pytest.approx(128 / two["seconds_per_step"])
    assert json.loads(output.read_text())["runs"] == report["runs"] and report["settings"]["target"] is None
    assert "2 processes:" in capsys.readouterr().out


def test_a_shape_and_a_pair_exclude_each_other(benchmark):
    for given in (["--shape", "tiny", "--target", "x", "--drafter", "y", "--data", "z"], ["--target", "x"]):
        with pytest.raises(SystemExit):
            benchmark.main(given)
