"""A target split over two processes by tensor parallelism: on each the tokens that one process alone makes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import small_pair
from decoding_helpers import MODES, build_target, generate_with, prompt_batches, random_drafter, train, trained_pair
from ppow import generation_ppow, obstacles_ppow
from ppow.target_ppow import is_split
from two_processes import run_in_two_processes

ROOT = Path(__file__).parents[2]
WAYS = {
    **MODES,
    "auto": {"window_schedule": "auto"},
    "sampled": {"do_sample": True, "window_size": 3},
    "sampled tree": {"do_sample": True, **MODES["tree"]},
}
SCRIPT = f"""
import json, os, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests" / "helpers")!r}, {str(ROOT / "tests" / "decoding")!r}]
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from ppow import PPOWDrafter
from test_split import answers
folder = Path(sys.argv[1])
target = AutoModelForCausalLM.from_pretrained(folder / "target", distributed_config=DistributedConfig(tp_size=2))
found = answers(target, PPOWDrafter.from_pretrained(folder / "drafter"))
(folder / f"status-0-{{os.environ['RANK']}}").write_text(json.dumps(found))
"""


def answers(target, drafter) -> list[tuple[str, str, list]]:
    """What every way of drafting makes of a few prompts: its name, the schedule in effect, the tokens."""
    found = []
    for batch in (1, 3):
        for ids, mask in prompt_batches(batch, 1, seed=batch):
            for name, way in WAYS.items():
                torch.manual_seed(0)
                out = generate_with(target, drafter, ids, mask, {**way, "max_new_tokens": 16})
                found.append([name, out.drafting.window_schedule, out.sequences.tolist()])
    return found


def test_two_processes_make_the_tokens_of_one(tmp_path):
    target = build_target().float()
    drafter = train(random_drafter(target), target)
    target.save_pretrained(tmp_path / "target")
    drafter.save_pretrained(tmp_path / "drafter")
    [found], _ = run_in_two_processes(tmp_path, [[]], SCRIPT)
    one, two = map(json.loads, found)
    assert one == two
    expected = answers(target, drafter)
    assert [each[::2] for each in one] == [each[::2] for each in expected]
    for (name, alone, _), (_, split, _) in zip(expected, one):
        assert split != "cost" and (alone == "cost") is (name == "auto")


def test_the_ten_lines_run():
    """With two processes on the CPU; the page names the command."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, ROOT / "examples" / "split.py", small_pair.TARGET, small_pair.DRAFTER]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts = re.findall(r"List three ways to reduce stress\.", done.stdout)
    assert len(prompts) == 2
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    assert "torchrun --nproc-per-node 2 examples/split.py" in page


@pytest.fixture
def as_if_split(monkeypatch):
    target, drafter = trained_pair()
    monkeypatch.setattr(target, "_device_mesh", SimpleNamespace(size=lambda: 2))
    assert is_split(target)
    return target, drafter


def test_processes_decide_nothing_by_their_own_clocks(as_if_split, monkeypatch):
    seen = []
    few_rows = generation_ppow.few_rows
    monkeypatch.setattr(generation_ppow, "few_rows", lambda *models: seen.append(models) or few_rows(*models))
    ids = torch.arange(1, 9)[None]
    out = generate_with(*as_if_split, ids, config={"window_schedule": "auto", "max_new_tokens": 4})
    assert seen == [()] and out.drafting.window_schedule == "gammatune"
    with pytest.raises(ValueError, match='"cost" follows measured time, by which the processes'):
        generate_with(*as_if_split, ids, config={"window_schedule": "cost", "max_new_tokens": 4})


def test_graphs_are_not_recorded_of_a_split_target(as_if_split, monkeypatch):
    target, drafter = as_if_split
    monkeypatch.setattr(obstacles_ppow, "HAS_TRITON", True)
    monkeypatch.setattr(type(target), "device", torch.device("cuda"))
    assert "tensor parallelism has split" in obstacles_ppow.place_obstacle(target, drafter)
