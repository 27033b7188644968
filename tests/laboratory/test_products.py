"""The benchmark of products: its sums, the command small on a CPU, and the kernel in triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = "products"


def test_the_command_measures_every_matrix(benchmark, tmp_path, capsys):
    output = tmp_path / "products.json"
    benchmark.main(["--shape", "tiny", "--nodes", "3", "--repeats", "2", "--output", str(output)])
    report = json.loads(output.read_text())
    shapes = {(row["part"], row["matrix"]): (row["rows"], row["columns"], row["inner"]) for row in report["products"]}
    assert shapes["verification of 3 nodes", "q/k/v"] == (3, (4 + 2 * 2) * 16, 64)  # 4 query and 2 key heads of 16
    assert shapes["verification of 3 nodes", "gate/up"] == (3, 2 * 128, 64)
    assert shapes["draft step", "q/k/v"] == (1, (4 + 2 * 2) * 16, 2 * 64)  # reads embedding and features
    assert shapes["draft step", "head"] == (1, 500, 64)
    assert len(shapes) == 10 and report["milliseconds"]["draft step"]["library"] > 0
    assert "verification of 3 nodes: library" in capsys.readouterr().out


def test_a_sum_takes_the_better_way_for_each_matrix(benchmark):
    rows = [
        {"part": "a", "times": 2, "library_us": 100.0, "kernel_us": 50.0},
        {"part": "a", "times": 1, "library_us": 10.0, "kernel_us": 70.0},
        {"part": "b", "times": 9, "library_us": 9.0, "kernel_us": 9.0},
    ]
    found = benchmark.total({"products": rows}, "a")
    assert found == pytest.approx({"library": 0.21, "kernel where it is faster": 0.11})


def test_tilings_fit_into_shared_memory(benchmark):
    for rows in (1, 11, 61):
        found = benchmark.tilings(rows)
        assert found and all((c + max(16, rows)) * d * 2 * s <= 220 * 1024 for c, d, _, _, s in found)
    assert len(benchmark.tilings(61)) < len(benchmark.tilings(1))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_in_tritons_interpreter(tmp_path):
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import torch; from benchmarks.products import few_rows\n"
        "for rows, columns, inner in ((1, 40, 70), (11, 96, 200), (61, 130, 512)):\n"
        "    x, w = torch.randn(rows, inner), torch.randn(columns, inner) * inner**-0.5\n"
        "    for tiling in ((32, 64, 1, 4, 3), (64, 64, 4, 4, 3), (32, 128, 8, 4, 3)):\n"
        "        torch.testing.assert_close(few_rows(x, w, tiling), x @ w.t(), rtol=1e-4, atol=1e-4)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
