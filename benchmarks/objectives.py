"""What makes a stage 2 gain: every objective from one stage-1 drafter, for equal time, on held-out prompts.

    python -m benchmarks.objectives --target TARGET --drafter STAGE1 --data train.jsonl --prompts gsm8k,mt_bench \
        --prompts-dir PROMPTS --seconds 75 --output benchmarks/results/objectives.json

In one process, each arm (a ``ReinforceConfig``) trains its own copy of the drafter for ``--seconds`` of wall time (or
``--steps``), with a learning rate that follows the share of that budget, and is measured. An arm whose result the
output file holds is skipped, and arms come in order of importance, so that ``--budget-seconds`` may cut the list short.
``--gpus N`` deals the arms out to N processes, one on each GPU.

Measured is the acceptance length of chains of ``--window-size`` along the target's own answers to every prompt, greedy
and at temperature 1 (see acceptance.py), and of trees on some of them; comparison.py makes figures of it.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from ppow import PPOWConfig
from ppow.training import supervised
from ppow.training.config import ReinforceConfig, SupervisedConfig
from ppow.training.data import batch_indices, make_batch
from ppow.training.objectives import objective_of
from ppow.training.optimizers import make_optimizer
from ppow.training.preparation import load_examples, pad_token, prepare_drafter
from ppow.training.reinforce import loss
from ppow.training.rollout import roll_out
from ppow.training.target import FrozenTarget

from . import acceptance, comparison
from .controls import gto_rollout
from .machine import check_gpus, on_gpus
from .pairs import load, stage2
from .report import add_output, facts, keep, raw_path, save

STEPS = 1000  # a config's count of steps; an arm on a time budget passes through them as its time passes
WARMUP = 0.03  # share of the budget in which the learning rate rises

_PUBLISHED = {"preset": "published"}
_CST, _LK = {"preset": "cst"}, {"preset": "lk"}
_MUON = {"optimizer": "muon", "learning_rate": 2e-3, "average_from": 0.5}  # as stage 1 ends
# name -> (changes to the defaults of `ppow reinforce`, seeds); the most important first. An arm has its last weights,
# at a rate that falls, unless it says average_from. "exact" is the closed form, "+ 3 lk" the weight of LK's loss beside
# it. "alternated" is no option of `ppow reinforce`: steps of the objective and of CST take turns
ARMS: dict[str, tuple[dict | None, int]] = {
    "stage1": (None, 1),
    "cst 3e-4": (_CST, 3),
    "exact text-rule + 3 lk": ({}, 3),
    "exact text-rule + 3 lk averaged": ({"average_from": 0.5}, 3),  # what `ppow reinforce` does without options
    "ppow": (_PUBLISHED, 3),
    "lk": (_LK, 3),
    "exact text-rule + lk": ({"supervised_coef": 1.0}, 3),
    "exact sampling + 3 lk": ({"verification": "sampling"}, 3),
    "exact greedy + 3 lk": ({"verification": "greedy"}, 1),
    "exact text-rule": ({"supervised_coef": 0.0}, 3),
    "eal": ({"preset": "eal", "learning_rate": 2e-4}, 1),
    "cst 1e-4": ({**_CST, "learning_rate": 1e-4}, 1),
    "cst 1e-3": ({**_CST, "learning_rate": 1e-3}, 3),
    "exact text-rule + 3 lk 1e-3": ({"learning_rate": 1e-3}, 3),
    "lk 1e-3": ({**_LK, "learning_rate": 1e-3}, 3),
    "lk mixed": ({"preset": "lk_mixed"}, 3),
    "d-pace": ({"preset": "d_pace"}, 1),
    "vat": ({"preset": "vat"}, 1),
    "draft-opd": ({"preset": "draft_opd", "learning_rate": 1e-4}, 1),
    "gto": ({"preset": "gto"}, 1),
    "ppow without ADAW": ({**_PUBLISHED, "adaptive_switch": 1.0}, 1),
    "ppow without R_dist": ({**_PUBLISHED, "proximity_bonus": 0.0}, 1),
    "ppow without both": ({**_PUBLISHED, "adaptive_switch": 1.0, "proximity_bonus": 0.0}, 1),
    "ppow without KL": ({**_PUBLISHED, "kl_coef": 0.0}, 1),
    "ppow wide R_dist": ({**_PUBLISHED, "proximity_margin": 25.0}, 3),  # rewards half of the windows rejected at once
    "ppow 2e-4": ({**_PUBLISHED, "learning_rate": 2e-4}, 1),
    "ppow sampling": ({**_PUBLISHED, "verification": "sampling", "rollout_temperature": 1.0}, 1),
    "ppow + supervised": ({**_PUBLISHED, "supervised_coef": 0.5, "kl_coef": 0.0}, 3),
    "ppow + supervised 3e-4": ({**_PUBLISHED, "supervised_coef": 1.0, "kl_coef": 0.0, "learning_rate": 3e-4}, 3),
    "exact text-rule alternated": ({"supervised_coef": 0.0, "alternated": True}, 3),
    "exact text-rule + 3 lk 1e-3 averaged": ({"learning_rate": 1e-3, "average_from": 0.5}, 3),
    "cst averaged": ({**_CST, "average_from": 0.5}, 3),
    "cst 1e-3 averaged": ({**_CST, "learning_rate": 1e-3, "average_from": 0.5}, 3),
    "lk averaged": ({**_LK, "average_from": 0.5}, 3),
    "lk 1e-3 averaged": ({**_LK, "learning_rate": 1e-3, "average_from": 0.5}, 3),
    "exact text-rule + 3 lk 3e-3 averaged": ({"learning_rate": 3e-3, "average_from": 0.5}, 1),
    "cst 3e-3 averaged": ({**_CST, "learning_rate": 3e-3, "average_from": 0.5}, 1),
    "lk 3e-3 averaged": ({**_LK, "learning_rate": 3e-3, "average_from": 0.5}, 1),
    "exact text-rule + 3 lk 1e-4": ({"learning_rate": 1e-4}, 1),
    "exact text-rule + 3 lk 3e-4 averaged": ({"learning_rate": 3e-4, "average_from": 0.5}, 1),
    "exact text-rule + 3 lk averaged mixed": ({"average_from": 0.5, "mixed": True}, 3),
    "cst averaged mixed": ({**_CST, "average_from": 0.5, "mixed": True}, 3),
    "lk averaged mixed": ({**_LK, "average_from": 0.5, "mixed": True}, 3),
    "cst muon": (_CST | _MUON, 3),
    "lk muon": (_LK | _MUON, 3),
    "exact text-rule + 3 lk muon": (_MUON, 3),
    "exact text-rule + 3 lk muon 1e-3": (_MUON | {"learning_rate": 1e-3}, 1),
    "exact text-rule + 3 lk muon 5e-4": (_MUON | {"learning_rate": 5e-4}, 1),
    "exact text-rule muon": (_MUON | {"supervised_coef": 0.0}, 1),
    "exact greedy + 3 lk muon": (_MUON | {"verification": "greedy"}, 1),
    "exact sampling + 3 lk muon": (_MUON | {"verification": "sampling"}, 1),
    "cst muon 100 windows": (_CST | _MUON | {"anchors": 100}, 3),
    "lk muon 100 windows": (_LK | _MUON | {"anchors": 100}, 3),
    "exact text-rule + 3 lk muon 100 windows": (_MUON | {"anchors": 100}, 3),
    "exact sampling + 3 lk muon 100 windows": (_MUON | {"anchors": 100, "verification": "sampling"}, 3),
}
# Arms that train a fresh drafter, by stage 1: (changes to what `ppow train` does at 0.1B, seeds)
_FRESH = {"optimizer": "muon", "learning_rate": 2e-3, "norm_before_fc": True, "norm_output": True}
_FRESH |= {"share_embeddings": True, "average_from": 0.5, "stage": 1}
_TRAIN = {**_FRESH, "learning_rate": 3e-3, "anchors": 100}  # today's choice of `ppow train`
_SHARED = {**_TRAIN, "share_head": True}  # its head neither trained nor stored
_BLOCK = {"architecture": "block", "optimizer": "muon", "learning_rate": 3e-3, "average_from": 0.5, "stage": 1}
ARMS |= {
    "fresh": (_FRESH, 3),
    "fresh adamw": ({**_FRESH, "optimizer": "adamw"}, 2),
    "fresh without norms": ({**_FRESH, "norm_before_fc": False, "norm_output": False}, 2),
    "fresh qk-norm": ({**_FRESH, "qk_norm": True}, 3),
    "fresh mixed": ({**_FRESH, "mixed": True}, 3),  # on --mixed, the same prompts' answers, half of them sampled
    "fresh wide": ({**_FRESH, "intermediate_size": 4608}, 1),
    "fresh 100 windows": ({**_FRESH, "anchors": 100}, 3),
    "fresh 50 windows": ({**_FRESH, "anchors": 50}, 1),
    "fresh 50 windows 4e-3": ({**_FRESH, "anchors": 50, "learning_rate": 4e-3}, 3),
    "fresh 50 windows 4e-3 qk-norm": ({**_FRESH, "anchors": 50, "learning_rate": 4e-3, "qk_norm": True}, 3),
    "fresh 50 windows 8e-3": ({**_FRESH, "anchors": 50, "learning_rate": 8e-3}, 1),
    "fresh 1e-3": ({**_FRESH, "learning_rate": 1e-3}, 1),
    "fresh 4e-3": ({**_FRESH, "learning_rate": 4e-3}, 3),
    "fresh train": (_TRAIN, 3),
    "fresh train wide": ({**_TRAIN, "intermediate_size": 4608}, 3),
    "fresh shared head": (_SHARED, 3),
    "fresh shared head wide": ({**_SHARED, "intermediate_size": 4608}, 3),
    "fresh shared head 24k": ({**_SHARED, "draft_vocab_size": 24576}, 3),
    "fresh shared head wide 24k": ({**_SHARED, "intermediate_size": 4608, "draft_vocab_size": 24576}, 3),
    "fresh block": (_BLOCK, 3),  # DSpark's loss, three layers, 64 windows of a text
    "fresh block decay": ({**_BLOCK, "block_loss": "ce"}, 3),
    "fresh block kl": ({**_BLOCK, "block_loss": "kl"}, 3),
    "fresh block d-pace": ({**_BLOCK, "block_loss": "d_pace"}, 3),
    "fresh block deep": ({**_BLOCK, "num_layers": 5}, 3),
    "fresh block shallow": ({**_BLOCK, "num_layers": 2}, 3),
    "fresh block 32 windows": ({**_BLOCK, "anchors": 32}, 3),
    "fresh block 6e-3": ({**_BLOCK, "learning_rate": 6e-3}, 3),
    "fresh block of 8": ({**_BLOCK, "block_size": 8}, 1),
    "fresh block without markov": ({**_BLOCK, "markov_rank": 0}, 1),
}
# Arms that continue stage 1 of the given block drafter by one of its own losses, as "cst muon" does by kl
_CONTINUED = {**_MUON, "stage": 1, "continued": True}
ARMS |= {f"cst {loss} muon": ({**_CONTINUED, "block_loss": loss}, 3) for loss in ("ce", "d_pace", "dspark")}


def main(argv=None) -> dict:
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.cost_ratio is None and PPOWConfig.from_pretrained(arguments.drafter).is_block:
        arguments.cost_ratio = 0.0  # a block costs the same however much of it is accepted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape for some 40 ms
    texts = acceptance.kept_texts(arguments, lambda: answers(arguments, device))
    report = opened(arguments, argv, texts)
    if arguments.gpus > 1:
        share(arguments, argv, texts, report, started)
    else:
        run(arguments, device, texts, report, started)
    if not arguments.part:
        report["wall_seconds"] = time.perf_counter() - started
        print(comparison.table(save(report, arguments.output)))
    return report


def run(arguments, device: str, texts: dict, report: dict, started: float) -> None:
    """Train and measure the arms that the report lacks, one after the other."""
    check_arms(report, arguments)
    todo = [arm for arm in arm_list(arguments) if arm[0] not in report["arms"]]
    if not todo:
        return
    tokenizer, target, drafter = load(arguments, device)
    pad, lasted = pad_token(tokenizer), 0.0 if arguments.steps else arguments.seconds
    base = make_config(arguments, {}, 0)

    @functools.cache
    def examples(data: str) -> list:
        return load_examples(base, data, tokenizer, base.window_size, answer=base.window_size)

    for key, changes, seed in todo:
        if time.perf_counter() - started + lasted > arguments.budget_seconds:
            print(f"stopped before {key}: the next arm would not end within {arguments.budget_seconds:.0f} s")
            break
        began = time.perf_counter()
        trained, row = copy.deepcopy(drafter), {"seed": seed, "changes": changes}
        config = None if changes is None else make_config(arguments, changes, seed)
        if isinstance(config, SupervisedConfig):
            torch.manual_seed(seed)
            trained = prepare_drafter(config, target.model, examples(config.data)).to(device)
        target.taps = trained.config.target_taps
        if config is not None:
            row["config"] = recipe(config)
            of_arm = functools.partial(train, config, target=target, examples=examples(config.data), pad=pad)
            of_arm = functools.partial(of_arm, alternated=changes.get("alternated", False))
            if device == "cuda":  # the first steps are slow, and no arm shall pay for them, or for compiling
                of_arm(argparse.Namespace(**{**vars(arguments), "steps": 3}), drafter=copy.deepcopy(trained))
            row |= of_arm(arguments, drafter=trained)
        if arguments.drafters:
            trained.save_pretrained(arguments.drafters / key.replace("/", "-").replace(" ", "_"))
        trees = arguments.tree_prompts > 0 and key.endswith("/0")  # one seed of each arm
        row["results"] = acceptance.measure(target, trained, texts, arguments, pad, trees)
        report["arms"][key] = row
        lasted = max(lasted, time.perf_counter() - began)
        tokens = {name: sum(text["tokens"]) for name, text in texts.items()}
        figures = {name: f"{tokens[name] / sum(found['chain']):.3f}" for name, found in row["results"].items()}
        print(f"{time.perf_counter() - started:6.0f} s  {key}: {row.get('steps', 0)} steps, {figures}", flush=True)
        keep(report, arguments.output)


def share(arguments, argv: list[str], texts: dict, report: dict, started: float) -> None:
    """Deal the arms that the report lacks out to ``gpus`` processes, each on its GPU, and collect what they found.

    A process that fails stops none of the others; what was measured is kept, and a new call goes on from there.

    Raises:
        RuntimeError: when a process failed.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first process has this GPU
    parts = [arguments.output.with_name(f".{arguments.output.stem}-{i}.json") for i in range(arguments.gpus)]
    check_arms(report, arguments)
    collect(report, parts, arguments)  # of a call that was cut off
    todo = [key for key, _, _ in arm_list(arguments) if key not in report["arms"]]
    children = []
    with tempfile.TemporaryDirectory() as folder:
        held = arguments.texts or Path(folder) / "texts.json"
        if not held.exists():
            acceptance.keep_texts(held, arguments, texts)
        left = arguments.budget_seconds - (time.perf_counter() - started)
        # a parent that is terminated takes its children along: `finally` sees SystemExit, but no signal
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            for i, part in enumerate(parts[: len(todo)]):
                own = [f"--texts={held}", f"--part={','.join(todo[i :: arguments.gpus])}"]
                own += ["--gpus=1", f"--output={part}", f"--budget-seconds={left}"]
                command = [sys.executable, "-m", "benchmarks.objectives", *argv, *own]
                children.append(subprocess.Popen(command, env={**os.environ, **on_gpus([i])}))
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.terminate()
            signal.signal(signal.SIGTERM, before)
    collect(report, parts, arguments)
    if any(codes):
        raise RuntimeError(f"Of {len(codes)} processes some failed (exit status {codes}); see their output above.")


