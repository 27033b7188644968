"""Let a chat model write prompts of its own, so that a drafter can be trained without any data.

    ppow prompts --target TARGET --count 20000 --output prompts.jsonl
    ppow regenerate --target TARGET --data prompts.jsonl --output answers.jsonl

A chat model that is given the opening of a user's turn completes it with what users ask it
(:mod:`ppow.training.openings`). Kept is what ends by itself, is not empty, does not loop, holds no part of the
template, and was not written before (letter case, spaces and the marks of a sentence aside). The filters are ours.

The output is a JSONL file of ``{"draw", "messages", "by"}``, ready for ``ppow regenerate``; ``draw`` numbers what
was sampled, and each follows from its number and the seed, up to rounding. Lines are appended in that order as they
come, so an interrupted run goes on with ``--resume``. Prompts are written in :class:`ppow.training.slots.Slots`, whose
rows never wait for the longest, where the target allows it, else in batches of ``generate``.
"""

import collections
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .config import PromptsConfig
from .figures import ends_in_a_loop
from .files import append, claim_file, whole
from .loading import load_model, load_tokenizer, named, positions
from .openings import Opening, marks_of, openings, pairs_of
from .sources import say

HEAD = b'{"draw": '  # how a line of the output starts
_PATIENCE = 640  # samples without a new prompt after which the target has said what it has to say


def main(config: PromptsConfig) -> float:
    """Write the prompts to ``config.output``, which is this run's alone meanwhile.

    Returns:
        The seconds that writing took, without loading the target.

    Raises:
        ValueError: a name that leads to no target, one without a chat template, an output that cannot be continued, or
            a target that writes nothing of use.
        OSError: what cannot be read or written.
    """
    with claim_file(config.output):
        return write(config)


