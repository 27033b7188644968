"""What makes a stage 2 gain: every objective from one stage-1 drafter, for equal time, on held-out prompts.

    python -m benchmarks.objectives --target TARGET --drafter STAGE1 --data train.jsonl --prompts gsm8k,mt_bench \
        --prompts-dir PROMPTS --seconds 75 --output benchmarks/results/objectives.json

In one process, each arm (a ``ReinforceConfig``) trains its own copy of the drafter for ``--seconds`` of wall time (or
``--steps``), with a learning rate that follows the share of that budget, and is measured. An arm whose result the
output file holds is skipped, and arms come in order of importance, so that ``--budget-seconds`` may cut the list short.
``--gpus N`` deals the arms out to N processes, one on each GPU.

Measuring (chain of ``--window-size``): the target answers every prompt once, greedily and at temperature 1. Speculative
decoding is lossless, so those texts are what decoding with any drafter could have written, and acceptance can be read
along them, all positions in one batched pass. Greedy: a draft stands when it is the text's token. Sampling: given that
the text's token is x, the draft was accepted with probability min(1, Q(x) / P(x)), independently at every position,
which is the exact law of accepted lengths given the text. The number of verifications that a text takes follows by
recursion over its positions (in expectation at temperature 1, so the coins add no noise). A tree is measured by really
decoding with it, in batches.

Figures: acceptance length = tokens gained / verifications, pooled, bonus included. Intervals are 95% percentile
bootstrap over prompts, of the difference to the best ``cst`` arm on the same texts. Texts that end in an exact loop are
counted, and the others are reported apart.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer, GenerationConfig

from ppow import PPOWDrafter
from ppow.target_ppow import check_pair
from ppow.training.config import ReinforceConfig
from ppow.training.data import batch_indices
from ppow.training.evaluate import ends_in_a_loop
from ppow.training.files import write_json
from ppow.training.loop import make_batch
from ppow.training.objectives import objective_of
from ppow.training.prompts import load_prompts
from ppow.training.provenance import hardware, versions
from ppow.training.reinforce import frozen_reference, loss
from ppow.training.rollout import roll_out
from ppow.training.supervised import freeze_embedding, load_examples, pad_token
from ppow.training.target import FrozenTarget, log_norm
from ppow.training.unrolled import Unrolled

from .bundle import check_gpus, on_gpu
from .decoding import save

STEPS = 1000  # a config's count of steps; an arm on a time budget passes through them as its time passes
WARMUP = 0.03  # share of the budget in which the learning rate rises
TREE = {"tree_depth": 7, "tree_top_k": 10}

_ROLLOUT = {"estimator": "rollout"}  # PPOW as published, with the defaults of `ppow reinforce` for rollouts
# the closed form alone: windows drawn as for rollouts, the anchor, no supervised term
_ALONE = {"windows_per_sequence": 32, "all_windows": False, "supervised_coef": 0.0, "kl_coef": 0.1}
_ALONE |= {"learning_rate": 2e-4}
_LK = {"supervised_loss": "lk"}
_GREEDY = {**_ALONE, "verification": "greedy"}
# name -> (changes to the defaults of ReinforceConfig, seeds); the most important first
ARMS = {
    "stage1": (None, 1),
    "cst 3e-4": ({"objective": "cst"}, 3),
    "exact text-rule + supervised": ({}, 3),  # what `ppow reinforce` does without options
    "ppow": (_ROLLOUT, 3),
    "lk": ({"objective": "lk"}, 3),
    "exact text-rule + supervised sharp": ({"rollout_temperature": 0.5}, 3),
    "exact text-rule + lk": (_LK, 3),
    "exact text-rule + 3 lk": ({**_LK, "supervised_coef": 3.0}, 3),
    "exact text-rule + 3 supervised": ({"supervised_coef": 3.0}, 1),
    "exact sampling + 3 lk": ({"verification": "sampling", **_LK, "supervised_coef": 3.0}, 3),
    "exact greedy 2e-4": (_GREEDY, 3),
    "exact text-rule 2e-4": (_ALONE, 3),
    "eal": ({"objective": "eal", "learning_rate": 2e-4}, 1),
    "cst 1e-4": ({"objective": "cst", "learning_rate": 1e-4}, 1),
    "cst 1e-3": ({"objective": "cst", "learning_rate": 1e-3}, 1),
    "exact sampling 2e-4": ({**_ALONE, "verification": "sampling"}, 1),
    "exact greedy + supervised": ({"verification": "greedy", "supervised_coef": 0.5}, 1),
    "exact text-rule + supervised 1e-4": ({"learning_rate": 1e-4}, 1),
    "exact text-rule + supervised 1e-3": ({"learning_rate": 1e-3}, 1),
    "exact text-rule + half supervised": ({"supervised_coef": 0.5}, 1),
    "exact greedy 5e-5": ({**_GREEDY, "learning_rate": 5e-5}, 1),
    "exact greedy 5e-4": ({**_GREEDY, "learning_rate": 5e-4}, 1),
    "exact tree": ({**_ALONE, "verification": "tree"}, 1),
    "lk mixed": ({"objective": "lk_mixed"}, 1),
    "d-pace": ({"objective": "d_pace"}, 1),
    "vat": ({"objective": "vat"}, 1),
    "eal sampling": ({"objective": "eal", "verification": "sampling", "learning_rate": 2e-4}, 1),
    "eal sampling + lk": ({"objective": "eal", "verification": "sampling", "supervised_coef": 1.0, **_LK}, 1),
    "eal + kl": ({"objective": "eal", "supervised_coef": 1.0, "learning_rate": 2e-4}, 1),
    "draft-opd": ({"objective": "draft_opd", "learning_rate": 1e-4, "proximity_bonus": 0.0}, 1),
    "gto": ({"objective": "gto", "proximity_bonus": 0.0}, 1),
    "ppow without ADAW": ({**_ROLLOUT, "adaptive_switch": 1.0}, 1),
    "ppow without R_dist": ({**_ROLLOUT, "proximity_bonus": 0.0}, 1),
    "ppow without both": ({**_ROLLOUT, "adaptive_switch": 1.0, "proximity_bonus": 0.0}, 1),
    "ppow without KL": ({**_ROLLOUT, "kl_coef": 0.0}, 1),
    "ppow credit by token": ({**_ROLLOUT, "credit": "token"}, 1),
    "ppow groups of 2": ({**_ROLLOUT, "credit": "token", "group_size": 2, "windows_per_sequence": 32}, 1),
    "ppow wide R_dist": ({**_ROLLOUT, "proximity_margin": 25.0}, 1),  # rewards half of the windows rejected at once
    "ppow 2e-5": ({**_ROLLOUT, "learning_rate": 2e-5}, 1),
    "ppow throughput reward": ({**_ROLLOUT, "reward": "throughput", "proximity_bonus": 0.25}, 1),
    "ppow sampling": ({**_ROLLOUT, "verification": "sampling", "rollout_temperature": 1.0}, 1),
    "ppow + supervised": ({**_ROLLOUT, "supervised_coef": 0.5, "kl_coef": 0.0}, 1),
    "exact without ADAW": ({**_GREEDY, "adaptive_switch": 1.0}, 1),
    "exact without KL": ({**_GREEDY, "kl_coef": 0.0}, 1),
    "exact throughput reward": ({"reward": "throughput", "proximity_bonus": 0.25}, 1),
}


def main(argv=None) -> dict:
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape for some 40 ms: see README.md
    texts = read_texts(arguments, device)
    report = opened(arguments, texts)
    if arguments.gpus > 1:
        share(arguments, argv, texts, report, started)
    else:
        run(arguments, device, texts, report, started)
    if arguments.part:
        return report
    report["summary"] = summarize(report, arguments.bootstrap)
    report["wall_seconds"] = time.perf_counter() - started
    save(report, arguments.output)
    print(table(report))
    if arguments.output:
        plot(report, arguments.output.with_suffix(".png"))
    return report


def run(arguments, device: str, texts: dict, report: dict, started: float) -> None:
    """Train and measure the arms that the report lacks, one after the other."""
    todo = [arm for arm in arm_list(arguments) if arm[0] not in report["arms"]]
    if not todo:
        return
    tokenizer, target, drafter = load(arguments, device)
    pad, lasted = pad_token(tokenizer), 0.0
    base = make_config(arguments, {}, 0)
    examples = load_examples(base, arguments.data, tokenizer, base.window_size, answer=base.window_size)
    if device == "cuda":  # the first steps on a device are slow, and no arm shall pay for them
        short = argparse.Namespace(**{**vars(arguments), "steps": 3})
        for name in ("cst 3e-4", "ppow"):
            warmed = make_config(arguments, ARMS[name][0], 0)
            train(warmed, short, target, copy.deepcopy(drafter), examples, pad)
    for key, changes, seed in todo:
        if time.perf_counter() - started + lasted > arguments.budget_seconds:
            print(f"stopped before {key}: the next arm would not end within {arguments.budget_seconds:.0f} s")
            break
        began = time.perf_counter()
        trained, row = copy.deepcopy(drafter), {"seed": seed, "changes": changes}
        if changes is not None:
            row |= train(make_config(arguments, changes, seed), arguments, target, trained, examples, pad)
        trees = arguments.tree_prompts > 0 and key.endswith("/0")  # one seed of each arm
        row["results"] = measure(target, trained, texts, arguments, pad, trees)
        report["arms"][key] = row
        lasted = max(lasted, time.perf_counter() - began)
        figures = {name: f"{float(numpy.sum(texts[name]['tokens']) / numpy.sum(v)):.3f}" for name, v in shown(row)}
        print(f"{time.perf_counter() - started:6.0f} s  {key}: {row.get('steps', 0)} steps, {figures}", flush=True)
        save(report, arguments.output)


def share(arguments, argv: list[str], texts: dict, report: dict, started: float) -> None:
    """Deal the arms that the report lacks out to ``gpus`` processes, each on its GPU, and collect what they found.

    A process that fails stops none of the others; what was measured is kept, and a new call goes on from there.

    Raises:
        RuntimeError: when a process failed.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first process has this GPU
    parts = [arguments.output.with_name(f".{arguments.output.stem}-{i}.json") for i in range(arguments.gpus)]
    collect(report, parts, arguments)  # of a call that was cut off
    todo = [key for key, _, _ in arm_list(arguments) if key not in report["arms"]]
    children = []
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "texts.json", texts)
        left = arguments.budget_seconds - (time.perf_counter() - started)
        try:
            for i, part in enumerate(parts[: len(todo)]):
                own = [f"--texts={folder}/texts.json", f"--part={','.join(todo[i :: arguments.gpus])}"]
                own += ["--gpus=1", f"--output={part}", f"--budget-seconds={left}"]
                command = [sys.executable, "-m", "benchmarks.objectives", *argv, *own]
                children.append(subprocess.Popen(command, env={**os.environ, **on_gpu(i)}))
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.terminate()
    collect(report, parts, arguments)
    if any(codes):
        raise RuntimeError(f"Of {len(codes)} processes some failed (exit status {codes}); see their output above.")


