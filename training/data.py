"""Rows -> token ids with a loss mask on the answers, the draft vocabulary, and the order of batches.

A row holds a chat or a text, in the forms of docs/data.md. Of a chat the tokens count that the target would write after
the chat template's generation prompt. A row without a single such token is a bad row: templates without generation
blocks give silently empty masks elsewhere.
"""

import array
import collections
import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .chats import Chat
from .rows import normal, options_of
from .sources import BadRow, read_source, say

SHOWN = 20  # bad rows that are named; the others are counted
TOGETHER, CHARACTERS = 256, 1 << 22  # rows and letters that are tokenized in one call, about


class Example(NamedTuple):
    """One text to learn from: its ids, and 1 on the tokens that the target would write, end-of-turn tokens included."""

    input_ids: list[int]
    loss_mask: list[int]


class Row(dict):
    """A row that knows its ``place``, such as ``file:line``, for errors about it, and its ``number`` in the data."""

    __slots__ = ("number", "place")

    def __init__(self, content: dict, place: str, number: int):
        super().__init__(content)
        self.place, self.number = place, number


class BadRows:
    """What becomes of rows that cannot be used: the first one is an error, or they are skipped, counted and named.

    Attributes:
        found: (place, reason) of the bad rows.
        left_out: how many rows were left out for other reasons, by reason.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.found: list[tuple[str, str]] = []
        self.left_out: collections.Counter[str] = collections.Counter()

    def add(self, place: str, reason: object) -> None:
        """Note a bad row. Raises ValueError, which names it, where bad rows are not skipped."""
        if not self.skip:
            raise ValueError(f"{place}: {reason} To go on without such rows: --skip-bad-rows.")
        self.found.append((place, str(reason)))

    def report(self, source: str) -> None:
        """Say on stderr what was left out, if anything."""
        for reason, count in self.left_out.items():
            say(f"{source}: {count} rows left out: {reason}")
        if self.found:
            say(f"{source}: {len(self.found)} bad rows skipped")
        for place, reason in self.found[:SHOWN]:
            say(f"  {place}: {reason}")
        if len(self.found) > SHOWN:
            say(f"  and {len(self.found) - SHOWN} more")


# -- rows --------------------------------------------------------------------------------------------------------------


def load_rows(source: str, split: str = "train", limit: int | None = None, bad: BadRows | None = None) -> list[Row]:
    """Read rows in the one form of :func:`ppow.training.rows.normal`, ``messages`` or ``text``, each with its place.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, packed or not, or .parquet), a folder of them (read in name order),
            or whatever ``datasets.load_dataset`` takes: a Hub id, a local dataset folder.
        split: split of a dataset; files have none.
        limit: read at most this many rows, bad ones not counted.
        bad: takes the bad rows; None: the first is an error.

    Raises:
        ValueError: a bad row that is not skipped, a damaged file, no rows at all.
        OSError: a source that does not exist or cannot be reached.
    """
    bad = BadRows() if bad is None else bad
    rows: list[Row] = []
    for number, (place, raw) in enumerate(read_source(source, split)):
        if limit is not None and len(rows) == limit:
            break
        try:
            if isinstance(raw, BadRow):
                raise raw
            rows.append(Row(normal(raw), place, number))
        except BadRow as error:
            bad.add(place, error)
    if not rows:
        bad.report(source)
        raise ValueError(f"{source} holds no rows; expected chats or texts, one a line (docs/data.md).")
    return rows


# -- tokens and the loss mask ------------------------------------------------------------------------------------------


def encode(
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    drop_long: bool = False,
    bad: BadRows | None = None,
    positions: int | None = None,
) -> list[Example]:
    """Tokenize rows and mark the tokens to learn from.

    Args:
        rows: as :func:`load_rows` gives them; errors call a row without ``place`` by its number.
        tokenizer: the target's; rows with ``messages`` need its chat template.
        max_length: tokens kept from the start of a row.
        drop_long: leave out rows whose first answer starts beyond ``max_length``, whatever ``bad`` does.
        bad: takes the bad rows; None: the first is an error.
        positions: of the target; a row whose first answer starts beyond them is a bad row.

    Returns:
        Examples in the order of the rows: one for each, or several where the chat template shows earlier answers
        otherwise than the target wrote them (:meth:`ppow.training.chats.Chat.answers`).

    Raises:
        ValueError: a bad row that is not skipped (its mask all zero, a template that fails on it or hides its answers),
            no example at all, a tokenizer that cannot do it.
    """
    bad = BadRows() if bad is None else bad
    if any("messages" in row for row in rows):
        tokenizer.get_chat_template()  # says what is missing
        if not tokenizer.is_fast:
            raise ValueError(
                "Finding the answers of a chat needs a fast tokenizer (for character offsets); "
                f"{type(tokenizer).__name__} is not one. Convert it, or give rows of 'text'."
            )
    examples, shown = [], tqdm(rows, desc="tokenizing", unit="row", disable=None, leave=False)
    for index, (row, encoded) in enumerate(zip(shown, _encoded(rows, tokenizer))):
        place = getattr(row, "place", f"row {index}")
        try:
            examples += _fitting(_learnable(row, encoded), max_length, drop_long, positions, bad)
        except _Unanswered:
            bad.left_out["`ppow regenerate` got no answer for them"] += 1
        except BadRow as error:
            bad.add(place, error)
    if not examples:
        bad.report("data")
        first = getattr(next(iter(rows), None), "place", "row 0")
        raise ValueError(
            f"None of the {len(rows)} rows from {first} on has an answer within max_length={max_length}; raise it."
        )
    return examples


class _Unanswered(Exception):
    """A row of `ppow regenerate` without an answer: recorded as such, so no bad row."""


def _fitting(
    examples: list[Example], max_length: int, drop_long: bool, positions: int | None, bad: BadRows
) -> list[Example]:
    """A row's examples, cut to the length; those whose answer starts beyond it are left out."""
    limit = max_length if positions is None else min(max_length, positions)
    fitting = [Example(e.input_ids[:limit], e.loss_mask[:limit]) for e in examples if any(e.loss_mask[:limit])]
    if fitting:
        return fitting
    start = examples[0].loss_mask.index(1)
    if drop_long and start >= max_length:
        bad.left_out[f"the answer starts beyond max_length={max_length} (--drop-long)"] += 1
        return []
    if limit < max_length:
        raise BadRow(f"the answer starts at token {start}, but the target has only {positions} positions.")
    raise BadRow(
        f"the answer starts at token {start}, beyond max_length={max_length}, so its loss mask would be all zero. "
        "Raise max_length or drop such rows (--drop-long)."
    )