def write(config: PromptsConfig) -> float:
    """The command itself, once the output is this run's alone."""
    import torch

    output = Path(config.output)
    name = Path(config.target).resolve().name if Path(config.target).exists() else config.target
    with named("target", config.target):
        tokenizer = load_tokenizer(config.target)
    every = openings(tokenizer, config.openings)
    by = {"model": name, **config.to_dict(without={"target", "output", "count", "resume", "openings"})}
    by["openings"] = hashlib.sha256(json.dumps(pairs_of(config.openings)).encode()).hexdigest()[:16]
    seen, draw = written_before(output, by, config.resume)
    with named("target", config.target):
        target = load_model(config.target, dtype=getattr(torch, config.dtype))
    target.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    limit = positions(target.config) or sys.maxsize
    begun = [one for one in every if len(one.ids) <= limit // 2]  # room is for what is to be written
    if len(begun) < len(every):
        say(f"{len(every) - len(begun)} of {len(every)} openings take more than half of the target's {limit} positions")
    if not begun:
        raise ValueError(f"Every opening of a user's turn takes more than half of the target's {limit} positions.")
    ends, words = ends_of(target, tokenizer, every[0])
    room = limit - max(len(one.ids) for one in begun)
    target.generation_config = GenerationConfig(  # nothing of the target's own shapes what it says
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        max_new_tokens=min(config.max_new_tokens, room),
        eos_token_id=sorted(ends) or None,
        pad_token_id=next(iter(ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        stop_strings=words,
    )
    left_out: collections.Counter[str] = collections.Counter()
    in_vain, began = 0, time.perf_counter()
    marks = marks_of(tokenizer)
    with tqdm(total=config.count, initial=min(len(seen), config.count), desc="prompts") as bar:
        samples = sampled(target, tokenizer, [one.ids for one in begun], ends, config, draw)
        while len(seen) < config.count and in_vain < _PATIENCE:
            lines = []
            for draw, ids in next(samples):
                opened = begun[draw % len(begun)]
                text, fault = judged(ids, ends, marks, tokenizer, opened, seen, config.max_new_tokens)
                in_vain = 0 if fault is None else in_vain + 1
                if fault is not None:
                    left_out[fault] += 1
                elif len(seen) < config.count:
                    seen.add(plain(text))
                    line = {"draw": draw, "messages": [{"role": "user", "content": text}], "by": by}
                    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            if lines:
                with open(output, "ab", buffering=0) as out:
                    append(out, "".join(lines).encode("utf-8"))
            bar.update(len(lines))
    seconds = time.perf_counter() - began
    if left_out:
        print(f"ppow: {output}: left out: {dict(left_out.most_common())}", file=sys.stderr)
    if len(seen) < config.count:
        raise ValueError(
            f"{in_vain} samples brought nothing new: {output} holds {len(seen)} prompts of {config.count}. Ask for "
            "fewer, bring prompts of your own, or write other ones into another file, with a higher --temperature or "
            "--max-new-tokens."
        )
    print(f"{len(seen)} prompts are in {output}, of which `ppow regenerate --data {output}` makes answers.")
    return seconds


def sampled(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: list[list[int]],
    ends: set[int],
    config: PromptsConfig,
    first: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """What the target says after each of ``given`` in turn, without end.

    Returns:
        Some (draw, tokens) at a time, in order from ``first``; draw i goes on from ``given[i % len(given)]``.
    """
    import torch

    from .slots import Request, Slots, obstacle, rows_that_fit

    room = target.generation_config.max_new_tokens
    longest = max(map(len, given))
    capacity = longest + room
    if obstacle(target) is None:
        slots = Slots(target, rows_that_fit(target, config.batch_size, capacity), capacity, config.temperature, ends)
        following, done = first, dict[int, list[int]]()
        while True:
            free = slots.free
            draws = range(following, following + free)
            slots.fill([Request(i, given[i % len(given)], room, _seed(config, i)) for i in draws])
            following += free
            done |= slots.collect()
            ready = []
            while first in done:
                ready.append((first, done.pop(first)))
                first += 1
            if ready:
                yield ready
    first -= first % config.batch_size  # that call of ``generate`` again
    while True:
        torch.manual_seed(_seed(config, first))
        rows = [given[draw % len(given)] for draw in range(first, first + config.batch_size)]
        padding = [longest - len(ids) for ids in rows]  # on the left
        batch = torch.tensor([[0] * pad + ids for pad, ids in zip(padding, rows)], device=target.device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=target.device)
        made = target.generate(batch, attention_mask=mask, tokenizer=tokenizer)
        yield list(enumerate(made[:, longest:].tolist(), first))
        first += len(batch)


def _seed(config: PromptsConfig, draw: int) -> int:
    return (config.seed * 1_000_003 + draw) & 0x7FFFFFFF


def ends_of(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opened: Opening
) -> tuple[set[int], list[str] | None]:
    """The tokens that end a user's turn; and the words, where the template ends it with no token of its own."""
    known = target.generation_config.eos_token_id
    ends = set(known if isinstance(known, list) else [known] if known is not None else [])
    first = tokenizer(opened.end(), add_special_tokens=False).input_ids[0]
    if first in tokenizer.get_added_vocab().values():
        return ends | {first}, None
    return ends, [opened.end()]


def judged(
    ids: list[int],
    ends: set[int],
    marks: set[int],
    tokenizer: PreTrainedTokenizerBase,
    opened: Opening,
    seen: set[str],
    most: int = sys.maxsize,
) -> tuple[str, str | None]:
    """What a user's turn says, and why it is of no use; None if it is.

    Args:
        ids: what the target wrote behind the opening.
        ends: tokens that end a turn.
        marks: tokens that no turn holds.
        seen: prompts written before, in :func:`plain`.
        most: tokens that a prompt may have.
    """
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    parts = opened.ids + ids[:end], opened.ids
    whole, begun = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    added = whole[len(begun) :]  # some decoders drop the space that a text begins with
    added, ended, _ = added.partition(opened.end())
    text = (opened.words + added).strip()
    if end is None and not ended:
        return text, "unfinished"
    if not added.strip() or (text.isascii() and len(text.split()) < 2):  # other scripts write words without spaces
        return text, "empty"
    said = tokenizer(text, add_special_tokens=False).input_ids
    if len(said) > most:
        return text, "too long"
    if ends_in_a_loop(said):
        return text, "looping"
    if not ended and marks & set(ids[:end]):
        return text, "template"
    return text, "written before" if plain(text) in seen else None


def plain(text: str) -> str:
    """A prompt without letter case, spaces and a sentence's marks, by which two are told apart."""
    return re.sub(r"[\s.,!?;:\"']+", " ", text.casefold()).strip()


def written_before(output: Path, by: dict, resume: bool) -> tuple[set[str], int]:
    """The prompts that an output holds already, in plain, and the draw to go on with; a torn last line is cut off.

    Raises:
        ValueError: the file exists and the run is not to be resumed, or it holds something else.
    """
    if not output.exists():
        return set(), 0
    if not resume:
        raise ValueError(f"{output} exists already; pass --resume to continue it, or name another output.")
    content = output.read_bytes()
    *lines, torn = content.split(b"\n")
    seen, draw = set(), -1
    if torn[: len(HEAD)] != HEAD[: len(torn)]:
        raise ValueError(f"{output} ends with what `ppow prompts` did not write; name another output.")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            (message,), draw, other = row["messages"], row["draw"], row["by"]
            seen.add(plain(message["content"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{output}:{number} is no prompt that `ppow prompts` wrote; name another output."
            ) from None
        if other != by:
            raise ValueError(f"{output}:{number} was written by {other}, not by {by}; name another output.")
    if torn:
        with whole(output) as partial:
            partial.write_bytes(content[: len(content) - len(torn)])
    return seen, draw + 1
