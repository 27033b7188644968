"""How stage 2 grows with the GPUs: rollouts per second of `ppow reinforce` on one process and on several.

    python -m benchmarks.scaling --shape llama-3.1-8b --batch-size 4 --max-length 1024 --output \
        benchmarks/results/scaling-llama-3.1-8b.json
    python -m benchmarks.scaling --target TARGET --drafter STAGE1 --data train.jsonl --processes 1,2

With `--shape` target and drafter have the shapes of a known pair and random weights, and the texts are random letters
that fill `--max-length`, half of them prompt. Every process takes the same number of texts in a step, so N processes
verify N times the rollouts and average their gradients. The runs follow one another; a step's time is what the run's
own metrics say, the median over the steps behind the first ``--warmup``.
"""

import argparse
import json
import os
import random
import statistics
import string
import tempfile
from pathlib import Path

import torch

from ppow.training.config import ReinforceConfig

from .bundle import ppow
from .corpus import train_tokenizer
from .pairs import SHAPES, random_pair
from .report import add_output, facts, save


def main(argv=None) -> dict:
    arguments = parse(argv)
    report = facts("scaling", arguments, argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            make_random(arguments, Path(folder))
        report["runs"] = [run(arguments, processes) for processes in arguments.processes]
    first = report["runs"][0]["rollouts_per_second"]
    for row in report["runs"]:
        row["speedup"] = row["rollouts_per_second"] / first
        print("{processes} processes: {rollouts_per_second:.0f} rollouts/s, {speedup:.2f}x".format(**row))
    save(report, arguments.output)
    return report


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, and random texts")
    parser.add_argument("--target", help="a real target instead, with --drafter and --data")
    parser.add_argument("--drafter")
    parser.add_argument("--data")
    numbers = {"type": lambda text: [int(number) for number in text.split(",")], "default": [1, 2]}
    parser.add_argument("--processes", help="comma separated numbers of processes, one GPU each", **numbers)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20, help="first steps that do not count")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step and process")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--limit", type=int, default=4000, help="texts to read")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    arguments = parser.parse_args(argv)
    pair = arguments.target, arguments.drafter, arguments.data
    if any(pair) if arguments.shape else not all(pair):
        parser.error("give --shape, or --target, --drafter and --data")
    if arguments.warmup >= arguments.steps - 1:
        parser.error(f"--warmup {arguments.warmup} leaves fewer than two of {arguments.steps} steps to measure")
    return arguments


def make_random(arguments, folder: Path) -> None:
    """A pair of the shape in ``folder`` and texts for it; the arguments then name them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    target, drafter = random_pair(arguments.shape, device, getattr(torch, arguments.dtype))
    arguments.target, arguments.drafter = str(folder / "target"), str(folder / "stage1")
    target.save_pretrained(arguments.target)
    drafter.save_pretrained(arguments.drafter)
    del target, drafter
    if device == "cuda":
        torch.cuda.empty_cache()  # the runs need the memory
    draw = random.Random(arguments.seed)
    half, rows = arguments.max_length // 2, []
    for _ in range(8 * arguments.batch_size * max(arguments.processes)):
        # a letter is a token, and the chat template takes some twenty
        prompt, answer = ("".join(draw.choices(string.ascii_letters, k=k)) for k in (max(1, half - 20), half))
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
    # of single bytes and the special tokens, since merged letters would make texts short
    train_tokenizer(rows[:1], 260, arguments.max_length).save_pretrained(arguments.target)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments.data = str(data)


def run(arguments, processes: int) -> dict:
    """One run of the command on so many processes: -> rollouts per second, and seconds of its steps."""
    names = ("target", "drafter", "data", "steps", "batch_size", "max_length", "limit", "dtype", "seed")
    with tempfile.TemporaryDirectory() as folder:
        options = {name: getattr(arguments, name) for name in names}
        options |= {"output_dir": folder, "preset": "published", "drop_long": True, "log_every": 1}
        recipe = ReinforceConfig.from_dict(options)
        nodes = recipe.windows_per_sequence * recipe.group_size * recipe.window_size
        options["max_forest_nodes"] = arguments.batch_size * nodes  # all rollouts of a step in one forward
        # as many for one process as for several, which torch would give a single thread each
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, os.cpu_count() // max(arguments.processes)))
        ppow("reinforce", processes=processes, environment={"OMP_NUM_THREADS": threads}, **options)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    lines = lines[arguments.warmup :]
    seconds = [line["seconds"] for line in lines]
    windows = processes * statistics.fmean(line["windows"] for line in lines)  # the metric is a mean over processes
    median = statistics.median(seconds)
    return {
        "processes": processes,
        "threads": int(threads),
        "rollouts_per_step": windows * recipe.group_size,
        "rollouts_per_second": windows * recipe.group_size / median,
        "seconds_per_step": median,
        "seconds_per_step_quartiles": statistics.quantiles(seconds, n=4),
    }


if __name__ == "__main__":
    main()