def collect(report: dict, parts: list[Path], arguments) -> None:
    """Move the arms that the parts hold into the report and its file, in the order of the list."""
    found = report["arms"]
    for part in parts:
        if part.exists():
            held = json.loads(part.read_text())
            check_same(held, report, part)
            found |= held["arms"]
    order = [key for key, _, _ in arm_list(arguments)]
    report["arms"] = {key: found[key] for key in sorted(found, key=lambda k: order.index(k) if k in order else -1)}
    save(report, arguments.output)
    for part in parts:
        part.unlink(missing_ok=True)


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
    parser.add_argument("--arms", help="comma separated names of arms; none: all")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many seeds for the leading arms")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a training text that are kept")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--window-size", type=int, default=10)
    parser.add_argument("--tree-prompts", type=int, default=64, help="prompts per domain decoded with a tree; 0: none")
    parser.add_argument("--tree-nodes", default="60,16,8,4", help="comma separated sizes of the trees")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--bootstrap", type=int, default=2000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="processes that share the arms, one on each GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the arms of such a process,
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)  # and the answers, which all of them share
    arguments = parser.parse_args(argv)
    check_gpus(parser, arguments.gpus)
    if arguments.gpus > 1 and not arguments.output:
        parser.error("--gpus collects the arms in a file: give --output")
    unknown = set(arguments.arms.split(",")) - set(ARMS) if arguments.arms else None
    if unknown:
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    return arguments


