"""Makes the bundled pair: pretrain a small target, let it write its own texts, train its drafter in two stages.

    python benchmarks/bundle.py --text DATA/text --prompts DATA/prompts --work runs/bundle

Every stage is a plain `ppow` command, printed before it runs; a stage whose result exists is skipped, one that was cut
off resumes. The settings below are for two CPU cores and about two hours; on a GPU raise `PRETRAIN` (more layers,
tokens) and the stages' steps. DATA is a folder of permissively licensed chats and prompts, one JSON object per line.
"""

import argparse
import json
import lzma
import random
import shutil
import subprocess
import sys
from pathlib import Path

from ppow.model_cards import render

SEED = 0
PRETRAIN = {"minutes": 75, "checkpoint_minutes": 5}
# (group of texts, rows whose answers the target writes anew, sampling temperature)
TEXTS = [("math", 1500, 0.0), ("math", 700, 1.0), ("chat", 1200, 0.0), ("chat", 600, 1.0)]
ANSWER_TOKENS = 96
SUPERVISED = {
    "steps": 1100,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "max_length": 256,
    "draft_vocab_size": 2048,
    "dtype": "bfloat16",
    "save_every": 50,
    "eval_every": 100,
}
REINFORCE = {
    "steps": 200,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "max_length": 256,
    "kl_coef": 0.5,
    "dtype": "bfloat16",
    "save_every": 50,
    "eval_every": 50,
}
# a chain that stops where it is unlikely to be accepted: on a CPU every draft step counts
DRAFTING = {"window_size": 10, "draft_threshold": 0.05}
EVALUATE = {"prompts": "gsm8k", "limit": 100, "max_new_tokens": 96, "window_size": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of .jsonl.xz texts, named by group")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of benchmark prompts, for the evaluation")
    parser.add_argument("--out", type=Path, default=Path("bundled"), help="folder for target/ and drafter/")
    parser.add_argument("--work", type=Path, default=Path("runs/bundle"))
    parser.add_argument("--target", type=Path, help="use this target instead of pretraining one")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)

    target = arguments.target or work / "target"
    if not (target / "config.json").exists():
        ppow("pretrain", data=arguments.text, output=target, seed=SEED, **PRETRAIN)
    train, held_out = work / "train.jsonl", work / "heldout.jsonl"
    if not train.exists():
        write_texts(arguments.text, work, target, train, held_out)
    EVALUATE["prompts_dir"] = arguments.prompts
    shared = {"target": target, "data": train, "eval_data": held_out, "seed": SEED}
    for stage, settings in (("supervised", SUPERVISED), ("reinforce", {"drafter": work / "supervised", **REINFORCE})):
        if not (work / stage / "config.json").exists():
            ppow(stage, output_dir=work / stage, resume=True, **shared, **settings)
    evaluations = {}
    for stage in ("supervised", "reinforce"):
        evaluation = work / f"evaluate-{stage}"
        if not (evaluation / "metrics.json").exists():
            ppow("evaluate", target=target, drafter=work / stage, output_dir=evaluation, **EVALUATE)
        evaluations[stage] = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    assemble(target, work, evaluations, arguments.out)


def assemble(target: Path, work: Path, evaluations: dict, out: Path) -> None:
    """Put the pair together: weights, tokenizer and configuration, drafting options for CPUs, and the cards.

    The code that ``save_pretrained`` leaves beside a drafter stays out: in this repository it is modeling_ppow/.
    """
    for part, source in (("target", target), ("drafter", work / "reinforce")):
        folder = out / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and file.suffix in {".json", ".safetensors", ".jinja"} and file.name != "provenance.json":
                shutil.copyfile(file, folder / file.name)
    drafter = out / "drafter"
    config = json.loads((drafter / "config.json").read_text())
    config.pop("auto_map", None)
    (drafter / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = json.loads((drafter / "generation_config.json").read_text()) | DRAFTING
    (drafter / "generation_config.json").write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n")
    stages = [json.loads((work / stage / "provenance.json").read_text()) for stage in ("supervised", "reinforce")]
    training = json.loads((out / "target" / "training.json").read_text())
    cards = {"target": {"training": training}}
    cards["drafter"] = {"config": config, "evaluations": evaluations, "stages": stages}
    for part, facts in cards.items():
        (out / part / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        (out / part / "README.md").write_text(render(part, facts))


def write_texts(text: Path, work: Path, target: Path, train: Path, held_out: Path) -> None:
    """Draw chats, let the target write the answers, and set every 50th row aside; complete or absent."""
    rows = []
    for group, count, temperature in TEXTS:
        name = f"{group}-{temperature:g}"
        chats = work / f"{name}.chats.jsonl"
        if not chats.exists():
            drawn = draw(text, group, count, f"{SEED}/{name}")
            write(chats, drawn)
        answers = work / f"{name}.answers.jsonl"
        settings = {"temperature": temperature, "max_new_tokens": ANSWER_TOKENS, "batch_size": 32, "seed": SEED}
        ppow("regenerate", data=chats, output=answers, target=target, resume=answers.exists(), **settings)
        rows += [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    write(held_out, [row for i, row in enumerate(rows) if i % 50 == 0])
    write(train, [row for i, row in enumerate(rows) if i % 50])


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


def ppow(command: str, **options) -> None:
    """Run one `ppow` command in this environment; switches are passed as booleans."""
    given = {key: value for key, value in options.items() if value is not False}
    arguments = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()]
    print("+ ppow", command, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "ppow.training.cli", command, *arguments], check=True)


if __name__ == "__main__":
    main()
