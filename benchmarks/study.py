"""The whole comparison from nothing: a target, its texts, three drafters, and what gains on each.

    python -m benchmarks.study --text DATA/text --prompts DATA/prompts --work runs/study --gpus 4

Target, texts and stage 1 come from bundle.py (``--scale large``), figures from objectives.py: the leading arms with
three seeds on texts that stage 1 has not seen; a few of them for longer, on texts that it has seen, and on drafters
further from their target, one with less room (an MLP of 128) and one that sees nothing of the target but its
embeddings; then every other arm. ``--drafters near`` leaves those two out. What exists is not made again, so a call
that was cut off goes on; ``--budget-seconds`` starts no arm that would end later. ``--set`` goes to bundle.py, and
options that are not listed here to objectives.py. Writes WORK/objectives-DRAFTER-TEXTS-SECONDSs.json for each
comparison, WORK/study.json, and of the pair itself WORK/pair.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from ppow.training.files import write_json

from . import objectives
from .comparison import best_cst, gain, shown
from .machine import check_gpus, on_gpus
from .report import facts, save

DRAFTERS = {  # name -> settings of its stage 1 beside those of the scale
    "near": {},
    "thin": {"intermediate_size": 128},
    "blind": {"intermediate_size": 128, "taps": 0},
}
FEW = "stage1,cst averaged,exact text-rule + 3 lk averaged,lk averaged"
HIGH_RATE = "cst 1e-3 averaged,exact text-rule + 3 lk 1e-3 averaged,lk 1e-3 averaged"
LEADERS = f"{FEW},cst 3e-4,exact text-rule + 3 lk,lk,{HIGH_RATE},ppow"
COMPARISONS = [  # drafter, texts, seconds of an arm, arms (None: all), seeds; in this order
    ("near", "stage2", 45, LEADERS, 3),
    ("near", "stage2", 180, FEW, 1),
    ("near", "train", 45, FEW, 1),
    ("thin", "stage2", 45, FEW, 1),
    ("blind", "stage2", 45, FEW, 1),
    ("near", "stage2", 45, None, 1),
]
MEASURE = ["--batch-size=128", "--train-limit=32000", "--tree-prompts=40", "--tree-nodes=60", "--eval-batch=1200"]


def main(argv=None) -> dict:
    began = time.perf_counter()
    arguments, measuring = parse(argv)
    work = arguments.work
    options = ["--prompts", str(arguments.prompts), "--text", str(arguments.text), "--scale", "large"]
    options += [f"--rows={arguments.rows}", *(f"--set={change}" for change in arguments.set)]
    bundle(work / "near", options, "regenerate", range(arguments.gpus))
    for name in arguments.drafters:
        folder = work / name
        folder.mkdir(exist_ok=True)
        for shared in ("target", "train.jsonl", "stage2.jsonl", "heldout.jsonl"):
            if name != "near" and not (folder / shared).exists():
                (folder / shared).symlink_to(Path("..") / "near" / shared)
    train_drafters(work, arguments.drafters, options, arguments.gpus)
    settings = argparse.Namespace(**{name: str(value) for name, value in vars(arguments).items()})
    save(facts("study", settings, argv) | pair_facts(work, arguments.drafters), work / "pair.json")
    report, failed = {}, []
    for name, texts, seconds, arms, seeds in COMPARISONS:
        if name not in arguments.drafters:
            continue
        output = work / f"objectives-{name}-{texts}-{seconds}s.json"
        left = arguments.budget_seconds - (time.perf_counter() - began)
        chosen = [f"--arms={arms}"] if arms else []
        chosen += [f"--seconds={seconds}", f"--seeds={seeds}", f"--budget-seconds={left}", f"--output={output}"]
        if left > 0:
            try:
                compare(work, name, texts, [*measuring, *chosen])
            except RuntimeError as error:  # of one of several processes; what the others measured is kept
                failed.append(f"{output.name}: {error}")
        report[f"{name}, {texts}, {seconds} s"] = gains(output)
        write_json(work / "study.json", report)
    print(table(report))
    if failed:
        raise RuntimeError("; ".join(failed))
    return report


def parse(argv) -> tuple:
    """-> arguments, options for objectives.py; refuses unfit ones now, not in an hour."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of .jsonl.xz texts, named by group")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of benchmark prompts")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.OPTION=VALUE", help="change one of them")
    parser.add_argument(
        "--drafters", default=",".join(DRAFTERS), help="near, and which of the others; the same until they are trained"
    )
    parser.add_argument("--rows", type=float, default=1.0, help="share of the texts that the target writes anew")
    parser.add_argument("--domains", default="gsm8k,mbpp,humaneval,mt_bench", help="beside held-out chats")
    parser.add_argument("--gpus", type=int, default=1, help="the same in every call for one --work")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no arm that would end later")
    arguments, rest = parser.parse_known_args(argv)
    check_gpus(parser, arguments.gpus)
    chosen = arguments.drafters.split(",")
    if "near" not in chosen or not DRAFTERS.keys() >= set(chosen):
        parser.error(f"--drafters {arguments.drafters}: expected near, and any other of {', '.join(DRAFTERS)}")
    arguments.drafters = [name for name in DRAFTERS if name in chosen]
    own = ("target", "drafter", "data", "arms", "seconds", "seeds", "output", "texts", "part", "prompts-dir")
    for option in rest:
        if option.partition("=")[0].removeprefix("--") in own:
            parser.error(f"{option}: the study says this itself; run benchmarks/objectives.py for one comparison")
    held_out = arguments.work / "near" / "heldout.jsonl"
    measuring = [f"--prompts={arguments.domains},{held_out}", f"--prompts-dir={arguments.prompts}", *MEASURE, *rest]
    measuring += [f"--gpus={arguments.gpus}", f"--texts={arguments.work / 'texts.json'}"]
    objectives.parse([*(f"--{name}=-" for name in ("target", "drafter", "data", "output")), *measuring])
    return arguments, measuring