def load(arguments, device: str) -> tuple:
    """Tokenizer, frozen target and drafter as training takes them."""
    target = FrozenTarget.load(arguments.target, arguments.dtype, device)
    drafter = PPOWDrafter.from_pretrained(arguments.drafter, dtype=torch.float32).to(device)
    freeze_embedding(drafter)
    check_pair(target.model, drafter)
    target.taps = drafter.config.target_taps
    return AutoTokenizer.from_pretrained(arguments.target), target, drafter


def make_config(arguments, changes: dict, seed: int) -> ReinforceConfig:
    """The defaults of `ppow reinforce` with an arm's changes."""
    shared = {
        "target": arguments.target,
        "drafter": arguments.drafter,
        "data": arguments.data,
        "output_dir": "-",
        "steps": STEPS,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "drop_long": True,
        "dtype": arguments.dtype,
        "window_size": arguments.window_size,
        "max_forest_nodes": arguments.batch_size * 8 * 8 * arguments.window_size,  # every rollout in one forward
        "seed": seed,
    }
    return ReinforceConfig(**(shared | changes))


def arm_list(arguments) -> list[tuple[str, dict | None, int]]:
    """(key, changes, seed) in the order to run: first every arm once, then further seeds of the leading ones."""
    chosen = {name: ARMS[name] for name in arguments.arms.split(",")} if arguments.arms else ARMS
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


