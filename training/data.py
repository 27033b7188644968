"""Chats and texts -> token ids with a loss mask on the answers, the draft vocabulary, and the order of batches.

A row holds ``messages`` (role and content each) or ``text``. The mask comes from the chat template's
``{% generation %}`` blocks where it has them, and otherwise from rendering the conversation turn by turn. A row
without a single masked token is an error: templates without generation blocks give silently empty masks elsewhere.
"""

import functools
import gzip
import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from tqdm import tqdm

OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    input_ids: list[int]
    loss_mask: list[int]  # 1 on tokens that the target would write: the answers and their end-of-turn tokens


class Row(dict):
    """A row that knows its ``place``, such as ``file:line``, for errors about it."""

    __slots__ = ("place",)

    def __init__(self, content: dict, place: str):
        super().__init__(content)
        self.place = place


# -- rows --------------------------------------------------------------------------------------------------------------


def load_rows(source: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read rows with ``messages`` or ``text``, each with its place.

    Args:
        source: a .jsonl, .jsonl.gz or .jsonl.xz file, a folder of them (read in name order), or whatever
            ``datasets.load_dataset`` takes: a Hub id, a local dataset folder.
        split: split of a dataset; files have none.
        limit: read at most this many rows.

    Raises:
        ValueError: an unreadable line, a row of another form, no rows at all.
        OSError: a source that does not exist or cannot be reached.
    """
    files = local_files(source)
    located = read_files(files) if files else _read_dataset(source, split)
    rows = []
    for place, row in located:
        if limit is not None and len(rows) == limit:
            break
        _check_row(row, place)
        rows.append(Row(row, place))
    if not rows:
        raise ValueError(f"{source} holds no rows; expected lines with 'messages' or 'text'.")
    return rows


def local_files(source: str) -> list[Path]:
    """The JSONL files that ``source`` names: itself, or those in the folder; empty for anything else."""
    path = Path(source)
    if path.is_dir():
        return sorted(child for child in path.iterdir() if _opener(child) and child.is_file())
    if _opener(path):
        if not path.exists():
            raise FileNotFoundError(f"{source} does not exist.")
        return [path]
    if path.is_file():
        raise ValueError(f"{source} is not one of {', '.join(OPENERS)}; convert it to one JSON object per line.")
    return []


def read_files(files: list[Path]) -> Iterator[tuple[str, dict]]:
    """(``file:line``, row) of every line that is not blank. Raises ValueError for lines that are no JSON object."""
    for path in files:
        with _opener(path)(path, "rt", encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}.")
                    yield f"{path}:{number}", row
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error}).") from None
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is damaged or not what its name says ({error}).") from None


def _opener(path: Path):
    return next((opener for suffix, opener in OPENERS.items() if path.name.endswith(suffix)), None)


def _read_dataset(source: str, split: str) -> Iterator[tuple[str, dict]]:
    for index, row in enumerate(load_hub_dataset(source, split=split)):
        yield f"{source}[{split}] row {index}", {key: value for key, value in row.items() if value is not None}


def load_hub_dataset(source: str, *args, **kwargs):
    """``datasets.load_dataset``, an optional need of those who read from the Hub."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"{source!r} is no local file or folder, and reading it from the Hub needs the package datasets: "
            "pip install datasets, or name local .jsonl files."
        ) from None
    return datasets.load_dataset(source, *args, **kwargs)


def _check_row(row: dict, place: str) -> None:
    if "messages" not in row and isinstance(row.get("text"), str) and row["text"]:
        return
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{place}: expected a non-empty 'messages' list or 'text', got the keys {sorted(row)}. "
            "Rename or convert the column first."
        )
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{place}: a message is {{'role': text, 'content': text}}, got {message!r:.200}.")


# -- tokens and the loss mask ------------------------------------------------------------------------------------------


def encode(rows: Sequence[dict], tokenizer, max_length: int, drop_long: bool = False) -> list[Example]:
    """Tokenize rows and mark the tokens to learn from.

    Args:
        rows: as :func:`load_rows` gives them; errors call a row without ``place`` by its number.
        tokenizer: the target's; rows with ``messages`` need its chat template.
        max_length: tokens kept from the start of a row.
        drop_long: leave out rows whose first answer starts beyond ``max_length`` instead of raising.

    Returns:
        One example per row, in order (fewer with ``drop_long``).

    Raises:
        ValueError: a row whose mask is all zero, a template that fails on a row or rewrites earlier turns.
    """
    examples = []
    for index, row in enumerate(tqdm(rows, desc="tokenizing", unit="row", disable=None, leave=False)):
        place = getattr(row, "place", f"row {index}")
        example = _encode_row(row, tokenizer, place)
        if not any(example.loss_mask):
            raise ValueError(
                f"{place} has no answer token to learn from (its loss mask is all zero). A chat needs an "
                "'assistant' message with content; remove the row or use 'text'."
            )
        if not any(example.loss_mask[:max_length]):
            if drop_long:
                continue
            raise ValueError(
                f"{place}: the answer starts at token {example.loss_mask.index(1)}, beyond "
                f"max_length={max_length}, so its loss mask would be all zero. Raise max_length or drop such rows "
                "(--drop-long)."
            )
        examples.append(Example(example.input_ids[:max_length], example.loss_mask[:max_length]))
    if not examples:
        first = getattr(next(iter(rows), None), "place", "row 0")
        raise ValueError(
            f"None of the {len(rows)} rows from {first} on has an answer within max_length={max_length}; raise it."
        )
    return examples


