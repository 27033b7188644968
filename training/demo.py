"""Show the speedup: real prompts, answered by the plain target and with its drafter.

    ppow demo                                  # the bundled pair, CPU, no network
    ppow demo --target TARGET --drafter DRAFTER --prompts prompts.jsonl

The answer streams while it is made with the drafter; the figures come from silent repetitions afterwards, in which the
two systems take turns.
"""

import dataclasses
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from .config import DemoConfig

if TYPE_CHECKING:  # at run time imported once ``main`` has said whether the Hub may be asked
    import torch
    from transformers import GenerationConfig, PreTrainedModel

    from ppow import PPOWDrafter

    from .prompts import Prompt

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    "Tom has 12 apples. He buys 8 more apples and gives 5 apples to his sister. How many apples does Tom have left?",
    "A baker sells 24 cakes in the morning and 18 cakes in the afternoon. Each cake costs $3. How much does he make?",
    "Maria reads 15 pages every day. How many pages does she read in two weeks?",
    "I want to book a table at a restaurant.",
    "I need a ride to the airport tomorrow morning.",
    "There are 30 students in a class. 40% of them are boys. How many girls are there in the class?",
]


def main(config: DemoConfig) -> None:
    """Run the demo.

    Raises:
        ValueError: when there is no bundled pair, or when an answer at temperature 0 differs from the plain one and
            rounding does not explain it.
    """
    if config.target is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import TextStreamer

    from ppow import PPOWDrafter

    from . import provenance
    from .evaluate import drafting_options, generation_configs, timed
    from .files import write_json
    from .loading import load_model, load_tokenizer, named
    from .prompts import first_turn, load_prompts

    if config.output and Path(config.output).is_dir():
        raise ValueError(f"--output {config.output} is a folder; name a .json file in it.")
    if config.threads:
        torch.set_num_threads(config.threads)
    target_name = config.target or str(bundled("target"))
    drafter_name = config.drafter or str(bundled("drafter"))
    prompts = load_prompts(config.prompts) if config.prompts else bundled_prompts()
    with named("target", target_name):
        tokenizer = load_tokenizer(target_name)
        target = load_model(target_name, dtype=torch.float32)
    with named("drafter", drafter_name):
        drafter = PPOWDrafter.from_pretrained(drafter_name, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target.to(device)
    drafter.to(device)

    drafting = drafting_options(config)
    plain, ours = generation_configs(target, config.temperature, config.max_new_tokens, drafting)
    print(
        f"target {target.num_parameters() / 1e6:.1f}M, drafter {drafter.num_parameters() / 1e6:.1f}M parameters, "
        f"{device}, {torch.get_num_threads()} threads, temperature {config.temperature:g}\n"
    )
    hello = tokenizer("Hello", return_tensors="pt")["input_ids"].to(device)
    for _ in range(2):  # what happens once happens before any figure
        timed(target, 0, hello, generation_config=plain)
        timed(target, 0, hello, generation_config=ours, assistant_model=drafter)
    answers = []
    for prompt in prompts[: config.limit]:
        question, ids = prompt.turns[0], torch.tensor([first_turn(tokenizer, prompt)], device=device)
        print(f"> {question}")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        torch.manual_seed(config.seed)
        shown = {"attention_mask": torch.ones_like(ids), "assistant_model": drafter, "streamer": streamer}
        target.generate(ids, generation_config=ours, **shown)
        answers.append({"prompt": question, **race(target, drafter, ids, plain, ours, config)})
    speedups = [answer["speedup"] for answer in answers]
    if config.output:
        write_json(Path(config.output), {"answers": answers, **provenance.record(config)})
    spread = f"{min(speedups):.2f}x to {max(speedups):.2f}x"
    print(f"median speedup {statistics.median(speedups):.2f}x over {len(speedups)} prompts ({spread})")
    if faults := sum(answer["fault"] for answer in answers):
        raise ValueError(
            f"{faults} answers differ from the plain target's, and rounding does not explain it: this must not happen "
            "at temperature 0; please report it."
        )


def bundled_prompts() -> list["Prompt"]:
    """The prompts that are asked when none are named."""
    from .prompts import Prompt

    return [Prompt(str(index), "bundled", [text]) for index, text in enumerate(PROMPTS)]


def race(
    target: "PreTrainedModel",
    drafter: "PPOWDrafter",
    ids: "torch.Tensor",
    plain: "GenerationConfig",
    ours: "GenerationConfig",
    config: DemoConfig,
) -> dict:
    """Time both systems in turns on a prompt's ids (1, P) and print their line: -> its figures."""
    import torch

    from ppow.drafting_ppow import what_was_drafted
    from ppow.lossless_ppow import FAULT

    from .evaluate import drafting_options, timed

    mask, slow, fast = torch.ones_like(ids), [], []
    for _ in range(config.repetitions):
        expected, seconds = timed(target, config.seed, ids, attention_mask=mask, generation_config=plain)
        slow.append((expected.shape[1] - ids.shape[1]) / seconds)
        out, seconds = timed(
            target, config.seed, ids, attention_mask=mask, generation_config=ours, assistant_model=drafter
        )
        fast.append((out.sequences.shape[1] - ids.shape[1]) / seconds)
    plain_rate, rate = statistics.median(slow), statistics.median(fast)
    what_was_drafted(out, drafting_options(config))
    same, answer, differences = torch.equal(expected, out.sequences), "sampled from one distribution", []
    if config.temperature == 0 and not same:
        here, stock = (sequences[0, ids.shape[1] :].tolist() for sequences in (out.sequences, expected))
        differences = drafter.explain(target, ids, here, stock, ours)
        agrees = "; the same tokens as without drafts" if len(differences) == 1 else ""
        answer = f"identical: NO, {'; '.join(map(str, differences))}{agrees}"
    elif config.temperature == 0:
        answer = "identical: yes"
    length = out.acceptance.acceptance_length
    print(
        f"  plain {plain_rate:.0f} tokens/s, with drafter {rate:.0f} tokens/s, speedup {rate / plain_rate:.2f}x, "
        f"acceptance length {length:.2f}, {answer}\n",
        flush=True,
    )
    figures = {"plain_tokens_per_second": plain_rate, "tokens_per_second": rate, "speedup": rate / plain_rate}
    fault = any(found.verdict == FAULT for found in differences)
    figures |= {"acceptance_length": length, "identical": same, "fault": fault}
    return {**figures, "differences": [dataclasses.asdict(found) for found in differences]}


def bundled(part: str) -> Path:
    """Folder of the bundled target or drafter."""
    folder = ROOT / "bundled" / part
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds no model. Run the demo from a checkout of the repository, or name a pair with --target "
            "and --drafter."
        )
    return folder