def _learnable(row: dict, encoded: list[Example] | BadRow) -> list[Example]:
    """The examples of a row that have a masked token. Raises BadRow."""
    if isinstance(encoded, BadRow):
        raise encoded
    examples = [example for example in encoded if any(example.loss_mask)]
    if not examples and "by" in row and row.get("complete") is False:
        raise _Unanswered
    if not examples:
        raise BadRow(
            "no answer token to learn from (its loss mask is all zero). A chat needs an 'assistant' message with "
            "content after a user's."
        )
    return examples


class Marked(NamedTuple):
    """A text to tokenize: the ``spans`` of its characters that the target wrote, and a mask that the template gave."""

    text: str
    spans: list[tuple[int, int]]
    mask: list[int] | None

    def example(self, ids: list[int], offsets: list[tuple[int, int]]) -> Example:
        """Its tokens. One that starts before an answer does is the prompt's."""
        begins, ends = np.array(offsets, dtype=int).reshape(-1, 2).T
        inside = np.zeros(len(ids), dtype=bool)
        for start, end in self.spans:
            inside |= (begins >= start) & (begins < end) & (ends > begins)
        mask = inside.astype(int).tolist()
        return Example(ids, mask if self.mask is None else [ours & theirs for ours, theirs in zip(mask, self.mask)])


def _encoded(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Example] | BadRow]:
    """The examples of each row, or why it has none; many texts are tokenized in one call, on all processors."""
    found: list[list[Example | Marked] | BadRow] = []
    size = 0
    for number, row in enumerate(rows, 1):
        try:
            parts = _parts_of(row, tokenizer)
            size += sum(len(part.text) for part in parts if isinstance(part, Marked))
            found.append(parts)
        except BadRow as error:
            found.append(error)
        if number == len(rows) or len(found) == TOGETHER or size > CHARACTERS:
            yield from _tokenized(found, tokenizer)
            found, size = [], 0


