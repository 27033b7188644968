"""How fast a target writes the answers of ``ppow regenerate``: rows that are filled anew, against plain batches.

Also against transformers' ``generate_batch``, with whatever attention it chooses (FlashAttention where that is there).

    python -m benchmarks.answers --target T --data prompts.jsonl --limit 8000 --output benchmarks/results/answers.json

All answer the same prompts, greedily, the shortest prompts first as ``ppow regenerate`` does. Seconds are those of
asking and answering, with graphs to be recorded, without loading the model; tokens are those that the answers hold.
"""

import argparse
import collections
import time

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from ppow.training.config import RegenerateConfig
from ppow.training.data import BadRows, load_rows
from ppow.training.regenerate import turns
from ppow.training.rows import options_of
from ppow.training.writers import Asked, LocalWriter, answers

from .machine import synchronize
from .report import add_output, facts, save

WAYS = {
    "batches": "plain batches of generate()",
    "slots": "rows that are filled anew",
    "continuous": "continuous batching of transformers",
}


def main(argv=None) -> dict:
    """Run the command: -> its report."""
    arguments = parse(argv)
    rows = [row for row in load_rows(arguments.data, "train", arguments.limit, BadRows(True)) if row.get("messages")]
    prompts = [Asked(turns(row["messages"])[0], options_of(row)) for row in rows]
    prompts.sort(key=lambda prompt: len(str(prompt.messages)))
    report = facts("answers", arguments, argv) | {"prompts": len(prompts), "ways": {}}
    texts = {}
    for way in arguments.ways.split(","):
        options = {"dtype": arguments.dtype, "max_new_tokens": arguments.new, "batch_size": arguments.batch_size}
        writer = LocalWriter(RegenerateConfig(target=arguments.target, data="-", output="-", **options))
        if way == "batches":
            writer.obstacle = WAYS[way]
        elif way == "slots" and writer.obstacle is not None:
            raise ValueError(f"--target {arguments.target}: {writer.obstacle}")
        texts[way], seconds = (answer_continuously if way == "continuous" else answer_all)(writer, prompts)
        tokens = sum(len(ids) + 1 for ids in writer.tokenizer(texts[way], add_special_tokens=False)["input_ids"])
        report["ways"][way] = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
        print(f"{WAYS[way]}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", flush=True)
        del writer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if {"slots", "batches"} <= set(texts):
        speeds = {way: report["ways"][way]["tokens_per_second"] for way in texts}
        report["speedup"] = speeds["slots"] / speeds["batches"]
        report["same_answers"] = sum(map(str.__eq__, texts["slots"], texts["batches"])) / len(prompts)
        print(f"{report['speedup']:.2f}x; {report['same_answers']:.1%} of the answers are the same")
    return save(report, arguments.output)


def answer_all(writer: LocalWriter, prompts: list[Asked]) -> tuple[list[str], float]:
    """The answers to prompts, with at most ``writer.size`` under way, and the seconds it took."""
    waiting = collections.deque((number, prompt, 0) for number, prompt in enumerate(prompts))
    synchronize(writer.model.device)
    start = time.perf_counter()
    found = dict(answers(writer, waiting))
    seconds = time.perf_counter() - start
    messages = (found[number].message for number in range(len(prompts)))
    return [message["content"] if message else "" for message in messages], seconds


def answer_continuously(writer: LocalWriter, prompts: list[Asked]) -> tuple[list[str], float]:
    """The same by ``generate_batch``."""
    new = writer.config.max_new_tokens
    options = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=sorted(writer.ends), pad_token_id=0)
    synchronize(writer.model.device)
    start = time.perf_counter()
    # on a CPU it would take most of the memory for its cache
    sizes = {} if writer.model.device.type == "cuda" else {"num_blocks": 64, "max_batch_tokens": 256}
    made = writer.model.generate_batch(
        [writer.read(prompt)[1] for prompt in prompts],
        generation_config=options,
        continuous_batching_config=ContinuousBatchingConfig(**sizes),
    )
    seconds = time.perf_counter() - start
    by_prompt = sorted(made.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
    ended = ([token for token in output.generated_tokens if token not in writer.ends] for output in by_prompt)
    return [writer.tokenizer.decode(ids) for ids in ended], seconds


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="answers.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, help="prompts, as `ppow regenerate` takes them")
    parser.add_argument("--limit", type=int, help="take this many rows")
    parser.add_argument("--new", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--batch-size", type=int, help="answers under way at once; none: the command's own")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--ways", default="batches,slots", help=f"comma separated, of {', '.join(WAYS)}")
    add_output(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