def collect(report: dict, parts: list[Path], arguments) -> None:
    """Move the arms that the parts hold into the report and its file, in the order of the list."""
    found = report["arms"]
    for part in parts:
        if raw_path(part).exists():
            held = json.loads(raw_path(part).read_text())
            check_same(held, report, part)
            found |= held["arms"]
    order = [key for key, _, _ in arm_list(arguments)]
    report["arms"] = {
        key: found[key] for key in sorted(found, key=lambda k: order.index(k) if k in order else len(order))
    }
    keep(report, arguments.output)
    for part in parts:
        raw_path(part).unlink(missing_ok=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True, help="the stage-1 drafter that every arm starts from")
    parser.add_argument("--data", required=True, help=".jsonl of the target's own answers, for training")
    parser.add_argument("--prompts", required=True, help="comma separated benchmarks or .jsonl files, one domain each")
    parser.add_argument("--prompts-dir")
    parser.add_argument("--limit", type=int, default=300, help="prompts per domain")
    parser.add_argument("--seconds", type=float, default=75.0, help="training time of an arm")
    parser.add_argument("--steps", type=int, help="instead: optimizer steps of an arm")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no arm that would end later")
    parser.add_argument("--arms", help="comma separated names of arms; none: all of stage 2")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many seeds for the leading arms")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step")
    parser.add_argument("--mixed", help="answers, half of them sampled, for the arms that learn from such a mix")
    parser.add_argument("--draft-vocab-size", type=int, help="of fresh drafters; none: all")
    parser.add_argument("--train-limit", type=int, help="read at most so many training texts")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a training text that are kept")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--window-size", type=int, default=10)
    parser.add_argument("--cost-ratio", type=float, help="gamma of the rewards; none: the paper's, of a block 0")
    parser.add_argument("--compile-loss", action="store_true", help="of every arm, on a GPU")
    parser.add_argument("--tree-prompts", type=int, default=64, help="prompts per domain decoded with a tree; 0: none")
    parser.add_argument("--tree-nodes", default="60,16,8,4", help="comma separated sizes of the trees")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--bootstrap", type=int, default=2000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    parser.add_argument(
        "--texts", type=Path, help="file of the target's answers to the prompts, for several comparisons"
    )
    parser.add_argument("--drafters", type=Path, help="folder that keeps every arm's drafter, in float32")
    parser.add_argument("--gpus", type=int, default=1, help="processes that share the arms, one on each GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the arms of such a process
    arguments = parser.parse_args(argv)
    check_gpus(parser, arguments.gpus)
    if arguments.gpus > 1 and not arguments.output:
        parser.error("--gpus collects the arms in a file: give --output")
    unknown = set(arguments.arms.split(",")) - set(ARMS) if arguments.arms else None
    if unknown:
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    return arguments


def answers(arguments, device: str) -> dict:
    tokenizer, target, _ = load(arguments, device)
    return acceptance.write_texts(target.model, tokenizer, arguments, pad_token(tokenizer))


def make_config(arguments, changes: dict, seed: int) -> ReinforceConfig | SupervisedConfig:
    """What an arm trains by: `ppow reinforce` with last weights at a rate that falls, or stage 1, and its changes.

    Raises:
        ValueError: an arm that needs an option which is not given.
    """
    own = {name: value for name, value in changes.items() if name not in ("stage", "mixed", "continued", "alternated")}
    data = arguments.mixed if "mixed" in changes else arguments.data
    if data is None:
        raise ValueError("This arm learns from a file of which half of the answers are sampled: name it with --mixed.")
    if changes.get("stage") == 1:
        names = ("target", "batch_size", "max_length", "dtype", "compile_loss")
        shared = {name: getattr(arguments, name) for name in names}
        shared |= {"data": data, "output_dir": "-", "steps": STEPS}
        if "continued" in changes:
            shared["drafter"] = arguments.drafter
        elif "architecture" not in own:
            shared["draft_vocab_size"] = arguments.draft_vocab_size
        return SupervisedConfig.from_dict({**shared, "limit": arguments.train_limit, "seed": seed, **own})
    shared = {
        "steps": STEPS,
        "batch_size": arguments.batch_size,
        "limit": arguments.train_limit,
        "drop_long": True,
        "max_forest_nodes": arguments.batch_size * 8 * 8 * arguments.window_size,  # every rollout in one forward
        "average_from": 1.0,
        "compile_loss": arguments.compile_loss,
        "seed": seed,
    }
    if arguments.cost_ratio is not None:
        shared["cost_ratio"] = arguments.cost_ratio
    return stage2(arguments, **shared | {"data": data} | own)


def arm_list(arguments) -> list[tuple[str, dict | None, int]]:
    """(key, changes, seed) in the order to run: first every arm once, then further seeds of the leading ones.

    Without ``--arms`` all of stage 2, of those that want ``--mixed`` only where that is given.
    """
    left_out = {"stage"} if arguments.mixed else {"stage", "mixed"}
    every = (name for name, (changes, _) in ARMS.items() if not left_out & set(changes or ()))
    chosen = {name: ARMS[name] for name in (arguments.arms.split(",") if arguments.arms else every)}
    rounds = max(seeds for _, seeds in chosen.values())
    arms = [
        (f"{name}/{seed}", changes, arguments.seed + seed)
        for seed in range(min(rounds, arguments.seeds))
        for name, (changes, seeds) in chosen.items()
        if seed < seeds
    ]
    part = arguments.part and set(arguments.part.split(","))
    return [arm for arm in arms if not part or arm[0] in part]


# -- training ----------------------------------------------------------------------------------------------------------


def train(
    config: ReinforceConfig | SupervisedConfig,
    arguments,
    target: FrozenTarget,
    drafter,
    examples: list,
    pad: int,
    alternated: bool = False,
) -> dict:
    """Train ``drafter`` in place for the arm's time or steps: -> what was spent, and the curves."""
    device, cuda = drafter.device, drafter.device.type == "cuda"
    torch.manual_seed(config.seed)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    drafter.train()
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = make_optimizer(config, drafter)
    turns = [config, dataclasses.replace(config, objective="cst", supervised_coef=0.0)] if alternated else [config]
    roll = roll_out
    if getattr(config, "objective", None) == "gto":  # rewards what a tree gains over that of the drafter as it starts
        reference = copy.deepcopy(drafter).eval().requires_grad_(False)
        roll = functools.partial(gto_rollout, reference=reference)
    mean = AveragedModel(drafter) if config.average_from < 1 else None
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
    curve, step, tokens = [], 0, 0
    began = time.perf_counter()
    while True:
        spent = time.perf_counter() - began
        progress = step / arguments.steps if arguments.steps else spent / arguments.seconds
        if progress >= 1:
            break
        falling = 1 if mean is not None else 0.5 * (1 + math.cos(math.pi * progress))
        rate = config.learning_rate * min(1, progress / WARMUP, falling)
        turn = turns[step % len(turns)]
        virtual = 1 + int(progress * STEPS)  # for the switch of ADAW
        step += 1
        chosen = batch_indices(len(examples), config.batch_size, config.seed, step - 1)
        seed = (config.seed * 1_000_003 + step) & 0x7FFFFFFF
        batch = make_batch([examples[i] for i in chosen], pad, device, seed)
        tokens += sum(len(examples[i].input_ids) for i in chosen)
        metrics, rollout = {}, None
        with autocast:
            if isinstance(turn, SupervisedConfig):
                value, found = supervised.loss_of(turn, target, drafter, batch)
            else:
                if objective_of(turn).batch == "rollouts":
                    rollout, metrics = roll(turn, target, drafter, batch=batch, step=virtual)
                value, found = loss(turn, target, drafter, batch, rollout)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-12)
        optimizer.step()
        if mean is not None and progress >= config.average_from:
            mean.update_parameters(drafter)
        if step <= 3 or step % 20 == 0:  # reading numbers waits for the device, so not at every step
            if not torch.isfinite(norm):
                raise ValueError(f"Step {step}: the gradient is not finite; lower this arm's learning rate.")
            numbers = {"loss": value.detach(), "gradient_norm": norm, **metrics, **found}
            curve.append({"step": step, "seconds": round(time.perf_counter() - began, 3)})
            curve[-1] |= {k: round(float(v), 5) for k, v in numbers.items() if v.numel() == 1}
    if mean is not None:
        if not mean.n_averaged:
            raise ValueError(f"No step fell into the time in which weights are averaged, of {step}; give more time.")
        drafter.load_state_dict(mean.module.state_dict())
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    spent = time.perf_counter() - began
    return {"steps": step, "seconds": spent, "tokens": tokens, "peak_memory_gib": peak, "curve": curve}


