"""The benchmark commands run small on a CPU."""

import json

import pytest

from decoding_helpers import block_drafter
from ppow.training.loading import load_model
from small_pair import DRAFTER, TARGET

BENCHMARK = "decoding"


def test_decoding_with_forced_acceptance(benchmark, tmp_path, capsys):
    output = tmp_path / "decoding.json"
    arguments = ["--shape", "tiny", "--prompt", "16", "--new", "48", "--acceptance-length", "5", "--repeats", "2"]
    benchmark.main([*arguments, "--only", "stock", "PPOW", "--device", "cpu", "--output", str(output)])
    report = json.loads((tmp_path / "raw" / "decoding.json").read_text())
    stock, *ours = report["systems"]
    assert (stock["name"], [row["name"] for row in ours]) == (
        "stock generate",
        ["PPOW plain, chain", "PPOW plain, tree"],
    )
    assert report["forced_acceptance"] and report["hardware"] and report["versions"]["torch"]
    for row in ours:
        assert 3 < row["acceptance_length"] < 7  # forced: random weights would accept nothing
        assert set(row["cycle_ms"]) == {"draft", "verify", "accept", "commit", "keep", "extend"}
        assert all(milliseconds > 0 for milliseconds in row["cycle_ms"].values())
    summary = json.loads(output.read_text())
    assert [row["name"] for row in summary["systems"]] == [row["name"] for row in report["systems"]]
    speeds = report["systems"][1]["tokens_per_second_runs"]
    assert summary["systems"][1]["tokens_per_second_range"] == pytest.approx([min(speeds), max(speeds)], rel=1e-4)
    assert "(forced)" in capsys.readouterr().out


def test_decoding_of_a_real_pair_forces_nothing(benchmark):
    pair = ["--target", str(TARGET), "--drafter", str(DRAFTER)]
    report = benchmark.main([*pair, "--prompt", "16", "--new", "16", "--repeats", "1", "--only", "stock", "chain"])
    assert not report["forced_acceptance"]
    assert report["systems"][1]["forced_acceptance_length"] is None


def test_several_drafters_in_one_run(benchmark, tmp_path):
    drafters = DRAFTER, tmp_path / "block"
    block_drafter(load_model(str(TARGET))).save_pretrained(drafters[1])
    options = ["--new", "16", "--repeats", "1", "--only", "chain", "--window-size", "5"]
    report = benchmark.main(["--target", str(TARGET), "--drafter", *map(str, drafters), *options])
    assert [row["drafter"] for row in report["systems"]] == [str(folder) for folder in drafters]
    assert set(report["systems"][1]["cycle_ms"]) >= {"draft", "extend", "verify"}


def test_a_shape_with_a_block_drafter(benchmark):
    fields = json.dumps({"architecture": "block", "block_size": 8, "predict_from_anchor": False})
    options = ["--prompt", "16", "--new", "32", "--repeats", "1", "--acceptance-length", "5", "--device", "cpu"]
    report = benchmark.main(
        ["--shape", "tiny", "--drafter-config", fields, "--window-size", "7", "--only", "chain", *options]
    )
    assert 3 < report["systems"][0]["acceptance_length"] <= 8


@pytest.mark.parametrize(("length", "depth", "rate"), [(1.0, 10, 0.0), (11.0, 10, 1.0), (1.75, 2, 0.5)])
def test_a_constant_rate_gives_the_acceptance_length(benchmark, length, depth, rate):
    assert benchmark.constant_rate(length, depth) == pytest.approx(rate, abs=1e-6)


def test_an_impossible_acceptance_length_is_refused(benchmark):
    with pytest.raises(ValueError, match="acceptance length 12 cannot come from windows of 10"):
        benchmark.constant_rate(12, 10)


def test_a_pair_or_a_shape_is_asked_for(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "give --shape, or --target and --drafter" in capsys.readouterr().err