def train(config: ReinforceConfig, arguments, target: FrozenTarget, drafter, examples: list, pad: int) -> dict:
    """Train ``drafter`` in place for the arm's time or steps: -> what was spent, and the curves."""
    device, cuda = drafter.device, drafter.device.type == "cuda"
    torch.manual_seed(config.seed)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    drafter.train()
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=tuple(config.betas), weight_decay=config.weight_decay
    )
    reference = frozen_reference(config, drafter)
    rolls = objective_of(config).batch == "rollouts"
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")
    curve, step, tokens = [], 0, 0
    began = time.perf_counter()
    while True:
        spent = time.perf_counter() - began
        progress = step / arguments.steps if arguments.steps else spent / arguments.seconds
        if progress >= 1:
            break
        rate = config.learning_rate * min(1, progress / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))
        virtual = 1 + int(progress * STEPS)  # for the switch of ADAW
        step += 1
        chosen = batch_indices(len(examples), config.batch_size, config.seed, step - 1)
        seed = (config.seed * 1_000_003 + step) & 0x7FFFFFFF
        batch = make_batch([examples[i] for i in chosen], pad, device, seed)
        tokens += sum(len(examples[i].input_ids) for i in chosen)
        metrics, rollout = {}, None
        with autocast:
            if rolls:
                rollout, metrics = roll_out(config, target, drafter, batch, virtual, reference)
            value, found = loss(config, target, drafter, virtual, batch, rollout)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-12)
        optimizer.step()
        if step <= 3 or step % 20 == 0:  # reading numbers waits for the device, so not at every step
            if not torch.isfinite(norm):
                raise ValueError(f"Step {step}: the gradient is not finite; lower this arm's learning rate.")
            numbers = {"loss": value.detach(), "gradient_norm": norm, **metrics, **found}
            curve.append({"step": step, "seconds": round(time.perf_counter() - began, 3)})
            curve[-1] |= {k: round(float(v), 5) for k, v in numbers.items() if v.numel() == 1}
    if cuda:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    spent = time.perf_counter() - began
    return {"steps": step, "seconds": spent, "tokens": tokens, "peak_memory_gib": peak, "curve": curve}


# -- measuring ---------------------------------------------------------------------------------------------------------


def read_texts(arguments, device: str) -> dict:
    """The target's answers: written now, or handed over by the process that shares its arms with this one."""
    if arguments.texts:
        return json.loads(arguments.texts.read_text())
    tokenizer, target, _ = load(arguments, device)
    return write_texts(target.model, tokenizer, arguments, pad_token(tokenizer))


