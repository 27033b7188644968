"""The comparison of rules that end windows, run small."""

import json

import pytest

from small_pair import DRAFTER, TARGET

BENCHMARK = "stopping"
PAIR = ["--target", str(TARGET), "--drafter", str(DRAFTER)]


def test_all_rules_in_one_run(benchmark, tmp_path, capsys):
    prompts = tmp_path / "sums.jsonl"
    prompts.write_text(json.dumps({"prompt": "Tom has 12 apples. He buys 8 more. How many does he have?"}) + "\n")
    output, picture = tmp_path / "stopping.json", tmp_path / "stopping.png"
    small = ["--prompts", str(prompts), "--new", "8", "--repeats", "1", "--window", "5"]
    report = benchmark.main([*PAIR, *small, "--output", str(output), "--plot", str(picture)])
    greedy, sampled = report["parts"]
    assert (greedy["domain"], greedy["temperature"], sampled["temperature"]) == ("sums", 0.0, 1.0)
    names = [row["name"] for row in greedy["systems"]]
    assert names == ["plain generate", *(f"window {k}" for k in (1, 2, 3, 5, 7, 10)), *names[7:]]
    assert names[7:] == ["threshold", "heuristic", "gammatune", "gammatune+", "cost-aware"]
    for row in greedy["systems"][1:]:
        assert row["same_tokens"] == row["answers"] == len(row["speedup_runs"]) == 1
        longest = int(row["name"].split()[1]) if row["name"].startswith("window") else 5
        assert all(int(length) <= longest for length in row["lengths"]) and row["acceptance_length"] >= 1
    assert picture.stat().st_size > 1000
    summary = json.loads(output.read_text())
    runs = greedy["systems"][-1]["speedup_runs"]
    assert summary["parts"][0]["systems"][-1]["speedup_range"] == pytest.approx([min(runs), max(runs)], rel=1e-4)
    shown = capsys.readouterr().out
    assert "sums T=0" in shown and "gammatune+" in shown and "1/1" in shown


def test_speedups_are_of_the_same_prompt_and_turn(benchmark):
    class Seen:
        gained, drafted = [[3, 1]], [[2, 0]]

    stock = [([1, 2], 2.0, None), ([1, 3], 4.0, None)]
    row = benchmark.figures("x", [([1, 2], 1.0, Seen), ([1, 4], 8.0, Seen)], stock)
    assert row["speedup_runs"] == [2.0, 0.5] and row["speedup"] == 1.25 and row["same_tokens"] == 1
    assert (row["acceptance_length"], row["drafts_per_window"], row["lengths"]) == (2.0, 1.0, {"0": 2, "2": 2})
    assert benchmark.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0] and benchmark.quartiles([2.0]) == [2.0, 2.0]


def test_the_fast_path_compares_what_it_knows(benchmark):
    arguments = benchmark.parse([*PAIR, "--path", "fast", "--only", "gamma,cost,threshold,window 3"])
    found = benchmark.systems(arguments, head=True)
    assert list(found) == ["plain generate", "window 3", "gammatune", "cost-aware"]
    assert all(options["cuda_graphs"] and "draft_threshold" not in options for options in list(found.values())[1:])
    plain = benchmark.parse([*PAIR, "--only", "cost,learned"])
    assert list(benchmark.systems(plain, head=True)) == ["plain generate", "cost-aware", "learned"]
    assert list(benchmark.systems(plain, head=False)) == ["plain generate", "cost-aware"]
    with pytest.raises(SystemExit):
        benchmark.parse(PAIR[:2])