def _encode_row(row: dict, tokenizer, place: str) -> Example:
    if "messages" not in row:
        ids = tokenizer(row["text"])["input_ids"]
        return Example(ids, [1] * len(ids))
    messages = row["messages"]
    try:
        if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Example(encoded["input_ids"], encoded["assistant_masks"])
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = answer_spans(text, messages, tokenizer, place)
    except TemplateError as error:
        raise ValueError(f"{place}: the tokenizer's chat template refuses this conversation ({error}).") from None
    if not tokenizer.is_fast:
        raise ValueError(
            "A chat template without {% generation %} blocks needs a fast tokenizer (for character offsets); "
            f"{type(tokenizer).__name__} is not one. Add the blocks to the template or convert the tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a < end and b > start for a, b in spans)) for start, end in encoded["offset_mapping"]]
    return Example(encoded["input_ids"], mask)


def answer_spans(text: str, messages: list[dict], tokenizer, place: str = "") -> list[tuple[int, int]]:
    """Character spans of the answers in a rendered conversation, end-of-turn token included.

    An answer starts where the conversation before it, rendered with the generation prompt, ends. It ends with what the
    conversation up to it, rendered alone, shares with ``text``: templates may shorten an earlier answer (Qwen3 drops
    its reasoning), so the longest suffix of that rendering that continues ``text`` at the start counts.

    Args:
        text: ``messages`` rendered by the chat template.
        messages: the conversation.
        tokenizer: owner of the chat template.
        place: names the row in errors.

    Raises:
        ValueError: for a template that renders earlier turns differently once later ones follow.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        start = len(before)
        length = 0
        if text.startswith(before) and through.startswith(before):
            tail = through[start:]
            length = next((n for n in range(len(tail), 0, -1) if text.startswith(tail[-n:], start)), 0)
        if not length:
            raise ValueError(
                f"{place}: cannot find answer {index} in the rendered conversation, because the chat template changes "
                "earlier turns. Mark the answers with {% generation %} ... {% endgeneration %} in the template."
            )
        answer = text[start : start + length]
        stripped = answer.rstrip()
        # The line break after an end-of-turn token belongs to the template: the target never writes it.
        ends_turn = any(token and stripped.endswith(token) for token in tokenizer.all_special_tokens)
        spans.append((start, start + len(stripped if ends_turn else answer)))
    return spans


# -- draft vocabulary --------------------------------------------------------------------------------------------------


def draft_vocabulary(
    examples: Sequence[Example], draft_vocab_size: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens that a drafter can draft: the most frequent among the masked ones.

    Args:
        examples: the training data.
        draft_vocab_size: D; ties go to the lower id, unused places to the lowest ids that never occur.
        vocab_size: V of the target.

    Returns:
        d2t (D,) int64 offsets, target id = i + d2t[i] with ascending target ids; t2d (V,) bool membership.

    Raises:
        ValueError: D outside 1..V, or a token id outside the vocabulary.
    """
    if not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(f"draft_vocab_size={draft_vocab_size} must lie in 1..{vocab_size}, the target's vocabulary.")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for example in examples:
        ids = torch.tensor(example.input_ids, dtype=torch.long)[torch.tensor(example.loss_mask, dtype=torch.bool)]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"Token id {int(ids.max())} lies outside the target's vocabulary of {vocab_size}: the tokenizer "
                "belongs to another model."
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    ranked = torch.sort(counts, descending=True, stable=True).indices  # stable: the lower id first among equals
    chosen = torch.sort(ranked[:draft_vocab_size]).values  # (D,)
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    return chosen - torch.arange(draft_vocab_size), t2d


# -- batches -----------------------------------------------------------------------------------------------------------


def batch_indices(n_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples batch number ``step`` (from 0) holds: a pure function, so a resumed run continues exactly.

    Every epoch is a permutation of its own; a batch may span two. With several processes or micro steps, take the
    global batch and slice it.
    """
    if n_examples < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"n_examples={n_examples} and batch_size={batch_size} must be >= 1 and step={step} >= 0.")
    places = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(n_examples, seed, place // n_examples)[place % n_examples] for place in places]


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # Python's generator: the same on every version and machine
    return order


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-pad: input_ids (B, T) int64, loss_mask (B, T) bool, attention_mask (B, T) int64."""
    if not examples:
        raise ValueError("An empty batch cannot be collated.")
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    loss_mask = torch.zeros(len(examples), length, dtype=torch.bool)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[row, :size] = torch.tensor(example.input_ids)
        loss_mask[row, :size] = torch.tensor(example.loss_mask, dtype=torch.bool)
        attention_mask[row, :size] = 1
    return {"input_ids": input_ids, "loss_mask": loss_mask, "attention_mask": attention_mask}
