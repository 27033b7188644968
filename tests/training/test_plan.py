"""The dry run: its operations against a counter of executed ones, its memory against the pair's own sizes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from ppow import PPOWBlockDrafter, PPOWConfig, PPOWDrafter
from ppow.training import cli, objectives, plan, reinforce, supervised, text_windows
from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.data import Batch
from ppow.training.preparation import freeze_embedding
from ppow.training.rollout import roll_out
from ppow.training.target import FrozenTarget

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LENGTH, TEXTS = 80, 2
SHARED = {"target": "-", "data": "-", "output_dir": "-", "max_length": LENGTH, "batch_size": TEXTS}
STAGE2 = {**SHARED, "drafter": "-", "windows_per_sequence": 3, "proximity_bonus": 0.0}
CONFIGS = {
    "stage 1": SupervisedConfig(**SHARED),
    "exact": ReinforceConfig(**STAGE2),
    "rollouts": ReinforceConfig.from_dict({**STAGE2, "preset": "published"}),
    "block, stage 1": SupervisedConfig(**SHARED, architecture="block", anchors=16),
    "block, exact": ReinforceConfig(**STAGE2, anchors=16),
    "block, compiled": ReinforceConfig(**STAGE2, anchors=16, compile_loss=True),
    "shared head, stage 1": SupervisedConfig(**SHARED),
    "shared head, rollouts, supervised": ReinforceConfig.from_dict(
        {**STAGE2, "preset": "published", "supervised_coef": 1.0}
    ),
    "rollouts, supervised": ReinforceConfig.from_dict({**STAGE2, "preset": "published", "supervised_coef": 1.0}),
}


class Counter(TorchDispatchMode):
    """Operations of matrix products, as torch counts them; also of the CPU's fused attention, which it leaves out."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet.__name__.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            backward = "backward" in packet.__name__
            query, key = args[1:3] if backward else args[:2]
            self.operations += (8 if backward else 4) * query.numel() * key.shape[2]
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def pair():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=900,
    )
    torch.manual_seed(0)
    drafter = freeze_embedding(PPOWDrafter(PPOWConfig.from_target(config, draft_vocab_size=500)))
    return FrozenTarget(AutoModelForCausalLM.from_config(config), drafter.config.target_taps), drafter


@pytest.fixture(scope="module")
def pairs(pair):
    """The drafter for each name of a configuration."""
    target, drafter = pair
    shape = {"architecture": "block", "num_hidden_layers": 2, "markov_rank": 8}
    block = PPOWBlockDrafter(PPOWConfig.from_target(target.model.config, **shape))
    shared = {"draft_vocab_size": 500, "share_target_embeddings": True, "share_target_head": True}
    borrowing = PPOWDrafter(PPOWConfig.from_target(target.model.config, **shared))
    kinds = {"block": block, "shared head": borrowing}
    return {name: (target, kinds.get(name.partition(",")[0], drafter)) for name in CONFIGS}


def planned(config, pair, device=plan.DEVICES["h200"]):
    return plan.plan(config, pair[0].model.config, pair[1].config, device)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_operations_are_those_of_an_executed_step(name, pairs, monkeypatch):
    monkeypatch.setattr(text_windows, "compiled", lambda: objectives.compare)
    config, pair = CONFIGS[name], pairs[name]
    target, drafter = pair
    ids = torch.randint(1, 900, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full((TEXTS,), LENGTH), 0)
    with Counter() as counter:
        if "stage 1" in name:
            loss = supervised.loss_of(config, target, drafter, batch)[0]
        else:
            rollout = None
            if "rollouts" in name:
                rollout = roll_out(config, target, drafter, batch, 1)[0]
            loss = reinforce.loss(config, target, drafter, batch, rollout)[0]
        loss.backward()
    found = sum(planned(config, pair)["operations"].values())
    # an upper bound, since windows near the end of a text are shorter, and a close one
    assert 0.995 * counter.operations < found < 1.07 * counter.operations


def test_the_standing_memory_is_the_pairs_own_size(pair):
    target, drafter = pair
    config = dataclasses.replace(CONFIGS["exact"], dtype="bfloat16")
    memory = planned(config, pair)["memory_gib"]
    assert memory["target"] == sum(p.numel() for p in target.model.parameters()) * 2 / 2**30
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    frozen = drafter.embed_tokens.weight.numel()
    mean = 4 * trained  # of its weights
    assert memory["drafter, gradient, optimizer"] == (16 * trained + 4 * frozen + 2 * trained + mean) / 2**30
    parts = [value for name, value in memory.items() if name not in ("total", "available")]
    assert memory["total"] == pytest.approx(sum(parts)) and memory["available"] == 141e9 / 2**30


@pytest.mark.parametrize("name", CONFIGS)
def test_more_work_takes_more(name, pairs):
    pair = pairs[name]
    small = planned(CONFIGS[name], pair)
    more = planned(dataclasses.replace(CONFIGS[name], batch_size=2 * TEXTS), pair)
    again = planned(dataclasses.replace(CONFIGS[name], accumulation=2), pair)
    assert more["memory_gib"]["total"] > small["memory_gib"]["total"] == again["memory_gib"]["total"]
    assert sum(more["operations"].values()) == pytest.approx(2 * sum(small["operations"].values()), rel=1e-6)
    assert again["operations"] == {part: 2 * value for part, value in small["operations"].items()}
    assert again["seconds"] == {part: pytest.approx(2 * value) for part, value in small["seconds"].items()}


