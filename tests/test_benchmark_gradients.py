"""The benchmark of gradients: its figures on made-up gradients, and the command, small on a CPU."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARK = "gradients"
ROOT = Path(__file__).parents[1]


def test_noise_and_signal_of_known_gradients(benchmark):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator)
    gradients = mean + 2 * torch.randn(4000, 50, generator=generator)
    found = benchmark.figures(gradients, [1.0, 3.0, 2.0], mean)
    assert found["noise"] == pytest.approx(4 * 50 / float(mean.square().sum()), rel=0.05)
    assert found["gradient_norm"] == pytest.approx(float(mean.norm()), rel=0.02)
    assert found["cosine_with_exact"] > 0.99 and found["seconds"] == 2
    # two gradients that cancel show no signal at all
    assert benchmark.figures(torch.stack((mean, -mean)), [1.0], mean)["noise"] is None


def test_the_command_compares_all_estimators(benchmark, tmp_path, capsys):
    data, output = tmp_path / "answers.jsonl", tmp_path / "gradients.json"
    with open(data, "w") as out:
        for i in range(4):
            reply = {"role": "assistant", "content": f"The answer is {i} plus {i + 1}, and that makes {2 * i + 1}."}
            out.write(json.dumps({"messages": [{"role": "user", "content": f"Sum {i}?"}, reply]}) + "\n")
    pair = ["--target", str(ROOT / "bundled/target"), "--drafter", str(ROOT / "bundled/drafter"), "--data", str(data)]
    small = ["--seeds", "2", "--batch-size", "2", "--windows", "1", "--window-size", "3", "--output", str(output)]
    benchmark.main(pair + small)
    report = json.loads(output.read_text())
    assert set(report["estimators"]) == set(benchmark.ESTIMATORS)
    assert report["estimators"]["exact"]["cosine_with_exact"] == pytest.approx(1)
    assert report["hardware"] and report["settings"]["texts"] == 4
    assert "| rollout, credit by token |" in capsys.readouterr().out


def test_one_gradient_has_no_noise_to_show(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--target", "-", "--drafter", "-", "--data", "-", "--seeds", "1"])
    assert "at least 2 gradients" in capsys.readouterr().err
