"""The benchmark of gradients: its figures on made-up gradients, and the command, small on a CPU."""

import json

import pytest
import torch

from small_pair import DRAFTER, TARGET

BENCHMARK = "gradients"


def test_noise_and_signal_of_known_gradients(benchmark):
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 50, generator=generator)
    noise = 2 * torch.randn(4000, 50, generator=generator)
    gradients, exact = mean + noise, other + noise  # common noise, which must not count as a common direction
    found = benchmark.figures(gradients, [1.0, 3.0, 2.0], exact)
    assert found["noise"] == pytest.approx(4 * 50 / float(mean.square().sum()), rel=0.05)
    assert found["gradient_norm"] == pytest.approx(float(mean.norm()), rel=0.02)
    cosine = float(torch.nn.functional.cosine_similarity(mean, other, dim=0))
    assert found["cosine_with_exact"] == pytest.approx(cosine, abs=0.03) and found["seconds"] == 2
    # |mean of n| has a standard error of sigma / sqrt(n) along its direction
    assert found["gradient_norm_error"] == pytest.approx(2 / 4000**0.5, rel=0.1)
    # two gradients that cancel show no signal at all
    cancelled = benchmark.figures(torch.stack((mean, -mean)), [1.0], torch.stack((mean, mean)))
    assert cancelled["noise"] is None and cancelled["gradient_norm"] is None and cancelled["cosine_with_exact"] is None


def test_products_leave_out_those_of_one_seed(benchmark):
    """By hand: gradients 1, 2, 4 and 1, 3, 5: of different seeds 8 + 12 + 16 = 36 in six products."""
    left, right = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    assert benchmark.products(left, right).tolist() == pytest.approx([6.0, 11.0, 4.5, 2.5])


def test_the_command_compares_all_estimators(benchmark, tmp_path, capsys):
    data, output = tmp_path / "answers.jsonl", tmp_path / "gradients.json"
    with open(data, "w") as out:
        for i in range(4):
            reply = {"role": "assistant", "content": f"The answer is {i} plus {i + 1}, and that makes {2 * i + 1}."}
            out.write(json.dumps({"messages": [{"role": "user", "content": f"Sum {i}?"}, reply]}) + "\n")
    pair = ["--target", str(TARGET), "--drafter", str(DRAFTER), "--data", str(data)]
    small = ["--seeds", "3", "--batch-size", "4", "--windows", "2", "--window-size", "3", "--output", str(output)]
    benchmark.main(pair + small)
    report = json.loads(output.read_text())
    assert set(report["estimators"]) == set(benchmark.ESTIMATORS)
    assert report["estimators"]["exact"]["cosine_with_exact"] == pytest.approx(1)
    assert report["hardware"] and report["settings"]["texts"] == 4
    assert "| rollout, groups of 2 |" in capsys.readouterr().out


def test_one_gradient_has_no_noise_to_show(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--target", "-", "--drafter", "-", "--data", "-", "--seeds", "1"])
    assert "at least 2 gradients" in capsys.readouterr().err
