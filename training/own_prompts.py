"""Let a chat model write prompts of its own, so that a drafter can be trained without any data.

    ppow prompts --target TARGET --count 20000 --output prompts.jsonl
    ppow regenerate --target TARGET --data prompts.jsonl --output answers.jsonl

A chat model that is given the opening of a user's turn, and nothing else, completes it with what users ask it (Magpie,
arXiv 2406.08464). Kept is what ends by itself, is not empty, does not loop, holds no part of the template, and was not
written before (letter case, spaces and punctuation aside). How far temperature and length go is ours.

The output is a JSONL file of ``{"draw", "messages", "by"}``, ready for ``ppow regenerate``; ``draw`` numbers the calls
of ``generate``. Lines are appended call by call, so an interrupted run goes on with ``--resume``.
"""

import collections
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .config import PromptsConfig
from .figures import ends_in_a_loop
from .files import append, claim_file, whole
from .loading import load_tokenizer, named, place_of

_MARK = "PPOW-PROMPT"  # stands for a user's words while the template is read
_PATIENCE = 20  # calls without a new prompt after which the target has said what it has to say


class Opening(NamedTuple):
    """A chat template around a user's first words.

    Attributes:
        text: what stands before them.
        behind: what follows them.
    """

    text: str
    behind: str

    def end(self) -> str:
        """The first word behind them, which ends a turn."""
        return self.behind.split()[0]


def opening(tokenizer: PreTrainedTokenizerBase) -> Opening:
    """Read it off the tokenizer's chat template. Raises ValueError for a template that shows no user's words."""
    message = {"role": "user", "content": _MARK}
    try:
        text = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # no template, or one that fails
        raise ValueError(f"This tokenizer's chat template cannot open a user's turn: {error}") from error
    before, found, behind = text.partition(_MARK)
    if not found or not behind.strip():
        raise ValueError(
            "This tokenizer's chat template does not show where a user's words begin and end; bring prompts instead."
        )
    return Opening(before, behind)


def main(config: PromptsConfig) -> None:
    """Write the prompts to ``config.output``, which is this run's alone meanwhile.

    Raises:
        ValueError: a name that leads to no target, one without a chat template, an output that cannot be continued, or
            a target that writes nothing of use.
        OSError: what cannot be read or written.
    """
    with claim_file(config.output):
        write(config)


def write(config: PromptsConfig) -> None:
    """The command itself, once the output is this run's alone."""
    import torch
    from transformers import AutoModelForCausalLM

    output = Path(config.output)
    name = Path(config.target).resolve().name if Path(config.target).exists() else config.target
    by = {"model": name, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    seen, draw = written_before(output, by, config.resume)
    with named("target", config.target):
        tokenizer = load_tokenizer(config.target)
        opened = opening(tokenizer)
        target = AutoModelForCausalLM.from_pretrained(**place_of(config.target), dtype=getattr(torch, config.dtype))
    target.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    given = tokenizer(opened.text, add_special_tokens=False, return_tensors="pt").input_ids.to(target.device)
    known = target.generation_config.eos_token_id
    ends = set(known if isinstance(known, list) else [known] if known is not None else [])
    first = tokenizer(opened.end(), add_special_tokens=False).input_ids[0]
    of_its_own = first in tokenizer.get_added_vocab().values()  # a token; else words tell the end
    ends |= {first} if of_its_own else set()
    stops = {} if of_its_own else {"stop_strings": [opened.end()], "tokenizer": tokenizer}
    left_out: collections.Counter[str] = collections.Counter()
    in_vain = 0
    with tqdm(total=config.count, initial=min(len(seen), config.count), desc="prompts") as bar:
        while len(seen) < config.count:
            torch.manual_seed((config.seed * 1_000_003 + draw) & 0x7FFFFFFF)
            made = target.generate(
                given.expand(config.batch_size, -1),
                attention_mask=torch.ones_like(given).expand(config.batch_size, -1),
                max_new_tokens=config.max_new_tokens,
                do_sample=True,
                temperature=config.temperature,
                top_k=0,
                top_p=1.0,
                eos_token_id=sorted(ends) or None,
                pad_token_id=next(iter(ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                **stops,
            )
            lines = []
            for ids in made[:, given.shape[1] :].tolist():
                text, fault = judged(ids, ends, tokenizer, opened, seen)
                if fault is None and len(seen) < config.count:
                    seen.add(plain(text))
                    line = {"draw": draw, "messages": [{"role": "user", "content": text}], "by": by}
                    lines.append(json.dumps(line, ensure_ascii=False) + "\n")
                elif fault is not None:
                    left_out[fault] += 1
            if lines:
                with open(output, "ab", buffering=0) as out:
                    append(out, "".join(lines).encode("utf-8"))
            in_vain = 0 if lines else in_vain + 1
            if in_vain == _PATIENCE:
                break
            draw += 1
            bar.update(len(lines))
    if left_out:
        print(f"ppow: {output}: left out: {dict(left_out.most_common())}", file=sys.stderr)
    if len(seen) < config.count:
        raise ValueError(
            f"{_PATIENCE} calls brought nothing new: {output} holds {len(seen)} prompts of {config.count}. Raise "
            "--temperature or --max-new-tokens, ask for fewer, or bring prompts of your own."
        )


def judged(
    ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase, opened: Opening, seen: set[str]
) -> tuple[str, str | None]:
    """What a user's turn says, and why it is of no use; None if it is."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text, ended, _ = tokenizer.decode(ids[:end], skip_special_tokens=True).partition(opened.end())
    text = text.strip()
    if end is None and not ended:
        return text, "unfinished"
    if len(text.split()) < 2:
        return text, "empty"
    if ends_in_a_loop(ids[:end]):
        return text, "looping"
    parts = {line.strip() for line in (opened.text + opened.behind).splitlines()}
    if any(len(part) > 3 and part in text for part in parts):
        return text, "template"
    return text, "written before" if plain(text) in seen else None


def plain(text: str) -> str:
    """A prompt without letter case, spaces and punctuation, by which two are told apart."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def written_before(output: Path, by: dict, resume: bool) -> tuple[set[str], int]:
    """The prompts that an output holds already, in plain, and the call to go on with; a torn last line is cut off.

    Raises:
        ValueError: the file exists and the run is not to be resumed, or it holds something else.
    """
    if not output.exists():
        return set(), 0
    if not resume:
        raise ValueError(f"{output} exists already; pass --resume to continue it, or name another output.")
    content = output.read_bytes()
    *lines, torn = content.split(b"\n")
    seen, draw = set(), 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            (message,), draw, other = row["messages"], row["draw"], row["by"]
            seen.add(plain(message["content"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{output}:{number} is no prompt that `ppow prompts` wrote; name another output."
            ) from None
        if other != by:
            raise ValueError(f"{output}:{number} was written by {other}, not by {by}; name another output.")
    if torn:
        with whole(output) as partial:
            partial.write_bytes(content[: len(content) - len(torn)])
    return seen, draw + 1 if lines else 0
