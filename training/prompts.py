"""Benchmark prompts by name, from a folder or the Hub, prompts from a user's JSONL file, and how they are put."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .chats import Chat
from .rows import CHATS, normal, options_of
from .sources import ENDINGS, KINDS, BadRow, local_files, read_files


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to run.

    ``turns`` are the user's messages, answered one after the other. ``raw_completion``: the text is continued as it
    stands (HumanEval's unfinished functions) instead of being put through the chat template. ``opening`` are system
    messages before the first turn, ``options`` what else the template is given: tools, documents and its own.
    """

    id: str
    category: str
    turns: list[str]
    raw_completion: bool = False
    opening: list[dict] = dataclasses.field(default_factory=list)
    options: dict = dataclasses.field(default_factory=dict)


class Benchmark(NamedTuple):
    """Where the prompts of a benchmark lie on the Hub, and how a row is read."""

    repository: str
    config: str | None
    split: str
    read: Callable[[dict, int], Prompt]  # (row, index) -> prompt


BENCHMARKS = {
    "mt_bench": Benchmark(
        "HuggingFaceH4/mt_bench_prompts",
        None,
        "train",
        lambda row, index: Prompt(str(row["prompt_id"]), row["category"], list(row["prompt"])),
    ),
    "humaneval": Benchmark(
        "openai/openai_humaneval",
        None,
        "test",
        lambda row, index: Prompt(row["task_id"], "code", [row["prompt"]], raw_completion=True),
    ),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "main",
        "test",
        lambda row, index: Prompt(f"gsm8k-test-{index}", "math", [row["question"]]),
    ),
    "mbpp": Benchmark(
        "google-research-datasets/mbpp",
        "full",
        "test",
        lambda row, index: Prompt(
            f"mbpp-{row['task_id']}",
            "code",
            ["\n".join([row["text"], "Your code should pass these tests:", *row["test_list"]])],
        ),
    ),
}


def prompt_sets(names: list[str], prompts_dir: str | None = None, limit: int | None = None) -> dict[str, list[Prompt]]:
    """The prompts of several benchmarks or files, by the name of each: a file's is its own, without folder and ending.

    Raises:
        ValueError: two of one name, and as :func:`load_prompts`.
    """
    found = {}
    for name in names:
        file = Path(name).name
        title = next((file.removesuffix(ending) for ending in ENDINGS if file.endswith(ending)), file)
        if title in found:
            raise ValueError(f"Two sets of prompts are called {title!r}: {', '.join(names)}. Rename one of the files.")
        found[title] = load_prompts(name, prompts_dir, limit)
    return found


def load_prompts(name_or_path: str, prompts_dir: str | None = None, limit: int | None = None) -> list[Prompt]:
    """Read prompts.

    Args:
        name_or_path: a benchmark (mt_bench, humaneval, gsm8k, mbpp) or a file of rows (docs/data.md) with ``turns``
            (list of texts), ``prompt`` (one text) or ``messages`` (whose user messages are the turns), and optionally
            ``id``, ``category`` and ``raw_completion``.
        prompts_dir: folder with the benchmarks as ``NAME.jsonl`` or ``NAME_test.jsonl``; None: from the Hub.
        limit: the first so many.

    Raises:
        ValueError: an unknown name, a row of another form, an empty file.
        OSError: a missing file, or a Hub that cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if name_or_path not in BENCHMARKS:
        prompts = _from_file(name_or_path)
    elif prompts_dir is not None:
        folder = Path(prompts_dir)
        found = next((p for p in (folder / f"{name_or_path}{end}.jsonl" for end in ("", "_test")) if p.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{prompts_dir} holds neither {name_or_path}.jsonl nor {name_or_path}_test.jsonl.")
        prompts = _from_file(str(found))
    else:
        prompts = from_hub(BENCHMARKS[name_or_path])
    return prompts[:limit]


def first_turn(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt's first turn: in the chat template, or as it stands when it is a raw completion."""
    return turn_ids(tokenizer, prompt, [])


def turn_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answers: list[str]) -> list[int]:
    """Token ids of the turn that follows ``answers`` to the turns before it."""
    if prompt.raw_completion:
        return tokenizer(prompt.turns[0])["input_ids"]
    chat = [*prompt.opening]
    for turn, answer in zip(prompt.turns, [*answers, None]):
        chat.append({"role": "user", "content": turn})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
    text = Chat(chat, prompt.options, tokenizer).render(prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sampling_options(temperature: float) -> dict:
    """Options of ``generate`` for the target's own distribution: greedy at 0, else without top-k or top-p."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}


def from_hub(benchmark: Benchmark) -> list[Prompt]:
    """All prompts of a benchmark through ``datasets``. Raises OSError when its repository cannot be read."""
    import datasets

    try:
        rows = datasets.load_dataset(benchmark.repository, benchmark.config, split=benchmark.split)
    except OSError as error:
        raise OSError(
            f"Cannot load {benchmark.repository} from the Hub ({error}). Offline, name a folder that holds the "
            "prompts: --prompts-dir FOLDER."
        ) from error
    return [benchmark.read(row, index) for index, row in enumerate(rows)]


def _from_file(source: str) -> list[Prompt]:
    files = local_files(source)
    if not files:
        raise ValueError(f"{source!r} is neither a benchmark ({', '.join(BENCHMARKS)}) nor a {KINDS} file.")
    prompts = [from_row(row, place, index) for index, (place, row) in enumerate(read_files(files))]
    if not prompts:
        raise ValueError(f"{source} holds no prompts.")
    return prompts


def from_row(row: dict | BadRow, place: str, index: int) -> Prompt:
    """A prompt of a file's row. Raises ValueError: it is of another form, or its turns depend on what a tool says."""
    if isinstance(row, BadRow):
        raise ValueError(f"{place}: {row}")
    other = {"text", *(CHATS if {"turns", "prompt"} & row.keys() else ())}
    try:
        chat = normal({key: value for key, value in row.items() if key not in other})
        turns = [message["content"] for message in chat["messages"] if message["role"] == "user"]
    except BadRow as error:
        if other == {"text"}:
            raise ValueError(
                f"{place}: expected 'turns', 'prompt' or 'messages', got the keys {sorted(row)} ({error})"
            ) from None
        chat, turns = {"messages": []}, row.get("turns", [row.get("prompt")])
    messages = chat["messages"]
    if any(message["role"] == "tool" for message in messages):
        raise ValueError(f"{place}: a prompt is a user's turns; what a tool gave back depends on the answers.")
    opening = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{place}: the turns must be non-empty texts, at least one, got {turns!r:.80}.")
    raw = row.get("raw_completion", False)
    raw = {"true": True, "false": False}.get(str(raw).lower(), raw)  # a table has texts only
    if not isinstance(raw, bool) or (raw and len(turns) > 1):
        raise ValueError(f"{place}: raw_completion must be true or false, and true only with one turn, got {raw!r}.")
    return Prompt(str(row.get("id", index)), str(row.get("category", "")), turns, raw, opening, options_of(chat))
