"""Makes a small pair: pretrain a target, let it write its own texts, train its drafter in two stages.

    python -m benchmarks.bundle --text DATA/text --prompts DATA/prompts --work runs/bundle

Every stage is a plain command, printed before it runs; a stage whose result exists is skipped, one that was cut
off resumes. Without `--scale` it is the pair that the tests use, in tests/pair: it is small, its answers are silly, and
two CPU cores make it in half an hour. `--scale gpu` makes the pair of 14M parameters on which benchmarks/ compares
objectives: one H100 for about 25 minutes, five of them for the target.
`--set supervised.steps=50` changes a single one. With `--gpus N` the texts are written on N GPUs side by side, and the
drafter is trained on all of them with the same texts in a step. DATA is a folder of permissively licensed chats and
prompts, one JSON object per line.
"""

import argparse
import functools
import json
import lzma
import os
import queue
import random
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .machine import check_gpus, on_gpus

SEED = 0
# a chain that stops where it is unlikely to be accepted: on a CPU every draft step counts
DRAFTING = {"window_size": 10, "draft_threshold": 0.05}
STAGE2 = {  # the recipe is the command's own
    "warmup_steps": 5,
    "max_length": 256,
    "drop_long": True,
    "dtype": "bfloat16",
    "save_every": 25,
    "eval_every": 25,
}
SETTINGS = {
    "pretrain": {
        "num_layers": 6,
        "hidden_size": 160,
        "intermediate_size": 320,
        "sequence_length": 256,
        "minutes": 6,
        "checkpoint_minutes": 2,
    },
    "regenerate": {"max_new_tokens": 96, "batch_size": 64},
    "supervised": {
        "steps": 100,
        "batch_size": 8,
        "learning_rate": 6e-3,
        "warmup_steps": 20,
        "max_length": 128,
        "drop_long": True,
        "draft_vocab_size": 2048,
        "taps": "1,3,5",
        "save_every": 100,
        "eval_every": 100,
    },
    "reinforce": {
        **STAGE2,
        "dtype": "float32",
        "max_length": 128,
        "steps": 20,
        "batch_size": 8,
        "learning_rate": 3e-3,
    },
    # on the plain path, on a GPU too: the fast one drafts whole windows
    "evaluate": {"prompts": "gsm8k,mt_bench", "limit": 10, "max_new_tokens": 96, "no_cuda_graphs": True, **DRAFTING},
}
GPU_SETTINGS = {
    "pretrain": {
        "groups": "math:2,chat:1,instruct:1:1200,reasoning:1:1500",
        "python_share": 0.15,
        "python_packages": "transformers,accelerate,datasets,huggingface-hub",
        "vocab_size": 6144,
        "num_layers": 16,
        "hidden_size": 256,
        "intermediate_size": 768,
        "sequence_length": 1024,
        "batch_size": 32,
        "minutes": 5,
        "checkpoint_minutes": 2,
        "device": "cuda",
    },
    "regenerate": {"max_new_tokens": 128, "batch_size": 1600, "dtype": "bfloat16"},
    "supervised": {
        "steps": 2600,
        "batch_size": 128,
        "learning_rate": 6e-3,
        "warmup_steps": 50,
        "max_length": 256,
        "drop_long": True,
        "draft_vocab_size": 3072,
        "taps": "3,9,14",
        "dtype": "bfloat16",
        "save_every": 200,
        "eval_every": 250,
    },
    "reinforce": {
        **STAGE2,
        "steps": 2000,
        "batch_size": 128,
        "learning_rate": 3e-3,
        "warmup_steps": 27,
        "save_every": 150,
        "eval_every": 150,
    },
    "evaluate": {**SETTINGS["evaluate"], "limit": 60},
}
LARGE_SETTINGS = {  # a target of 101M parameters and its stage 1, for benchmarks/objectives.py
    "pretrain": {
        **GPU_SETTINGS["pretrain"],
        "groups": "math:2,chat:1,instruct:1,reasoning:1,assistant_text:1,textbooks:1",
        "python_share": 0.1,
        "python_packages": "transformers,accelerate,huggingface-hub",
        "vocab_size": 16384,
        "num_layers": 14,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_heads": 12,
        "num_kv_heads": 4,
        "batch_size": 64,
        "minutes": 5,
        "checkpoint_minutes": 30,
        "compile_layers": True,
    },
    "regenerate": {**GPU_SETTINGS["regenerate"], "batch_size": 2700},
    "supervised": {
        **GPU_SETTINGS["supervised"],
        "steps": 1200,
        "batch_size": 128,
        "learning_rate": 1.5e-3,
        "warmup_steps": 100,
        "average_from": 1.0,  # as every figure of this pair was measured; the mean is better on the small one
        "max_length": 320,
        "save_every": 300,
        "eval_every": 200,
        "draft_vocab_size": 8192,
        "taps": "3,8,12",
    },
    "reinforce": {**GPU_SETTINGS["reinforce"], "steps": 900, "learning_rate": 3e-4},
    "evaluate": GPU_SETTINGS["evaluate"],
}
SCALES = {"tests": SETTINGS, "gpu": GPU_SETTINGS, "large": LARGE_SETTINGS}
_GROUPS = ("math", "chat", "instruct")
TEXTS = {  # (group of texts, rows whose answers the target writes anew, sampling temperature)
    "tests": [("math", 600, 0.0), ("math", 300, 1.0), ("chat", 600, 0.0), ("chat", 300, 1.0)],
    "gpu": [(group, count, t) for group in _GROUPS for count, t in ((9600, 0.0), (4800, 1.0))],
    "large": [(g, n, t) for g, n in zip((*_GROUPS, "reasoning"), (8000, 16000, 16000, 10000)) for t in (0.0, 1.0)],
}
HELD_OUT = 50  # one prompt in so many is kept from both stages
FOR_STAGE_2 = 5  # and, at scale "large", one in so many from stage 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of .jsonl.xz texts, named by group")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of benchmark prompts, for the evaluation")
    parser.add_argument("--out", type=Path, help="folder of the pair; none: tests/pair, of another scale WORK/pair")
    parser.add_argument("--work", type=Path, help="none: runs/bundle-SCALE")
    parser.add_argument("--scale", choices=SCALES, default="tests", help="gpu: a target of 14M; large: one of 101M")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.OPTION=VALUE", help="change a setting")
    parser.add_argument("--rows", type=float, default=1.0, help="share of the texts that the target writes anew")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use; pretraining uses one")
    parser.add_argument("--until", choices=SETTINGS, default="evaluate", help="stop after this stage")
    arguments = parser.parse_args()
    arguments.work = arguments.work or Path(f"runs/bundle-{arguments.scale}")
    arguments.out = arguments.out or (Path("tests/pair") if arguments.scale == "tests" else arguments.work / "pair")
    settings = override(SCALES[arguments.scale], arguments.set)
    check_gpus(parser, arguments.gpus)
    work, stages = arguments.work, list(settings)[: list(settings).index(arguments.until) + 1]
    for stage in stages:
        if stage in {"supervised", "reinforce"} and int(settings[stage]["batch_size"]) % arguments.gpus:
            parser.error(f"{arguments.gpus} GPUs cannot share {stage}'s batch_size {settings[stage]['batch_size']}")
    work.mkdir(parents=True, exist_ok=True)

    target, train, held_out = work / "target", work / "train.jsonl", work / "heldout.jsonl"
    stage2 = work / "stage2.jsonl" if arguments.scale == "large" else train
    if not (target / "config.json").exists():
        start("benchmarks.pretrain", data=arguments.text, output=target, seed=SEED, **settings["pretrain"])
    if "regenerate" in stages and not train.exists():
        chosen = [(group, max(1, round(arguments.rows * count)), t) for group, count, t in TEXTS[arguments.scale]]
        given = (settings["regenerate"], (held_out, stage2, train), arguments.gpus)
        write_texts(arguments.text, chosen, work, target, *given)
    shared = {"target": target, "eval_data": held_out, "seed": SEED}
    stage1, drafter = work / "supervised", work / "reinforce"
    for folder, own in ((stage1, {"data": train}), (drafter, {"data": stage2, "drafter": stage1})):
        stage = folder.name
        if stage in stages and not (folder / "config.json").exists():
            options = {**shared, **own, **settings[stage]}
            options["batch_size"] = int(options["batch_size"]) // arguments.gpus
            ppow(stage, processes=arguments.gpus, output_dir=folder, resume=True, **options)
    if "evaluate" not in stages:
        return
    evaluation = work / "evaluate"
    if not (evaluation / "metrics.json").exists():
        systems = {"target": target, "drafter": drafter, "baseline": stage1}
        given = {**systems, **settings["evaluate"], "resume": True}
        ppow("evaluate", output_dir=evaluation, prompts_dir=arguments.prompts, **given)
    assemble(target, stage1, drafter, arguments.out)


