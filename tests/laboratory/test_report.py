"""What benchmarks leave behind: summaries by hand, and the command that makes them of other commands' records."""

import json

import pytest

BENCHMARK = "report"


def test_a_summary_has_the_facts_and_few_numbers(benchmark, tmp_path):
    output = tmp_path / "results" / "x.json"
    report = {"command": "python -m benchmarks.x", "versions": {"torch": "2"}, "settings": {"seed": 0, "limit": None}}
    report |= {"systems": [{"name": "a", "seconds_runs": [3.0, 1.0, 2.0], "seconds": 2.000004}]}
    summary = benchmark.save(report, output)
    assert summary["settings"] == {"seed": 0} and summary["command"] == report["command"]
    assert summary["systems"] == [{"name": "a", "seconds_range": [1.0, 3.0], "seconds": 2.0}]
    assert json.loads(output.read_text()) == summary
    assert json.loads((tmp_path / "results" / "raw" / "x.json").read_text()) == report
    assert benchmark.save(report, None) == summary  # a command that was given no file


@pytest.mark.parametrize(
    ("gpus", "threads", "said"), [([], 1, "A CPU, 1 thread"), ([], 2, "A CPU, 2 threads"), (["A", "B"], 2, "A")]
)
def test_the_machine_of_a_report(benchmark, gpus, threads, said):
    assert benchmark.ran_on({"hardware": {"cpu": "A CPU", "torch_threads": threads, "gpus": gpus}}) == said


def test_lines_hold_as_much_as_fits(benchmark):
    value = {"a": {"b": [0.5] * 40, "c": None}, "d": {str(n): n for n in range(100)}, "e": {}, "f": "g" * 200}
    text = benchmark.compact(value)
    assert json.loads(text) == value
    lines = text.splitlines()
    assert max(len(line) for line in lines if "ggg" not in line) <= 120
    assert len(lines) < 30


def test_the_demos_record_becomes_a_summary(benchmark, tmp_path):
    answers = [{"prompt": "?", "speedup": s, "identical": s > 1} for s in (0.5, 1.5, 3.0)]
    record = {"answers": answers, "command": "demo", "argv": ["ppow", "demo"], "config": {"limit": None, "seed": 3}}
    raw, output = tmp_path / "demo.json", tmp_path / "summary.json"
    raw.write_text(json.dumps(record))
    benchmark.main([str(raw), str(output)])
    summary = json.loads(output.read_text())
    assert summary == {
        "command": "ppow demo",
        "settings": {"seed": 3},
        "prompts": 3,
        "identical": 2,
        "speedup": {"median": 1.5, "least": 0.5, "most": 3.0},
    }


def test_a_training_run_becomes_a_summary(benchmark, tmp_path):
    rows = [{"step": 10 * n, "seconds": 0.5 * n} for n in (1, 2, 3)]
    rows[1]["eval_acceptance_length"] = 4.25
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"command": "supervised", "argv": ["ppow", "supervised"], "config": {"log_every": 10}, "earlier": [{}]}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    benchmark.main([str(tmp_path / "metrics.jsonl"), str(tmp_path / "run.json")])
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["steps"] == 30 and summary["seconds"] == pytest.approx(30.0)
    assert summary["heldout_acceptance_length"] == {"20": 4.25} and summary["command"] == "ppow supervised"
