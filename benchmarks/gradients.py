"""How noisy the gradients of PPOW's estimators are, and where their means point: what a step of stage 2 has to go by.

    python -m benchmarks.gradients --target bundled/target --drafter bundled/stage1 --data answers.jsonl \
        --output benchmarks/results/gradients.json

All estimators take the gradient of one expected reward, over the same texts and (seed by seed) the same windows, drawn
uniformly, at rollout temperature 1, without anchor, proximity reward, supervised term or division by the deviation:

* ``exact``: the closed form along the target's own text;
* ``rollout``: groups of 8 rollouts, the group's mean as baseline (as published);
* ``rollout, credit by token``: the same rollouts, each token compared with those that got as far;
* ``rollout, groups of 2``: four times the windows, a quarter of the group, so as many rollouts.

Figures: noise = E |g - E g|^2 over |E g|^2, that is how many steps must be averaged until signal and noise are of one
size; cosine of the estimator's mean gradient with that of ``exact``; seconds of a gradient on this machine. Data are
the target's own answers: greedy ones for --verification greedy, sampled ones at temperature 1 for sampling.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ppow.training.config import ReinforceConfig
from ppow.training.data import batch_indices
from ppow.training.loop import make_batch
from ppow.training.reinforce import loss
from ppow.training.rollout import roll_out
from ppow.training.supervised import load_examples, pad_token
from ppow.training.target import FrozenTarget

from .decoding import facts, save
from .objectives import load

ESTIMATORS = {
    "exact": {"estimator": "exact"},
    "rollout": {"estimator": "rollout"},
    "rollout, credit by token": {"estimator": "rollout", "credit": "token"},
    "rollout, groups of 2": {"estimator": "rollout", "group_size": 2},
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
    reference = torch.stack(found["exact"][0]).mean(0, dtype=torch.float64)
    report = facts(arguments, device=device, texts=len(examples)) | {
        "estimators": {name: figures(torch.stack(g), seconds, reference) for name, (g, seconds) in found.items()},
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
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error(f"--seeds {arguments.seeds}: noise shows between at least 2 gradients")
    return arguments


def make_config(arguments, changes: dict) -> ReinforceConfig:
    group = changes.get("group_size", 8)
    shared = {
        "target": arguments.target,
        "drafter": arguments.drafter,
        "data": arguments.data,
        "output_dir": "-",
        "verification": arguments.verification,
        "window_size": arguments.window_size,
        "windows_per_sequence": arguments.windows * 8 // group,
        "all_windows": False,
        "adaptive_switch": 1.0,
        "rollout_temperature": 1.0,
        "proximity_bonus": 0.0,
        "normalize_advantages": False,
        "supervised_coef": 0.0,
        "kl_coef": 0.0,
        "max_length": arguments.max_length,
        "drop_long": True,
        "dtype": arguments.dtype,
    }
    return ReinforceConfig(**(shared | changes))


def gradient(config: ReinforceConfig, target: FrozenTarget, drafter, batch) -> torch.Tensor:
    """The gradient of one batch with respect to all that is trained, on the host: (parameters,) float32."""
    rollout = None
    if config.estimator == "rollout":
        rollout, _ = roll_out(config, target, drafter, batch, step=1)
    drafter.zero_grad(set_to_none=True)
    loss(config, target, drafter, 1, batch, rollout)[0].backward()
    parts = [p.grad for p in drafter.parameters() if p.requires_grad]
    by_window = rollout is not None and config.credit == "window"
    # a group's mean holds the rollout itself, which makes the expected gradient shorter by (G - 1) / G
    scale = config.group_size / (config.group_size - 1) if by_window else 1.0
    return scale * torch.cat([part.flatten() for part in parts]).float().cpu()


def figures(gradients: torch.Tensor, seconds: list[float], reference: torch.Tensor) -> dict:
    """Noise, direction and cost of gradients (seeds, parameters)."""
    count, mean = len(gradients), gradients.mean(0, dtype=torch.float64)
    spread = sum(float((one - mean).square().sum()) for one in gradients) / (count - 1)  # E |g - E g|^2
    signal = float(mean.square().sum()) - spread / count  # |E g|^2 without what noise adds to it
    return {
        "noise": spread / signal if signal > 0 else None,  # None: the signal drowns in so few seeds
        "gradient_norm": signal**0.5 if signal > 0 else None,
        "cosine_with_exact": float(torch.nn.functional.cosine_similarity(mean, reference.double(), dim=0)),
        "seconds": statistics.median(seconds),
    }


def table(report: dict) -> str:
    lines = ["| estimator | noise | norm of the mean | cosine with exact | s |", "|---|---|---|---|---|"]
    for name, row in report["estimators"].items():
        noise, norm = (f"{value:.3g}" if value is not None else "-" for value in (row["noise"], row["gradient_norm"]))
        lines.append(f"| {name} | {noise} | {norm} | {row['cosine_with_exact']:.3f} | {row['seconds']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