def test_the_proximity_reward_costs_time(pair):
    """One forward of the target for every further token of its argmax window."""
    plain, bonus = (planned(dataclasses.replace(CONFIGS["rollouts"], proximity_bonus=eta), pair) for eta in (0.0, 0.5))
    assert bonus["operations"] == plain["operations"] and bonus["memory_gib"] == plain["memory_gib"]
    weights = sum(p.numel() for p in pair[0].model.parameters()) * 4
    moved = weights * (CONFIGS["rollouts"].window_size - 1) / plan.DEVICES["h200"].bandwidth
    assert bonus["seconds"]["memory"] - plain["seconds"]["memory"] == pytest.approx(moved)


def test_the_forest_bounds_the_memory_of_verification(pair):
    """By hand, where a large vocabulary makes verification the largest phase."""
    target = LlamaConfig(**{**pair[0].model.config.to_dict(), "vocab_size": 100_000})
    drafter, found = PPOWConfig.from_target(target, draft_vocab_size=50), {}
    for nodes in (96, 10_000):
        config = dataclasses.replace(CONFIGS["rollouts"], max_forest_nodes=nodes)
        found[nodes] = plan.plan(config, target, drafter, plan.DEVICES["h200"])["memory_gib"]
    group, size, texts = config.group_size, config.window_size, config.batch_size
    rows = config.windows_per_sequence * group
    for nodes, at_once in ((96, 96 // (size * texts)), (10_000, rows)):
        assert 0 < at_once <= rows
        logits = texts * at_once * (size - 1) * (2 * 100_000 + 3 * target.intermediate_size) * 4
        kept = texts * rows * size * 50 * 4  # over the draft vocabulary
        assert found[nodes]["the step's largest phase (target verifies)"] == pytest.approx((logits + kept) / 2**30)
    assert found[96]["total"] < found[10_000]["total"]


def test_a_large_target_does_not_fit_and_says_what_to_do(capsys):
    target = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    config = ReinforceConfig(**{**STAGE2, "max_length": 2048}, dtype="bfloat16", plan="h100")
    found = plan.show(config, target, PPOWConfig.from_target(target, draft_vocab_size=32000))
    assert found["memory_gib"]["total"] > found["memory_gib"]["available"]
    assert "This does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["supervised", "--draft-vocab-size", "500"], ["reinforce", "--drafter", "{drafter}"]]
)
def test_the_command_prints_and_leaves_nothing(command, pair, tmp_path, capsys):
    pair[0].model.save_pretrained(tmp_path / "target")
    pair[1].save_pretrained(tmp_path / "drafter")
    given = [word.format(drafter=tmp_path / "drafter") for word in command]
    out = tmp_path / "out"
    argv = [*given, "--target", str(tmp_path / "target"), "--data", "none.jsonl", "--output-dir", str(out)]
    assert cli.main([*argv, "--plan", "here"]) == 0
    printed = capsys.readouterr().out
    assert f"`ppow {command[0]}`" in printed and "together" in printed and "TFLOP" in printed
    assert not out.exists()
    assert cli.main([*argv, "--plan", "here", "--target", str(tmp_path / "nowhere")]) == 2
    assert f"--target {tmp_path / 'nowhere'} is no folder here" in capsys.readouterr().err
    assert cli.main([*argv, "--plan", "tpu"]) == 2
    assert "here, a100, h100, h200" in capsys.readouterr().err


def test_what_the_plan_says_of_its_own_bound_is_what_was_measured():
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    target = LlamaConfig(**shape, num_key_value_heads=8, head_dim=128, vocab_size=128256)
    drafter = PPOWConfig.from_target(target, draft_vocab_size=32000)
    given = {"target": "-", "data": "-", "output_dir": "-", "max_length": 1024, "dtype": "bfloat16"}
    stage2 = {**given, "drafter": "-", "windows_per_sequence": 8, "group_size": 8, "max_forest_nodes": 4096}
    steps = {
        "stage 1 step": SupervisedConfig(**given),
        "stage 2 step, exact": ReinforceConfig(**stage2),
        "stage 2 step, rollout": ReinforceConfig.from_dict({**stage2, "preset": "published"}),
    }
    ratios = []
    for path in RESULTS.glob("rollouts-llama-3.1-8b-h100*.json"):
        report = json.loads(path.read_text())
        assert report["settings"]["shape"] == "llama-3.1-8b"
        for name, config in steps.items():
            bound = max(plan.plan(config, target, drafter, plan.DEVICES["h100"])["seconds"].values())
            ratios.append(report["steps"][name]["seconds"] / bound)
    assert len(ratios) == 6
    assert plan.MEASURED == (round(min(ratios), 1), round(max(ratios), 1))