@torch.no_grad()
def write_texts(model, tokenizer, arguments, pad: int) -> dict:
    """The target's own answers to every prompt: "DOMAIN T=0" -> prompt lengths, ids, tokens to gain, loops."""
    texts = {}
    for domain in arguments.prompts.split(","):
        prompts = [prompt_ids(tokenizer, p) for p in load_prompts(domain, arguments.prompts_dir, arguments.limit)]
        limit = model.config.get_text_config(decoder=True).max_position_embeddings - arguments.max_new_tokens
        prompts = [ids for ids in prompts if len(ids) <= limit]
        for temperature in (0, 1):
            torch.manual_seed(arguments.seed)
            found = []
            for first in range(0, len(prompts), arguments.eval_batch):
                found += answer(model, prompts[first : first + arguments.eval_batch], temperature, arguments, pad)
            # the prompt's forward yields the first token, and a text of one token is never drafted for
            pairs = [(p, a) for p, a in zip(prompts, found) if len(a) > 1]
            texts[f"{Path(domain).stem} T={temperature}"] = {
                "prompt": [len(p) for p, _ in pairs],
                "ids": [p + a for p, a in pairs],
                "tokens": [len(a) - 1 for _, a in pairs],
                "loops": [ends_in_a_loop(a) for _, a in pairs],
            }
    return texts


def prompt_ids(tokenizer, prompt) -> list[int]:
    if prompt.raw_completion:
        return tokenizer(prompt.turns[0])["input_ids"]
    chat = [{"role": "user", "content": prompt.turns[0]}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def padded_left(prompts: list[list[int]], pad: int, device) -> dict:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def generation(model, temperature: float, arguments, pad: int, **more) -> GenerationConfig:
    sampling = (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    )
    known = model.generation_config.to_diff_dict()
    return GenerationConfig(
        **(known | sampling | {"max_new_tokens": arguments.max_new_tokens, "pad_token_id": pad} | more)
    )


def answer(model, prompts: list[list[int]], temperature: float, arguments, pad: int) -> list[list[int]]:
    """One batch of answers, end-of-text token included and padding cut."""
    inputs = padded_left(prompts, pad, model.device)
    config = generation(model, temperature, arguments, pad)
    out = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in out]


@torch.no_grad()
def measure(target: FrozenTarget, drafter, texts: dict, arguments, pad: int, trees: bool) -> dict:
    """Verifications that each text takes: "DOMAIN T=0" -> chain; with ``trees`` also "tree N", on some T=0."""
    drafter, results = drafter.eval(), {}
    for parameter in drafter.parameters():  # as it would be deployed; the rotary frequencies keep their precision
        parameter.data = parameter.data.to(target.model.dtype)
    for name, text in texts.items():
        temperature = float(name.endswith("T=1"))
        order = sorted(range(len(text["ids"])), key=lambda i: len(text["ids"][i]))  # less padding
        chain = [0.0] * len(order)
        for first in range(0, len(order), arguments.eval_batch):
            part = order[first : first + arguments.eval_batch]
            ids, prompt = [text["ids"][i] for i in part], [text["prompt"][i] for i in part]
            stands = acceptance_along(target, drafter, ids, prompt, arguments.window_size, temperature, pad)
            for i, count in zip(part, verifications(stands, [text["tokens"][i] for i in part])):
                chain[i] = round(count, 4)
        results[name] = {"chain": chain}
    if trees:
        greedy = [name for name in texts if name.endswith("T=0")]
        for nodes in tree_sizes(arguments):
            counts = decode_tree(target.model, drafter, [texts[n] for n in greedy], nodes, arguments, pad)
            for name, found in zip(greedy, counts):
                results[name][f"tree {nodes}"] = found
    return results


