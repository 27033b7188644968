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
# System message -> first words of the user. Each pair gets the same share of what is drawn: a sixth is left to the
# template alone, a quarter each are problems of mathematics and programs, which a target seldom asks of itself.
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
OPENINGS = [(system, words) for system, kinds in _KINDS.items() for words in kinds]


class Opening(NamedTuple):
    """A chat template around a user's words.

    Attributes:
        text: what stands before them.
        behind: what follows them.
        words: the first of them.
    """

    text: str
    behind: str
    words: str = ""

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
    return Opening(before, behind, words)


def openings(tokenizer: PreTrainedTokenizerBase, file: str | None = None) -> list[Opening]:
    """All that draws take turns with: of a JSONL file with rows of "system", "user" or both, or :data:`OPENINGS`.

    Raises:
        ValueError: a file or template that is of no use; of the built-in ones, system messages that a template refuses
            are left out.
        OSError: a file that cannot be read.
    """
    plain = opening(tokenizer)  # what is wrong with the template as such is said first
    if file is None:
        try:
            return [opening(tokenizer, *pair) for pair in OPENINGS]
        except ValueError:
            return [plain._replace(words=words) for _, words in OPENINGS]
    found = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row.keys() <= {"system", "user"}:
                raise ValueError('expected {"system": ..., "user": ...}, one of them or both')
            if not all(isinstance(value, str) for value in row.values()):
                raise ValueError('"system" and "user" must be text')
            found.append(opening(tokenizer, row.get("system", ""), row.get("user", "")))
        except ValueError as error:
            raise ValueError(f"{file}:{number} is no opening of a chat: {error}") from error
    if not found:
        raise ValueError(f'{file} holds no opening; write one a line, such as {{"user": "Write a poem"}}.')
    return found