def override(settings: dict[str, dict], changes: list[str]) -> dict[str, dict]:
    """``settings`` with ``STAGE.OPTION=VALUE`` applied; the commands themselves check options and values."""
    settings = {stage: dict(options) for stage, options in settings.items()}
    for change in changes:
        name, given, value = change.partition("=")
        stage, _, option = name.partition(".")
        if not given or not option or stage not in settings:
            raise ValueError(f"--set {change}: expected STAGE.OPTION=VALUE with a stage of {', '.join(settings)}.")
        settings[stage][option] = value
    return settings


def assemble(target: Path, stage1: Path, drafter: Path, out: Path) -> None:
    """Put the pair together: weights, tokenizer, configuration and records, drafting options for CPUs.

    The code that ``save_pretrained`` leaves beside a drafter stays out: in this repository it is modeling_ppow/.
    """
    for part, source in (("target", target), ("stage1", stage1), ("drafter", drafter)):
        folder = out / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and file.suffix in {".json", ".safetensors", ".jinja"}:
                shutil.copyfile(file, folder / file.name)
    for folder in (out / "stage1", out / "drafter"):
        config = json.loads((folder / "config.json").read_text())
        config.pop("auto_map", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        generation = json.loads((folder / "generation_config.json").read_text()) | DRAFTING
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")


def write_texts(
    text: Path, chosen: list, work: Path, target: Path, settings: dict, files: tuple[Path, Path, Path], gpus: int
) -> None:
    """Draw chats, let the target write the answers, and deal them out by prompt; every file is complete or absent.

    Args:
        files: for the rows that are held out, of stage 2, and of stage 1 (the last two may be one file).
    """
    free = queue.SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu)

    def answer(group: str, count: int, temperature: float) -> list[dict]:
        name = f"{group}-{temperature:g}"
        chats, answers = work / f"{name}.chats.jsonl", work / f"{name}.answers.jsonl"
        if not chats.exists():
            write(chats, draw(text, group, count, f"{SEED}/{name}"))
        options = {"temperature": temperature, "seed": SEED, "resume": answers.exists(), "target": target}
        gpu = free.get()
        try:
            ppow("regenerate", environment=on_gpus([gpu]), data=chats, output=answers, **options, **settings)
        finally:
            free.put(gpu)
        with open(answers, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(gpus) as pool:
        rows = [row for found in pool.map(lambda part: answer(*part), chosen) for row in found]
    random.Random(SEED).shuffle(rows)
    dealt = {file: [] for file in files}
    for row in rows:
        dealt[files[part_of(row["messages"][0]["content"])]].append(row)
    for file, part in dealt.items():
        write(file, part)


def part_of(prompt: str) -> int:
    """0: held out, 1: of stage 2, 2: of stage 1; all answers to a prompt together."""
    mark = zlib.crc32(prompt.encode())
    if mark % HELD_OUT == 0:
        return 0
    return 1 if mark % FOR_STAGE_2 == 1 else 2


def draw(text: Path, group: str, count: int, seed: str) -> list[dict]:
    """Some chats of a group: short ones, cut after at most two answers."""
    chats = []
    for file in sorted(text.glob(f"{group}-*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            chats += [row["messages"][:4] for row in map(json.loads, lines) if "messages" in row]
    chats = [chat for chat in chats if sum(len(message["content"]) for message in chat) < 800]
    return [{"messages": chat} for chat in random.Random(seed).sample(chats, min(count, len(chats)))]


def write(path: Path, rows: list[dict]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    shutil.move(partial, path)


def start(module: str, *command: str, processes: int = 1, environment: dict | None = None, **options) -> None:
    """Run a module's command in this environment; switches are passed as booleans.

    Args:
        processes: so many of it, one on each GPU, started as `accelerate launch` does (which cannot on CPUs).
        environment: variables to set for it.
    """
    given = {key: value for key, value in options.items() if value is not False}
    arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
    environment = {**os.environ, **(environment or {})}
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if not torch.cuda.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"
    line = [*launch, "-m", module, *command, *arguments]
    print("+ python", *line, flush=True)
    subprocess.run([sys.executable, *line], check=True, env=environment)


ppow = functools.partial(start, "ppow.training.cli")


if __name__ == "__main__":
    main()
