"""How noisy the gradients of PPOW's estimators are, and where their means point: what a step of stage 2 has to go by.

    python -m benchmarks.gradients --target tests/pair/target --drafter tests/pair/stage1 --data answers.jsonl \
        --output benchmarks/results/gradients.json

All estimators take the gradient of one expected reward, over the same texts and (seed by seed) the same windows, drawn
uniformly, at rollout temperature 1, without anchor, proximity reward, supervised term or division by the deviation:

* ``exact``: the closed form along the target's own text;
* ``rollout``: groups of 8 rollouts, the group's mean as baseline (as published);
* ``rollout, groups of 2``: four times the windows, a quarter of the group, so as many rollouts.

Figures: noise = E |g - E g|^2 over |E g|^2, that is how many steps must be averaged until signal and noise are of one
size; length of E g and its cosine with that of ``exact``, with standard errors; seconds of a gradient on this machine.
Data are the target's own answers: greedy ones for --verification greedy, sampled ones at temperature 1 for sampling.
"""

import argparse
import math
import statistics
import time

import torch
from tqdm import tqdm

from ppow.training.config import ReinforceConfig
from ppow.training.data import batch_indices, make_batch
from ppow.training.objectives import exact_loss
from ppow.training.preparation import load_examples, pad_token
from ppow.training.reinforce import loss
from ppow.training.rewards import speedup_reward
from ppow.training.rollout import roll_out
from ppow.training.target import FrozenTarget
from ppow.training.text_windows import read_windows
from ppow.training.windows import sample_windows, window_priority

from .pairs import load, stage2
from .report import add_output, facts, save

ESTIMATORS = {
    "exact": {"preset": "ppow"},
    "rollout": {"preset": "published"},
    "rollout, groups of 2": {"preset": "published", "group_size": 2},
}


def main(argv=None) -> dict:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, target, drafter = load(arguments, device)
    drafter.train()
    configs = {name: make_config(arguments, changes) for name, changes in ESTIMATORS.items()}
    size = arguments.window_size
    examples = load_examples(configs["exact"], arguments.data, tokenizer, size, answer=size)
    pad, found = pad_token(tokenizer), {name: ([], []) for name in configs}
    for seed in tqdm(range(arguments.seeds), desc="seeds", disable=None):
        chosen = batch_indices(len(examples), arguments.batch_size, arguments.seed, seed)
        for name, config in configs.items():
            batch = make_batch([examples[i] for i in chosen], pad, device, arguments.seed + seed)
            began = time.perf_counter()
            found[name][0].append(gradient(config, target, drafter, batch))
            found[name][1].append(time.perf_counter() - began)
    exact = torch.stack(found["exact"][0])
    report = facts("gradients", arguments, argv, device=device, texts=len(examples)) | {
        "estimators": {name: figures(torch.stack(g), seconds, exact) for name, (g, seconds) in found.items()},
    }
    print(table(report))
    save(report, arguments.output)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--data", required=True, help=".jsonl of the target's own answers")
    parser.add_argument("--verification", choices=("greedy", "sampling"), default="greedy")
    parser.add_argument("--seeds", type=int, default=24, help="gradients of every estimator")
    parser.add_argument("--batch-size", type=int, default=8, help="texts per gradient")
    parser.add_argument("--windows", type=int, default=4, help="windows of a text, in groups of 8")
    parser.add_argument("--window-size", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: noise shows between at least 2 gradients")
    return arguments


def make_config(arguments, changes: dict) -> ReinforceConfig:
    group = changes.get("group_size", 8)
    shared = {
        "verification": arguments.verification,
        "windows_per_sequence": arguments.windows * 8 // group,
        "adaptive_switch": 1.0,
        "rollout_temperature": 1.0,
        "proximity_bonus": 0.0,
        "supervised_coef": 0.0,
        "kl_coef": 0.0,
        "drop_long": True,
    }
    return stage2(arguments, **(shared | changes))


def gradient(config: ReinforceConfig, target: FrozenTarget, drafter, batch) -> torch.Tensor:
    """The gradient of one batch with respect to all that is trained, on the host: (parameters,) float32."""
    rollout, scale = None, 1.0
    if config.estimator == "rollout":
        rollout, _ = roll_out(config, target, drafter, batch, step=1)
        rollout.advantages = rollout.reward - rollout.reward.mean(-1, keepdim=True)
        # a group's mean holds the rollout itself, which makes the expected gradient shorter by (G - 1) / G
        scale = config.group_size / (config.group_size - 1)
    drafter.zero_grad(set_to_none=True)
    found = loss(config, target, drafter, batch, rollout)[0] if rollout else exact(config, target, drafter, batch)
    found.backward()
    parts = [p.grad for p in drafter.parameters() if p.requires_grad]
    return scale * torch.cat([part.flatten() for part in parts]).float().cpu()


def exact(config: ReinforceConfig, target: FrozenTarget, drafter, batch) -> torch.Tensor:
    """The closed form () along windows drawn as for rollouts."""
    valid = torch.nn.functional.pad(batch.loss_mask[:, 2:], (0, 1))  # (B, T - 1), as in a rollout
    exists = window_priority(valid.float(), valid, config.window_size)[1]
    drawn = sample_windows(None, exists, config.windows_per_sequence, batch.generator(), adaptive=False)
    windows, _ = read_windows(target, drafter, batch, config.window_size, drawn)
    k = torch.arange(config.window_size + 1, device=batch.input_ids.device)
    return exact_loss(windows, speedup_reward(k, config.cost_ratio), config.verification, kl_coef=0.0)[0]


def figures(gradients: torch.Tensor, seconds: list[float], exact: torch.Tensor) -> dict:
    """Noise, direction and cost of gradients (seeds, parameters), beside those of ``exact`` for the same batches.

    Norm and cosine are of expected gradients, without what noise adds: no mean holds a product of two gradients of one
    seed. Their errors are standard errors by jackknife over seeds. None: the signal drowns in so few seeds.
    """
    count, mean = len(gradients), gradients.mean(0, dtype=torch.float64)
    spread = sum(float((one - mean).square().sum()) for one in gradients) / (count - 1)  # E |g - E g|^2
    own, other, both = (products(*pair) for pair in ((gradients, gradients), (exact, exact), (gradients, exact)))
    norm, cosine = own.sqrt(), both / own.sqrt() / other.sqrt()  # of all seeds, then without each; nan: no signal
    found = {"noise": float(spread / norm[0] ** 2)}
    for name, values in (("gradient_norm", norm), ("cosine_with_exact", cosine)):
        error = ((count - 1) * values[1:].var(correction=0)).sqrt()
        found |= {name: float(values[0]), f"{name}_error": float(error)}
    found = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return found | {"seconds": statistics.median(seconds)}


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mean product of gradients (seeds, parameters) of different seeds: of all, then without each seed (1 + seeds,)."""
    table = torch.stack([(right @ one).double() for one in left])
    table = table - table.diagonal().diag()
    sums = torch.cat([table.sum()[None], table.sum() - table.sum(0) - table.sum(1)])
    count = torch.tensor([len(left), *[len(left) - 1] * len(left)])
    return sums / (count * (count - 1))


def table(report: dict) -> str:
    lines = ["| estimator | noise | norm of the mean | cosine with exact | s |", "|---|---|---|---|---|"]
    for name, row in report["estimators"].items():
        cells = ["-" if row["noise"] is None else f"{row['noise']:.3g}"]
        for figure in ("gradient_norm", "cosine_with_exact"):
            value, error = row[figure], row[f"{figure}_error"]
            cells.append("-" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['seconds']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