def _tokenized(
    found: list[list[Example | Marked] | BadRow], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Example] | BadRow]:
    parts = [part for known in found if not isinstance(known, BadRow) for part in known]
    texts = [part.text for part in parts if isinstance(part, Marked)]
    how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(texts, **how) if texts else {"input_ids": [], "offset_mapping": []}
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"])
    for known in found:
        if isinstance(known, BadRow):
            yield known
        else:
            yield [part if isinstance(part, Example) else part.example(*next(pairs)) for part in known]


def _parts_of(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[Example | Marked]:
    """What a row's examples come from. Raises BadRow."""
    if "messages" not in row:
        ids = tokenizer(row["text"], verbose=False)["input_ids"]
        return [Example(ids, [1] * len(ids))]
    messages = row["messages"]
    chat, cut = Chat(messages, options_of(row), tokenizer), row.get("complete") is False
    plain = not any(message.get("tool_calls") or "weight" in message for message in messages)
    if chat.has_blocks() and plain and not cut and not chat.knows_thoughts():
        return [Example(*chat.marked())]  # as the template says, without rendering turn by turn
    try:
        found = list(chat.answers(cut))
    except BadRow:
        if not (chat.has_blocks() and plain) or cut:
            raise
        return [Example(*chat.marked())]
    blocks = chat.has_blocks()
    return [
        Marked(text, spans, chat.marked(count)[1] if blocks and count is not None else None)
        for text, spans, count in found
    ]


def fingerprint(examples: Sequence[Example]) -> str:
    """Of what is learned from, token by token: the same data gives the same one, wherever its files lie."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(array.array("q", example.input_ids).tobytes())
        digest.update(bytes(map(bool, example.loss_mask)))
    return digest.hexdigest()


# -- draft vocabulary --------------------------------------------------------------------------------------------------


def rarest_token(examples: Sequence[Example], vocab_size: int) -> int:
    """The last id that no text holds; where all occur, the last of the rarest."""
    held = array.array("q")
    for example in examples:
        held.extend(example.input_ids)
    counts = torch.bincount(torch.tensor(held, dtype=torch.long), minlength=vocab_size)
    return vocab_size - 1 - int(counts.flip(0).argmin())


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
    learned = array.array("q")
    for example in examples:
        learned.extend(itertools.compress(example.input_ids, example.loss_mask))
    ids = torch.tensor(learned, dtype=torch.long)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"Token id {int(ids.max())} lies outside the target's vocabulary of {vocab_size}: the tokenizer "
            "belongs to another model."
        )
    counts = torch.bincount(ids, minlength=vocab_size)
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


@dataclass
class Batch:
    """One micro step's texts on this process, right-padded.

    Attributes:
        input_ids: (B, T) int64.
        loss_mask: (B, T) bool, tokens to learn from.
        lengths: (B,) int64 tokens before the padding.
        seed: seeds whatever the micro step draws; differs for every micro step of every process.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    lengths: torch.Tensor
    seed: int

    def generator(self) -> torch.Generator:
        """A fresh CPU generator; the same numbers on every device and on every call."""
        return torch.Generator().manual_seed(self.seed)


def make_batch(examples: Sequence[Example], pad_id: int, device: torch.device | str, seed: int) -> Batch:
    """Right-pad some texts to the longest, on a device."""
    if not examples:
        raise ValueError("An empty batch cannot be made.")
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    input_ids = torch.full((len(examples), int(lengths.max())), pad_id)
    loss_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = torch.tensor(example.input_ids)
        loss_mask[row, : lengths[row]] = torch.tensor(example.loss_mask, dtype=torch.bool)
    input_ids, loss_mask, lengths = to_device([input_ids, loss_mask, lengths], torch.device(device))
    return Batch(input_ids, loss_mask, lengths, seed)


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same on a device; a GPU gets them in its turn, and nobody waits for what it has still to do."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
