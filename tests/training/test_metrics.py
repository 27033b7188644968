import json
import os
from pathlib import Path

import pytest
import torch

from ppow.training.metrics import MetricsLog


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.log(1, {"loss": torch.tensor(0.5), "note": "warm"})
    log.log(2, {"loss": 0.25, "per_step": [1.0, torch.tensor(2)]})
    assert rows(path) == [
        {"step": 1, "loss": 0.5, "note": "warm"},
        {"step": 2, "loss": 0.25, "per_step": [1.0, 2]},
    ]
    log.close()


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log(1, {"loss": float("nan"), "kl": torch.tensor(float("inf")), "tails": [float("-inf"), 1]})
    assert rows(log.path) == [{"step": 1, "loss": None, "kl": None, "tails": [None, 1]}]


def test_reopening_appends(tmp_path):
    for step in (1, 2):
        with MetricsLog(tmp_path / "m.jsonl") as log:
            log.log(step, {})
    assert rows(log.path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "loss": 0.1', b'{"step": 3}'])
def test_a_line_cut_off_by_a_kill_is_removed_on_opening(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    with MetricsLog(path) as log:
        log.log(3, {"loss": 1})
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1}]


def test_a_resumed_run_continues_without_gap_or_repeat(tmp_path):
    with MetricsLog(tmp_path / "whole.jsonl") as log:
        for step in range(1, 9):
            log.log(step, {"loss": 1 / step})
    with MetricsLog(tmp_path / "m.jsonl") as log:
        for step in range(1, 7):  # killed after step 6, checkpoint at step 4
            log.log(step, {"loss": 1 / step})
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.truncate_after(4)
        for step in range(5, 9):
            log.log(step, {"loss": 1 / step})
    assert log.path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(("step", "left"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
def test_truncate_after_keeps_every_line_up_to_the_step(tmp_path, step, left):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        for written in (1, 2, 2, 3):
            log.log(written, {})
        log.truncate_after(step)
        assert [row["step"] for row in rows(log.path)] == left


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"epoch": 2}\n')
    with MetricsLog(path) as log, pytest.raises(ValueError, match=r"m.jsonl:2 is not a line of metrics"):
        log.truncate_after(5)
    assert path.read_text() == '{"step": 1}\n{"epoch": 2}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_surfaces(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log._file.close()
    with open("/dev/full", "ab", buffering=0) as full:
        log._file, log.path = full, Path("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            log.log(1, {"loss": 1.0})
