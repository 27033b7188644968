"""What verifying rollouts costs: all of a text in one forest, against loops that take one window after the other.

    python -m benchmarks.rollouts --shape llama-3.1-8b --output benchmarks/results/rollouts-llama-3.1-8b.json

Target and drafter have the shapes of a known pair and random weights; the texts and the drafted tokens are random.
Three ways to learn what the target thinks of every drafted token, in one run and taking turns:

    forest  read the text once, then all windows in one forward (split by max_forest_nodes), as stage 2 does
    cached  read the text once, then one forward per window over its own tokens, on the prefix's keys
    naive   one forward per window over its prefix and its tokens

Seconds include reading the text. Beside them whole steps: a rollout with its drafting, stage 2's step (rollout, loss,
optimizer) for both estimators, and stage 1's. With them stands what `--plan` says, which counts the prompt as an answer
too; and, where the package `speculators` is installed, its EAGLE-3 training step (see speculators_step.py), without its
memory, since our drafter lies beside it.
"""

import argparse
import importlib.metadata
import statistics
import time

import torch
from transformers import DynamicCache

from ppow.cache_ppow import CACHE_NAME
from ppow.training import plan, reinforce, supervised
from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.data import Batch
from ppow.training.preparation import freeze_embedding
from ppow.training.rollout import forest_rows, roll_out, target_words
from ppow.training.target import FrozenTarget

from .machine import synchronize
from .pairs import SHAPES, random_pair, stage2
from .report import add_output, facts, save
from .speculators_step import AVAILABLE, working_step

TTT_STEPS, STEP_WEIGHT = 7, 0.8  # of stage 1, as in EAGLE-3


