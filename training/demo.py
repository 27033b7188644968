"""Show the speedup: real prompts, answered by the plain target and with its drafter.

    ppow demo                                  # SmolLM2-135M-Instruct and the drafter of this repository
    ppow demo --target TARGET --drafter DRAFTER --prompts prompts.jsonl

The answer streams while it is made with the drafter. The figures come from silent repetitions afterwards, both systems
warm from the same prompt; they take turns, and the order of a turn changes from one to the next.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from .config import DemoConfig

if TYPE_CHECKING:  # at run time imported by ``main``, so that a wrong option is answered at once
    import torch
    from transformers import GenerationConfig, PreTrainedModel

    from ppow import PPOWDrafter


def main(config: DemoConfig) -> None:
    """Run the demo.

    Raises:
        ValueError: when the pair or the prompts are not there, or when an answer at temperature 0 differs from the
            plain one and rounding does not explain it.
    """
    import torch
    from transformers import TextStreamer

    from ppow import PPOWDrafter

    from . import provenance
    from .evaluate import drafting_options, generation_configs
    from .files import write_json
    from .loading import load_model, load_tokenizer, named
    from .prompts import first_turn, load_prompts
    from .smollm2 import PROMPTS, demo_pair

    if config.output and Path(config.output).is_dir():
        raise ValueError(f"--output {config.output} is a folder; name a .json file in it.")
    if config.threads:
        torch.set_num_threads(config.threads)
    if not (config.prompts or PROMPTS.exists()):
        raise ValueError(
            f"{PROMPTS} is missing: the installation is not complete. Install ppow again, or name --prompts."
        )
    prompts = load_prompts(config.prompts or str(PROMPTS))
    given = (config.target, config.drafter) if config.target and config.drafter else None
    target_name, drafter_name = given or demo_pair()
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
    sizes = [f"{model.num_parameters() / 1e6:.1f}M parameters" for model in (target, drafter)]
    print(
        f"target {target_name}, {sizes[0]}\ndrafter {drafter_name}, {sizes[1]}\n"
        f"{device}, {torch.get_num_threads()} threads, temperature {config.temperature:g}\n"
    )
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
    if statistics.median(speedups) < 1:
        print("Slower here: a window costs more time than the tokens that it gains would cost without a drafter.")
    if faults := sum(answer["fault"] for answer in answers):
        raise ValueError(
            f"{faults} answers differ from the plain target's, and rounding does not explain it: this must not happen "
            "at temperature 0; please report it."
        )


def race(
    target: "PreTrainedModel",
    drafter: "PPOWDrafter",
    ids: "torch.Tensor",
    plain: "GenerationConfig",
    ours: "GenerationConfig",
    config: DemoConfig,
) -> dict:
    """Time both systems in turns on a prompt's ids (1, P), which ``ours`` has answered, and print their line.

    Returns:
        The figures: of the medians, and the lowest and the highest speedup of a repetition.
    """
    import torch

    from ppow.drafting_ppow import what_was_drafted
    from ppow.lossless_ppow import FAULT

    from .evaluate import drafting_options, timed

    options = {"attention_mask": torch.ones_like(ids)}
    timed(target, config.seed, ids, **options, generation_config=plain)  # warm, as the other is
    slow: list[float] = []
    fast: list[float] = []

    def run_plain() -> "torch.Tensor":
        expected, seconds = timed(target, config.seed, ids, **options, generation_config=plain)
        slow.append((expected.shape[1] - ids.shape[1]) / seconds)
        return expected

    same = True
    for number in range(config.repetitions):
        stock = run_plain() if number % 2 == 0 else None
        out, seconds = timed(target, config.seed, ids, **options, generation_config=ours, assistant_model=drafter)
        fast.append((out.sequences.shape[1] - ids.shape[1]) / seconds)
        stock = run_plain() if stock is None else stock
        if same:  # the first repetition whose answers differ is told
            same, expected, found = torch.equal(stock, out.sequences), stock, out.sequences
    plain_rate, rate = statistics.median(slow), statistics.median(fast)
    each = [one / other for one, other in zip(fast, slow)]
    ran = what_was_drafted(out, drafting_options(config))
    answer, differences = "sampled from one distribution", []
    if config.temperature == 0 and not same:
        here, theirs = (sequences[0, ids.shape[1] :].tolist() for sequences in (found, expected))
        differences = drafter.explain(target, ids, here, theirs, ours)
        agrees = "; the same tokens as without drafts" if len(differences) == 1 else ""
        answer = f"identical: NO, {'; '.join(map(str, differences))}{agrees}"
    elif config.temperature == 0:
        answer = "identical: yes"
    length, drafted = out.acceptance.acceptance_length, out.acceptance.drafted[0]
    drafts = statistics.fmean(drafted or [0])
    print(
        f"  speedup {rate / plain_rate:.2f}x ({min(each):.2f} to {max(each):.2f}): plain {plain_rate:.0f} tokens/s, "
        f"with drafter {rate:.0f}; acceptance length {length:.2f} of {drafts:.1f} drafts a window, {ran}; "
        f"{answer}\n",
        flush=True,
    )
    figures: dict = {"plain_tokens_per_second": plain_rate, "tokens_per_second": rate, "speedup": rate / plain_rate}
    figures["speedup_range"] = [min(each), max(each)]
    fault = any(difference.verdict == FAULT for difference in differences)
    figures |= {"acceptance_length": length, "drafts": drafts, "drafting": str(ran), "identical": same, "fault": fault}
    return {**figures, "differences": [dataclasses.asdict(found) for found in differences]}
