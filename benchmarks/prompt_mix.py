"""Prompts from many domains for a drafter's training: ``python -m benchmarks.prompt_mix --data FOLDER --output FILE``.

Ours. The first user turn of rows of GROUP-NN.jsonl.xz files, and functions of Python's standard library to be completed
from their signature and docstring (as HumanEval asks); each prompt once, in an order that follows from the seed. The
target answers them: ``ppow train --data FILE`` or ``ppow regenerate --data FILE``.
"""

import ast
import dataclasses
import json
import random
import sys
import textwrap
from pathlib import Path

from ppow.training.arguments import Config, option
from ppow.training.cli import guarded
from ppow.training.data import BadRows
from ppow.training.files import whole

from .corpus import group_files, read_python, read_texts

ASK = "Complete the following Python function:\n\n"
CODE_CHARS = range(60, 900)  # of a signature with its docstring


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptMixConfig(Config):
    """Prompts from many domains, each once, in random order, as rows of ``messages``."""

    data: str = option("folder of GROUP-NN.jsonl.xz files")
    output: str = option("the .jsonl file to write")
    groups: list[str] = option(
        "GROUP:COUNT, prompts of each group at most", ["math:10000", "instruct:20000", "chat:6000", "reasoning:8000"]
    )
    python: int = option("functions of the standard library at most", 4000, at_least=0)
    max_chars: int = option("longer prompts are left out", 900, at_least=1)
    limit: int | None = option("prompts in all; none: all there are", None, at_least=1)
    seed: int = option("of the order", 0, at_least=0)


def main(config: PromptMixConfig) -> None:
    """Write the prompts. Raises ValueError: a group without files or without a count."""
    rng = random.Random(config.seed)
    prompts: dict[str, None] = {}
    for group in config.groups:
        name, _, count = group.partition(":")
        if not count.isdecimal():
            raise ValueError(f"--groups {group}: give GROUP:COUNT, such as math:1000.")
        bad = BadRows(skip=True)
        rows = [row for path in group_files(Path(config.data), name) for row in read_texts(path, bad)]
        turns = [row["messages"][0] for row in rows if row.get("messages")]
        asked = sorted({t["content"] for t in turns if t["role"] == "user" and len(t["content"]) <= config.max_chars})
        rng.shuffle(asked)
        prompts |= dict.fromkeys(asked[: int(count)])
    if config.python:
        files, _ = read_python([], float("inf"), rng)
        functions = sorted({ASK + text for row in files for text in openings(row["text"])})
        rng.shuffle(functions)
        prompts |= dict.fromkeys(functions[: config.python])
    mixed = list(prompts)
    rng.shuffle(mixed)
    mixed = mixed[: config.limit]
    with whole(Path(config.output)) as partial:
        lines = (json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False) for text in mixed)
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    print(f"{len(mixed)} prompts are in {config.output}.")


def openings(source: str) -> list[str]:
    """Signature and docstring of each documented function of a Python file; none of one that does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            end = node.body[0].end_lineno
            assert end is not None
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))
            if len(text) in CODE_CHARS:
                found.append(text)
    return found


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(PromptMixConfig.from_args(sys.argv[1:]))))
