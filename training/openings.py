"""How a target is brought to write prompts: its chat template up to a user's first words.

A chat model that is given the opening of a user's turn, and nothing else, completes it with what users ask it (Magpie,
arXiv 2406.08464, whose authors also steer the subject by a system message). A small model keeps to a subject only when
the turn has begun with words of it, too, so an opening here is both: a system message and first words (ours). The
prompt that is kept has the words, not the system message.
"""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_MARK = "PPOW-PROMPT"  # stands for a user's words while the template is read
_MATHS = "You are a math tutor. The user gives you a math word problem, and you solve it step by step."
_CODE = "You are a programming assistant. The user asks you to write a Python function."
_FACTS = "You answer questions about science, history and geography."
# System message -> first words of the user. Each pair gets an equal share of the draws: 6 of 36 have the template alone
# ("" six times), 9 each are problems of mathematics and programs, which a target seldom asks for by itself.
_KINDS: dict[str, list[str]] = {
    "": [""] * 6,
    _MATHS: ["A store sells", "A train", "Each", "How many", "If", "In a", "Mary has", "There are", "Tom"],
    _CODE: ["Create a function", "def", "from typing import List\n\n\ndef", "I have a list", "Implement", "Write a"]
    + ['def solve(n):\n    """', "Fix this code:", "How do I"],
    _FACTS: ["Explain", "What", "Why"],
    "You are a writing assistant.": ["Write a short", "Write an email", "Compose a"],
    "You play the role that the user chooses.": ["Act as", "Imagine you are"],
    "You solve riddles and logic puzzles.": ["Suppose", "Three"],
    "You edit texts that the user gives you.": ["Rewrite the following", "Summarize"],
}
# Evenly mixed: a few that follow each other are of several kinds, so that a run with few prompts has them, too.
_PLACED = sorted(
    (place / len(kind), system, kind[place]) for system, kind in _KINDS.items() for place in range(len(kind))
)
OPENINGS = [(system, words) for _, system, words in _PLACED]


class Opening(NamedTuple):
    """A chat template around a user's words.

    Attributes:
        text: what stands before them.
        behind: what follows them.
        words: the first of them.
        ids: the tokens of both, text and words.
    """

    text: str
    behind: str
    words: str
    ids: list[int]

    def end(self) -> str:
        """The first word after them, which ends a turn."""
        return self.behind.split()[0]


def opening(tokenizer: PreTrainedTokenizerBase, system: str = "", words: str = "") -> Opening:
    """Read it off the tokenizer's chat template. Raises ValueError for a template that shows no user's words."""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # no template, or one that fails
        raise ValueError(f"This tokenizer's chat template cannot open a user's turn: {error}") from error
    before, found, behind = text.partition(_MARK)
    if not found or not behind.strip():
        raise ValueError(
            "This tokenizer's chat template does not show where a user's words begin and end; bring prompts instead."
        )
    return Opening(before, behind, words, tokenizer(before + words, add_special_tokens=False).input_ids)


def marks_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no user's turn holds: special ones, and others that were added, but for runs of spaces."""
    added = tokenizer.get_added_vocab()
    return {*tokenizer.all_special_ids, *(token for text, token in added.items() if text.strip())}


def pairs_of(file: str | None) -> list[tuple[str, str]]:
    """System message and first words of each opening: of a JSONL file of rows, or :data:`OPENINGS`.

    Raises:
        ValueError: a file that holds something else, or nothing.
        OSError: one that cannot be read.
    """
    if file is None:
        return OPENINGS
    found = []
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row or not row.keys() <= {"system", "user"}:
                raise ValueError('expected {"system": ..., "user": ...}, one of the two or both')
            if not all(isinstance(value, str) for value in row.values()):
                raise ValueError('"system" and "user" must be text')
            "".join(row.values()).encode()
        except ValueError as error:
            raise ValueError(f"{file}:{number} is no opening of a chat: {error}") from error
        found.append((row.get("system", ""), row.get("user", "")))
    if not found:
        raise ValueError(f'{file} holds no opening; write one a line, such as {{"user": "Write a poem"}}.')
    return found


def openings(tokenizer: PreTrainedTokenizerBase, file: str | None = None) -> list[Opening]:
    """All that draws take turns with: those of :func:`pairs_of` in the tokenizer's chat template.

    Raises:
        ValueError: a file or template that is of no use. Where a template takes no system messages, the built-in
            openings do without them.
        OSError: a file that cannot be read.
    """
    opening(tokenizer)  # what is wrong with the template as such is said first
    marks, found = marks_of(tokenizer), []
    for system, words in pairs_of(file):
        try:
            if marks & set(tokenizer(words, add_special_tokens=False).input_ids):
                raise ValueError(f"{words!r} holds tokens of the template")
            one = opening(tokenizer, system, words)
            if system.strip() not in one.text:
                raise ValueError("this tokenizer's chat template leaves system messages out")
        except ValueError as error:
            if file is not None:
                raise ValueError(f"{file}, the opening {words or system!r}: {error}") from error
            one = opening(tokenizer, words=words)
        found.append(one)
    return found