def bundle(folder: Path, options: list[str], until: str, gpus) -> None:
    command = [sys.executable, "-m", "benchmarks.bundle", "--work", str(folder), "--until", until]
    environment = {**os.environ, **on_gpus(gpus)}
    subprocess.run([*command, f"--gpus={len(gpus)}", *options], check=True, env=environment)


def shares(gpus: int, drafters: int) -> list[list[int]]:
    """GPUs for each of so many stage 1 at a time: one each, and a power of two for the first where there are more."""
    at_once = min(gpus, drafters)
    first = 2 ** int(math.log2(gpus - at_once + 1))
    return [list(range(first)), *([first + i] for i in range(at_once - 1))]


def train_drafters(work: Path, names: list[str], options: list[str], gpus: int) -> None:
    """Stage 1 of these drafters, as many side by side as there are GPUs; each always on the same ones."""
    groups = shares(gpus, len(names))

    def train(name: str, group: list[int]) -> None:
        shape = [f"--set=supervised.{option}={value}" for option, value in DRAFTERS[name].items()]
        bundle(work / name, [*options, *shape], "supervised", group)

    for first in range(0, len(names), len(groups)):
        with ThreadPoolExecutor(len(groups)) as pool:
            list(pool.map(train, names[first : first + len(groups)], groups))


def pair_facts(work: Path, drafters: list[str]) -> dict:
    """What the target became, how many texts there are, and how each stage 1 went, from the files of their own runs."""
    near = work / "near"
    found = {"texts": {}}
    for name in ("train", "stage2", "heldout"):
        # as bytes: a text may hold what str.splitlines takes for an end of line
        with open(near / f"{name}.jsonl", "rb") as lines:
            found["texts"][name] = sum(1 for _ in lines)
    found["target"] = json.loads((near / "target" / "training.json").read_text())["result"]
    return found | {"stage 1": {name: course(work / name / "supervised" / "metrics.jsonl") for name in drafters}}


def course(metrics: Path) -> list[dict]:
    """Of a stage 1, from one measurement on held-out texts to the next: the mean on the texts of its steps, and it.

    ``acceptance_length`` has windows as long as training's, ``eval_acceptance_length`` as long as drafting's.
    """
    spans, rows = [], []
    for row in map(json.loads, metrics.read_text().splitlines()):
        rows.append(row)
        if "eval_acceptance_length" in row:
            span = {"to_step": row["step"], "acceptance_length": mean(r["acceptance_length"] for r in rows)}
            span |= {"first_draft_agreement": mean(r["agreement"][0] for r in rows)}
            span |= {"eval_acceptance_length": row["eval_acceptance_length"]}
            spans.append(span | {"eval_first_draft_agreement": row["eval_agreement"][0]})
            rows = []
    return spans


def compare(work: Path, name: str, texts: str, options: list[str]) -> None:
    """Train and measure arms on one drafter; those that the report holds are not done again."""
    near = work / "near"  # it has what all drafters share
    pair = {"target": near / "target", "drafter": work / name / "supervised", "data": near / f"{texts}.jsonl"}
    objectives.main([*(f"--{name}={path}" for name, path in pair.items()), *options])


def gains(path: Path) -> dict:
    """Of a comparison: {"T=0": {arm: [length, difference to the best CST, low, high]}, "T=1": ..}; {}: there is none.

    An arm of a comparison without CST has its length alone.
    """
    parts, found = json.loads(path.read_text())["parts"] if path.exists() else {}, {}
    for name in [name for name in ("T=0", "T=1") if name in parts]:
        part, control = parts[name], best_cst(parts[name])
        differences = {arm: gain(part, arm, control) if control else () for arm in part["lengths"]}
        found[name] = {arm: [length, *differences[arm]] for arm, length in part["lengths"].items()}
    return found


def table(report: dict) -> str:
    lines = ["| drafter, texts | arm | T=0 | over the best CST | T=1 | over the best CST |", "|---" * 6 + "|"]
    for name, parts in report.items():
        for arm in parts.get("T=0", ()):
            cells = []
            for rows in parts.values():
                length, *difference = rows[arm]
                cells += [f"{length:.3f}", shown(difference) if difference else ""]
            lines.append(f"| {name} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