def acceptance_along(target, drafter, ids: list, prompt: list[int], size: int, temperature: float, pad: int):
    """Chance that draft i of the window behind committed token c of an answer stands, given all before it stood.

    Args:
        ids: texts, prompt and answer; prompt: tokens of each that are prompt.

    Returns:
        (B, L - 1, size) float32 on the CPU, L the longest answer; window c has the answer's first c + 1 tokens as its
        prefix. 0 behind the end of a text.
    """
    device = target.model.device
    width = max(map(len, ids))
    batch = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device)
    lengths, prompt = torch.tensor([len(row) for row in ids], device=device), torch.tensor(prompt, device=device)
    reading = target.read(batch)
    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), batch, reading.taps)
    windows = torch.arange(int((lengths - prompt).max()) - 1, device=device)
    starts = (prompt[:, None] - 1 + windows).clamp(max=width - 2)  # the pair with the newest committed token
    norm = log_norm(reading.logits)  # (B, T)
    row = torch.arange(len(ids), device=device)[:, None]
    draft_ids = torch.full((reading.logits.shape[-1],), -1, device=device)
    draft_ids[drafter.draft_columns()] = torch.arange(drafter.config.draft_vocab_size, device=device)
    hidden, token, found = unrolled.begin(starts), None, []
    for i in range(size):
        if i:
            hidden = unrolled.advance(token)
        place = starts + 2 + i  # of the token that is drafted
        inside = place < lengths[:, None]
        place = place.clamp(max=width - 1)
        token = batch.gather(1, place)
        logits = drafter.logits(hidden).float()  # (B, R, D)
        if temperature == 0:
            stands = (drafter.to_target_ids(logits.argmax(-1)) == token).float()
        else:
            wanted = reading.logits[row, place - 1, token].float() - norm.gather(1, place - 1)
            known = draft_ids[token]
            drawn = logits.log_softmax(-1).gather(-1, known.clamp(min=0)[..., None])[..., 0]
            stands = torch.where(known >= 0, (drawn - wanted).clamp(max=0).exp(), 0.0)
        found.append(torch.where(inside, stands, 0.0))
    return torch.stack(found, -1).cpu()


def verifications(stands: torch.Tensor, tokens: list[int]) -> list[float]:
    """Expected verifications of each text.

    With c answer tokens behind the first committed, Pr(k) = prod_{i<k} a_i * (1 - a_k), and
    N(c) = 1 + sum_k Pr(k) N(min(c + k + 1, tokens)), N(tokens) = 0. A chance of 0 or 1 makes it a plain walk.

    Args:
        stands: (B, R, K) of :func:`acceptance_along`; tokens: to gain, of each text.
    """
    batch, rows, size = stands.shape
    reach = torch.cat((torch.ones(batch, rows, 1), stands.cumprod(-1)), -1).double()  # Pr(k >= 0 .. K)
    chance = reach - torch.nn.functional.pad(reach[..., 1:], (0, 1))  # Pr(k = 0 .. K)
    ends = torch.tensor(tokens)
    needed = torch.zeros(batch, rows + size + 1, dtype=torch.float64)  # N(c), 0 from each text's end on
    for c in range(rows - 1, -1, -1):
        value = 1 + (chance[:, c] * needed[:, c + 1 : c + size + 2]).sum(-1)
        needed[:, c] = torch.where(c < ends, value, 0.0)
    return needed[:, 0].tolist()


def tree_sizes(arguments) -> list[int]:
    return [int(nodes) for nodes in arguments.tree_nodes.split(",")]


def decode_tree(model, drafter, texts: list[dict], nodes: int, arguments, pad: int) -> list[list[float]]:
    """Verifications of each domain's first ``tree_prompts`` texts when really decoded with trees of so many nodes."""
    work = [
        (ids[:length], tokens)
        for text in texts
        for ids, length, tokens in list(zip(text["ids"], text["prompt"], text["tokens"]))[: arguments.tree_prompts]
    ]
    options = {**TREE, "tree_nodes": nodes, "cuda_graphs": False, "return_dict_in_generate": True}
    config, found = generation(model, 0, arguments, pad, **options), []
    for first in range(0, len(work), arguments.eval_batch):
        part = work[first : first + arguments.eval_batch]
        inputs = padded_left([ids for ids, _ in part], pad, model.device)
        out = model.generate(**inputs, generation_config=config, assistant_model=drafter)
        # a batch's arithmetic can leave the text at a near tie: count per token gained, on the text's own length
        for (_, tokens), gained in zip(part, out.acceptance.gained):
            found.append(len(gained) * tokens / max(1, sum(gained)))
    counts = iter(found)
    return [[next(counts) for _ in text["ids"][: arguments.tree_prompts]] for text in texts]


