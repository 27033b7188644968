"""The benchmark commands run small on a CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decoding():
    return load("decoding")


def test_decoding_with_forced_acceptance(decoding, tmp_path, capsys):
    output = tmp_path / "decoding.json"
    arguments = ["--shape", "tiny", "--prompt", "16", "--new", "48", "--acceptance-length", "5", "--repeats", "2"]
    decoding.main([*arguments, "--only", "PPOW", "--device", "cpu", "--output", str(output)])
    report = json.loads(output.read_text())
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
    assert output.with_suffix(".png").stat().st_size > 5000
    assert "(forced)" in capsys.readouterr().out


def test_decoding_of_a_real_pair_forces_nothing(decoding):
    bundled = BENCHMARKS.parent / "bundled"
    pair = ["--target", str(bundled / "target"), "--drafter", str(bundled / "drafter")]
    report = decoding.main([*pair, "--prompt", "16", "--new", "16", "--repeats", "1", "--only", "plain, chain"])
    assert not report["forced_acceptance"]
    assert report["systems"][1]["forced_acceptance_length"] is None


@pytest.mark.parametrize(("length", "depth", "rate"), [(1.0, 10, 0.0), (11.0, 10, 1.0), (1.75, 2, 0.5)])
def test_a_constant_rate_gives_the_acceptance_length(decoding, length, depth, rate):
    assert decoding.constant_rate(length, depth) == pytest.approx(rate, abs=1e-6)


def test_an_impossible_acceptance_length_is_refused(decoding):
    with pytest.raises(ValueError, match="acceptance length 12 cannot come from windows of 10"):
        decoding.constant_rate(12, 10)


def test_a_pair_or_a_shape_is_asked_for():
    done = subprocess.run([sys.executable, BENCHMARKS / "decoding.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "give --shape, or --target and --drafter" in done.stderr