# -- what is there already ---------------------------------------------------------------------------------------------


def opened(arguments, argv: list[str], texts: dict) -> dict:
    """The raw report to add to: a new one, or that of the output file when it rests on the same texts."""
    free = (
        "output",
        "arms",
        "seeds",
        "budget_seconds",
        "bootstrap",
        "texts",
        "gpus",
        "part",
        "drafters",
    )  # they change no arm
    new = facts("objectives", arguments, argv, free) | {"bootstrap": arguments.bootstrap}
    mark = zlib.crc32(json.dumps([text["ids"] for text in texts.values()]).encode())
    if arguments.output and raw_path(arguments.output).exists():
        report = json.loads(raw_path(arguments.output).read_text())
        check_same(report, {"settings": new["settings"], "texts_crc32": mark}, raw_path(arguments.output))
        return report | {name: new[name] for name in ("command", "bootstrap")}
    return new | {
        "texts_crc32": mark,
        "texts": {name: {k: v for k, v in text.items() if k != "ids"} for name, text in texts.items()},
        "arms": {},
    }


def recipe(config: ReinforceConfig) -> dict:
    """What an arm's config says of the training itself."""
    return config.to_dict(without={"target", "drafter", "data"})


def check_arms(report: dict, arguments) -> None:
    """Refuse to add to a report whose arms, by the same names, were trained with other settings."""
    for key, changes, seed in arm_list(arguments):
        held = report["arms"].get(key, {})
        if "config" in held and held["config"] != recipe(make_config(arguments, changes, seed)):
            raise ValueError(f"The report's {key} was trained with another recipe; give another --output.")


def check_same(held: dict, wanted: dict, path: Path) -> None:
    """Refuse to add to, or to take from, what was measured with other settings or on other texts."""
    if any(held[name] != wanted[name] for name in ("settings", "texts_crc32")):
        raise ValueError(f"{path} holds arms measured with other settings or on other texts; give another --output.")


if __name__ == "__main__":
    main()