# -- figures -----------------------------------------------------------------------------------------------------------


def opened(arguments, texts: dict) -> dict:
    """The report to add to: a new one, or the one in the output file when it rests on the same texts."""
    free = ("output", "arms", "seeds", "budget_seconds", "bootstrap", "texts", "gpus", "part")  # they change no arm
    settings = {k: v for k, v in vars(arguments).items() if k not in free}
    mark = zlib.crc32(json.dumps([text["ids"] for text in texts.values()]).encode())
    if arguments.output and arguments.output.exists():
        report = json.loads(arguments.output.read_text())
        check_same(report, {"settings": settings, "texts_crc32": mark}, arguments.output)
        return report
    return {
        "settings": settings,
        "versions": versions(),
        "hardware": hardware(),
        "texts_crc32": mark,
        "texts": {name: {k: v for k, v in text.items() if k != "ids"} for name, text in texts.items()},
        "arms": {},
    }


def check_same(held: dict, wanted: dict, path: Path) -> None:
    """Refuse to add to, or to take from, what was measured with other settings or on other texts."""
    if any(held[name] != wanted[name] for name in ("settings", "texts_crc32")):
        raise ValueError(f"{path} holds arms measured with other settings or on other texts; give another --output.")


def shown(row: dict) -> list[tuple[str, list[float]]]:
    return [(name, found["chain"]) for name, found in row["results"].items()]


def pooled(report: dict, ending: str, straight: bool = False, seeds: bool = False) -> tuple[numpy.ndarray, dict]:
    """Tokens (n,) of all texts whose name ends so, and their verifications (n,) per arm, mean over its seeds.

    ``straight``: only texts that do not loop; ``seeds``: every seed for itself.
    """
    names = [name for name in report["texts"] if name.endswith(ending)]
    tokens = numpy.concatenate([report["texts"][name]["tokens"] for name in names])
    keep = numpy.ones(len(tokens), dtype=bool)
    if straight:
        keep = ~numpy.concatenate([report["texts"][name]["loops"] for name in names]).astype(bool)
    counts = {}
    for key, row in report["arms"].items():
        values = numpy.concatenate([row["results"][name]["chain"] for name in names])
        counts.setdefault(key if seeds else key.rpartition("/")[0], []).append(values[keep])
    return tokens[keep], {name: numpy.mean(values, 0) for name, values in counts.items()}


def tree_pooled(report: dict, tree: str) -> tuple[numpy.ndarray, dict]:
    """The same for a tree, first seeds only, on the texts that were decoded with one."""
    size = report["settings"]["tree_prompts"]
    names = [name for name in report["texts"] if name.endswith("T=0")]
    tokens = numpy.concatenate([report["texts"][name]["tokens"][:size] for name in names])
    counts = {}
    for key, row in report["arms"].items():
        if key.endswith("/0"):
            counts[key[:-2]] = numpy.concatenate([row["results"][name][tree] for name in names])
    return tokens, counts


def compared(tokens: numpy.ndarray, counts: dict, resamples: int, seed: int = 0) -> dict:
    """Acceptance length of every arm, and the paired difference to the best CST arm with its 95% interval."""
    lengths = {name: float(tokens.sum() / values.sum()) for name, values in counts.items()}
    controls = [name for name in lengths if name.startswith("cst")]
    control = max(controls, key=lengths.get) if controls else None
    draws = numpy.random.default_rng(seed).integers(0, len(tokens), (resamples, len(tokens)))
    weights = numpy.stack([numpy.bincount(row, minlength=len(tokens)) for row in draws])  # (resamples, n)
    resampled = {name: (weights @ tokens) / (weights @ values) for name, values in counts.items()}
    found = {}
    for name, length in lengths.items():
        found[name] = {"acceptance_length": length}
        if control is not None:
            low, high = numpy.percentile(resampled[name] - resampled[control], [2.5, 97.5])
            found[name] |= {"over_cst": length - lengths[control], "over_cst_95": [float(low), float(high)]}
    return {"control": control, "prompts": len(tokens), "arms": found}