def main(argv=None) -> dict:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    dtype = getattr(torch, arguments.dtype)
    torch.backends.cuda.enable_cudnn_sdp(False)  # for all three: it plans every new shape for some 40 ms
    torch.manual_seed(arguments.seed)
    model, drafter = random_pair(arguments.shape, device, dtype)
    target = FrozenTarget(model, drafter.config.target_taps)
    drafter = freeze_embedding(drafter.float().train())
    batch = random_batch(model, arguments, device)
    configs = {"rollout": make_config(arguments, "published"), "exact": make_config(arguments, "ppow")}
    starts, tokens = random_rollouts(model, drafter, arguments, device)
    ways = {
        "forest": lambda: forest(configs["rollout"], target, drafter, batch, starts, tokens),
        "cached": lambda: cached(model, batch, starts, tokens, arguments.group_size),
        "naive": lambda: naive(model, batch, starts, tokens, arguments.group_size),
    }
    rollouts = arguments.windows * arguments.group_size
    agreement = {name: float((way() == ways["forest"]()).float().mean()) for name, way in ways.items()}
    report = facts("rollouts", arguments, argv, device=device) | {"verification": {}}
    if AVAILABLE:
        report["versions"]["speculators"] = importlib.metadata.version("speculators")
    timings = timed(ways, arguments.repeats, device)
    for name, (seconds, peak) in timings.items():
        report["verification"][name] = figures(seconds, peak, rollouts, "rollouts_per_second")
        report["verification"][name]["same_argmax_as_forest"] = agreement[name]
    fast = report["verification"]["forest"]["rollouts_per_second"]
    report["speedup"] = {name: fast / row["rollouts_per_second"] for name, row in report["verification"].items()}
    save(report, arguments.output)  # whatever becomes of the steps

    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=1e-6)
    steps = step_functions(configs, target, drafter, batch, optimizer, dtype)
    peaks = {name: peak for name, (_, peak) in timed(steps, 1, device).items()}  # before another drafter takes memory
    if AVAILABLE:
        theirs, loss, errors = working_step(target, drafter, batch, TTT_STEPS, STEP_WEIGHT, dtype)
        report |= {"speculators_loss": loss, "speculators_errors": errors}
        if theirs is not None:
            steps["stage 1 step, speculators"] = theirs
    else:
        print("The package `speculators` is not installed; its training step is left out.")
    length = arguments.prompt + arguments.answer
    counted = {
        "roll_out": (rollouts, "rollouts_per_second"),
        "stage 2 step, rollout": (rollouts, "rollouts_per_second"),
        "stage 2 step, exact": (arguments.windows, "windows_per_second"),
        "stage 1 step": (length, "tokens_per_second"),
        "stage 1 step, speculators": (length, "tokens_per_second"),
    }
    expected = planned(configs, arguments, model.config, drafter.config)
    report["steps"] = {
        name: figures(seconds, peaks.get(name), *counted[name]) | expected.get(name, {})
        for name, (seconds, _) in timed(steps, arguments.repeats, device).items()
    }
    print(table(report))
    save(report, arguments.output)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="windows of the text")
    parser.add_argument("--group-size", type=int, default=8, help="rollouts of a window")
    parser.add_argument("--window-size", type=int, default=10)
    parser.add_argument("--max-forest-nodes", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    return parser.parse_args(argv)


def make_config(arguments, preset: str) -> ReinforceConfig:
    shared = {
        "windows_per_sequence": arguments.windows,
        "group_size": arguments.group_size,
        "max_forest_nodes": arguments.max_forest_nodes,
    }
    return stage2(arguments, preset=preset, **shared, **common(arguments))


def common(arguments) -> dict:
    return {"max_length": arguments.prompt + arguments.answer, "average_from": 1.0}  # a step here takes no mean


def planned(configs: dict, arguments, target_config, drafter_config) -> dict:
    """What `--plan here` says of each step."""
    device = plan.this_device()
    stages = {f"stage 2 step, {name}": config for name, config in configs.items()}
    names = {"target": "-", "data": "-", "output_dir": "-", "dtype": arguments.dtype}
    stages["stage 1 step"] = SupervisedConfig(**names, **common(arguments))
    found = {name: plan.plan(config, target_config, drafter_config, device) for name, config in stages.items()}
    return {
        name: {"planned_seconds": max(row["seconds"].values()), "planned_peak_memory_gib": row["memory_gib"]["total"]}
        for name, row in found.items()
    }


def random_batch(model, arguments, device: str) -> Batch:
    """One text of random tokens, the answer behind the prompt."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    length = arguments.prompt + arguments.answer
    ids = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(arguments.seed))
    mask = torch.arange(length)[None] >= arguments.prompt
    return Batch(ids.to(device), mask.to(device), torch.tensor([length], device=device), arguments.seed)


def random_rollouts(model, drafter, arguments, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Window starts (1, W) in the answer and drafted target ids (1, W * G, K)."""
    generator = torch.Generator().manual_seed(arguments.seed + 1)
    room = arguments.answer - arguments.window_size - 1
    if room < arguments.windows:
        raise ValueError(
            f"An answer of {arguments.answer} tokens has no {arguments.windows} windows of {arguments.window_size}: "
            "raise --answer."
        )
    starts = arguments.prompt - 1 + torch.randperm(room, generator=generator)[: arguments.windows]
    shape = (1, arguments.windows * arguments.group_size, arguments.window_size)
    ids = torch.randint(0, drafter.config.draft_vocab_size, shape, generator=generator).to(device)
    return starts[None].to(device), drafter.to_target_ids(ids)


# -- three ways to verify ----------------------------------------------------------------------------------------------


@torch.no_grad()
def forest(config, target, drafter, batch: Batch, starts, tokens) -> torch.Tensor:
    """The target's argmax (R, K) where each token was drafted, from one forest."""
    reading = target.read(batch.input_ids, room=forest_rows(config, 1) * config.window_size)
    return target_words(config, target, reading, starts, tokens, drafter.draft_columns())[0][0]


@torch.no_grad()
def cached(model, batch: Batch, starts, tokens, group_size: int) -> torch.Tensor:
    """The same from one forward per window on the prefix's keys; late windows first, so that keys are only cut off."""
    cache, found = DynamicCache(config=model.config), {}
    keep = {"use_cache": True, CACHE_NAME: cache}
    model(input_ids=batch.input_ids, logits_to_keep=1, **keep)
    prefixes = (starts[0] + 1).repeat_interleave(group_size).tolist()  # the root, x_{s+1}, goes with the window
    for row in sorted(range(len(prefixes)), key=lambda r: -prefixes[r]):
        prefix = prefixes[row]
        cache.crop(prefix - cache.get_seq_length())  # negative: so many tokens less
        window = torch.cat((batch.input_ids[0, prefix : prefix + 1], tokens[0, row, :-1]))[None]
        found[row] = model(input_ids=window, **keep).logits[0].argmax(-1)
    return torch.stack([found[row] for row in range(len(prefixes))])


@torch.no_grad()
def naive(model, batch: Batch, starts, tokens, group_size: int) -> torch.Tensor:
    """The same from one forward per window over everything before it."""
    found, size = [], tokens.shape[-1]
    for row, start in enumerate(starts[0].repeat_interleave(group_size).tolist()):
        ids = torch.cat((batch.input_ids[0, : start + 2], tokens[0, row, :-1]))[None]
        found.append(model(input_ids=ids, use_cache=False, logits_to_keep=size).logits[0].argmax(-1))
    return torch.stack(found)


# -- whole steps -------------------------------------------------------------------------------------------------------


def step_functions(configs: dict, target, drafter, batch: Batch, optimizer, dtype) -> dict:
    """name -> one step on the text."""

    def roll():
        return roll_out(configs["rollout"], target, drafter, batch, 1)[0]

    def learn(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def autocast():
        return torch.autocast(batch.input_ids.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def rolled():
        with autocast():
            roll()

    def second(name, rolls):
        with autocast():
            loss = reinforce.loss(configs[name], target, drafter, batch, roll() if rolls else None)[0]
        learn(loss)

    def first():
        with autocast():
            loss = supervised.loss(target, drafter, batch, TTT_STEPS, STEP_WEIGHT)[0]
        learn(loss)

    return {
        "roll_out": rolled,
        "stage 2 step, rollout": lambda: second("rollout", True),
        "stage 2 step, exact": lambda: second("exact", False),
        "stage 1 step": first,
    }


# -- figures -----------------------------------------------------------------------------------------------------------


def timed(functions: dict, repeats: int, device: str) -> dict:
    """name -> (seconds of each repetition, peak memory in GiB), taking turns, after one round untimed."""
    seconds, peaks = {name: [] for name in functions}, dict.fromkeys(functions)
    for turn in range(1 + repeats):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            began = time.perf_counter()
            function()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return {name: (seconds[name], peaks[name]) for name in functions}


def figures(seconds: list[float], peak: float | None, count: int, unit: str) -> dict:
    return {
        unit: count / statistics.median(seconds),
        "seconds": statistics.median(seconds),
        "seconds_runs": seconds,
        "peak_memory_gib": peak,
    }


def table(report: dict) -> str:
    lines = [
        "| | per second | seconds (least to most) | planned | peak GiB | planned | forest is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in {**report["verification"], **report["steps"]}.items():
        unit = next(key for key in row if key.endswith("_per_second"))
        spread = f"{row['seconds']:.4f} ({min(row['seconds_runs']):.4f} to {max(row['seconds_runs']):.4f})"
        peak = "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
        seconds, memory = "-", "-"
        if "planned_seconds" in row:
            seconds, memory = f"{row['planned_seconds']:.4f}", f"{row['planned_peak_memory_gib']:.1f}"
        factor = f"{report['speedup'][name]:.1f}x" if name in report["speedup"] else "-"
        per_second = f"{row[unit]:.0f} {unit.partition('_')[0]}"
        lines.append(f"| {name} | {per_second} | {spread} | {seconds} | {peak} | {memory} | {factor} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