def summarize(report: dict, resamples: int) -> dict:
    """Pooled over domains: at both temperatures, all texts and those that do not loop; trees; and per seed."""
    summary = {}
    for temperature in (0, 1):
        for straight in (False, True):
            tokens, counts = pooled(report, f"T={temperature}", straight)
            if len(tokens):
                title = f"T={temperature}" + (", not looping" if straight else "")
                summary[title] = compared(tokens, counts, resamples)
    if report["settings"]["tree_prompts"]:
        for tree in (f"tree {nodes}" for nodes in report["settings"]["tree_nodes"].split(",")):
            summary[f"{tree}, T=0"] = compared(*tree_pooled(report, tree), resamples)
    summary["by domain"] = {
        name: compared(*pooled(report, name), resamples) for name in report["texts"] if report["texts"][name]["tokens"]
    }
    summary["loops"] = {name: float(numpy.mean(text["loops"])) for name, text in report["texts"].items()}
    summary["seeds"] = {
        key: {
            f"T={t}": float(tokens.sum() / values[key].sum())
            for t, (tokens, values) in ((t, pooled(report, f"T={t}", seeds=True)) for t in (0, 1))
        }
        for key in report["arms"]
    }
    return summary


def table(report: dict) -> str:
    """The summary in Markdown: acceptance length, and the difference to the best CST with its interval."""
    parts = {name: part for name, part in report["summary"].items() if "arms" in part}
    lines = ["| arm | steps | " + " | ".join(parts) + " |", "|---" * (len(parts) + 2) + "|"]
    steps = {key.rpartition("/")[0]: row.get("steps", 0) for key, row in report["arms"].items()}
    for name in steps:
        cells = []
        for part in parts.values():
            row = part["arms"][name]
            cell = f"{row['acceptance_length']:.3f}"
            if "over_cst" in row:
                low, high = row["over_cst_95"]
                cell += f" {row['over_cst']:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(cell)
        lines.append(f"| {name} | {steps[name]} | " + " | ".join(cells) + " |")
    loops = ", ".join(f"{name} {share:.0%}" for name, share in report["summary"]["loops"].items())
    return "\n".join([*lines, "", f"looping texts: {loops}"])


def plot(report: dict, path: Path) -> None:
    """Differences to CST with intervals, and training curves; without matplotlib, nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [name for name in ("T=0", "T=1") if report["summary"].get(name, {}).get("control")]
    # along texts first, where every objective has the same figure; rollouts have only their own
    curves = (("reward",), ("greedy_acceptance_length", "acceptance_length"), ("text_kl", "kl"))
    wide = len(parts) + len(curves)
    figure, axes = pyplot.subplots(1, wide, figsize=(5 * wide, 6), layout="constrained")
    for axis, part in zip(axes, parts):
        arms = report["summary"][part]["arms"]
        for y, row in enumerate(arms.values()):
            axis.plot(row["over_cst_95"], [y, y], color="tab:blue")
            axis.plot(row["over_cst"], y, "o", color="tab:blue")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.invert_yaxis()
        axis.set(title=f"chain, {part}", xlabel=f"acceptance length over {report['summary'][part]['control']}")
    for axis, figures in zip(axes[len(parts) :], curves):
        switches = [
            point["seconds"]
            for row in report["arms"].values()
            for point in row.get("curve", ())
            if point.get("adaptive")
        ]
        if switches:
            axis.axvline(min(switches), color="gray", linestyle=":", label="windows by criticality from here")
        for key, row in report["arms"].items():
            name = next((f for f in figures if f in (row.get("curve") or [{}])[-1]), None)
            if name and key.endswith("/0"):
                points = [(point["seconds"], point[name]) for point in row["curve"] if name in point]
                axis.plot(*zip(*points), label=key[:-2], linewidth=0.8)
        axis.set(title=figures[0].replace("_", " "), xlabel="seconds of training")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
