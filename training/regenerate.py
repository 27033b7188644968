"""Let the target write the answers of a data set of chats, so that a drafter learns the text it will meet.

    ppow regenerate --target TARGET --data CHATS --output answers.jsonl
    ppow regenerate --endpoint http://localhost:8000/v1 --model NAME --data CHATS --output answers.jsonl

Every assistant turn is written anew, in order, each after the turns before it; only one that a tool answered stays as
it was, with weight 0: not to be learned. The output is a JSONL file of ``{"row", "messages", "complete", "by"}`` and
the row's tools and template options. ``complete`` is false where the last answer was cut short; ``finish`` says how an
answer ended that the chat does not go on after, and ``error`` why there is none; ``by`` says who wrote:
``{"model", "temperature", "max_new_tokens"}``. Lines are appended as they are made, so an interrupted run continues
with ``--resume``, from the same data and with the same writer; rows that got no answer are not asked again.
"""

import collections
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .config import RegenerateConfig
from .data import BadRows, Row, load_rows
from .files import append, claim_file, whole
from .rows import TEMPLATE_COLUMNS, options_of
from .sources import BadRow, say
from .writers import Answer, Asked, EndpointWriter, LocalWriter, Question, Writer, answers

Chat = list[dict]
HEAD = b'{"row": 0, "messages": [{"'  # how a line of the output starts, whatever its number


class Written(NamedTuple):
    """A chat with its new answers, and how the last one ended, as in :class:`ppow.training.writers.Answer`."""

    messages: Chat
    finish: str = "stop"
    error: str | None = None

    def answered(self) -> bool:
        """Whether any answer was written."""
        return any(_is_written(message) for message in self.messages)


def main(config: RegenerateConfig) -> float:
    """Write the answers to ``config.output``, which is this run's alone meanwhile.

    Returns:
        The seconds that writing took, without loading the target.

    Raises:
        ValueError: no chats, a bad row that is not skipped, a prompt or an option that the target or server refuses,
            an output that another run writes to or that cannot be continued.
        OSError: what cannot be read or written.
    """
    with claim_file(config.output):
        return write(config)


def write(config: RegenerateConfig) -> float:
    """The command itself, once the output is this run's alone."""
    bad = BadRows(config.skip_bad_rows)
    chats = chats_to_answer(config, bad)
    output, by = Path(config.output), writers_of(config, chats)
    done = finished_rows(output, chats, by, config.resume)
    writer = EndpointWriter(config) if config.endpoint else LocalWriter(config)
    left = [row for number, row in chats.items() if number not in done]
    unfit = unanswerable(writer, left, bad)
    bad.report(config.data)
    none = [(chats[i], Written(turns(chats[i]["messages"])[0], "error", why)) for i, why in unfit.items()]
    _append(output, none, by)
    todo = [row for row in left if row.number not in unfit]
    began = time.perf_counter()
    finishes = answer_rows(todo, writer, by, config, known_good=bool(done) or config.skip_bad_rows)
    seconds = time.perf_counter() - began
    in_row_order(output)
    if others := {finish: count for finish, count in sorted(finishes.items()) if finish != "stop"}:
        say(f"{output}: chats that ended otherwise than by themselves: {others}")
    print(f"{len(chats)} chats are in {output}, of which `ppow supervised --data {output}` trains a drafter.")
    return seconds


def chats_to_answer(config: RegenerateConfig, bad: BadRows) -> dict[int, Row]:
    """The rows that have a user turn, by number; ``bad`` counts the others. Raises ValueError: there are none."""
    rows = load_rows(config.data, config.split, config.limit, bad)
    chats = {row.number: row for row in rows if turns(row.get("messages", []))}
    if not chats:
        raise ValueError(
            f"None of the {len(rows)} rows of {config.data} has a user turn to answer; 'text' has no answers."
        )
    if len(chats) < len(rows):
        bad.left_out["they have no user turn to answer"] += len(rows) - len(chats)
    return chats


def answer_rows(
    rows: list[Row], writer: Writer, by: dict[int, dict], config: RegenerateConfig, known_good: bool
) -> collections.Counter[str]:
    """Append the answers to the output as they are made: -> how many chats ended how.

    Nothing is written before the first answer, unless the options are ``known_good``.

    Raises:
        ValueError: no row of as many as the writer takes at once got an answer.
    """
    finishes: collections.Counter[str] = collections.Counter()
    made: list[tuple[Row, Written]] = []  # and not yet appended
    output, appended = Path(config.output), time.perf_counter()
    with tqdm(total=len(by), initial=len(by) - len(rows), desc="regenerate") as bar:
        try:
            for row, written in answered(rows, writer, config.seed):
                finishes[written.finish] += 1
                made.append((row, written))
                known_good = known_good or written.answered()
                if not known_good and len(made) == min(writer.size, len(rows)):  # as likely the options' fault
                    row, written = made[0]
                    where = config.endpoint or config.target
                    raise ValueError(f"{row.place}: {where} {written.error} If other rows do better: --skip-bad-rows.")
                if written.error is not None:
                    tqdm.write(f"ppow: {row.place}: {written.error}", file=sys.stderr)
                bar.update()
                if known_good and time.perf_counter() - appended > 1.0:
                    part, made, appended = made, [], time.perf_counter()  # a signal meanwhile writes none of it twice
                    _append(output, part, by)
        finally:
            if known_good:  # a run without any answer leaves no file
                _append(output, made, by)
    return finishes


def answered(rows: list[Row], writer: Writer, seed: int) -> Iterator[tuple[Row, Written]]:
    """The chats of some rows with their answers, as they end."""
    rows = sorted(rows, key=lambda row: len(str(turns(row["messages"])[0])))  # alike lengths waste little memory
    talking = {row.number: Conversation(row) for row in rows}
    waiting = collections.deque(chat.question(seed) for chat in talking.values())
    for number, answer in answers(writer, waiting):
        chat = talking[number]
        chat.take(answer)
        if chat.is_over():
            yield chat.row, talking.pop(number).written
        else:
            waiting.appendleft(chat.question(seed))


def writers_of(config: RegenerateConfig, rows: Iterable[int]) -> dict[int, dict]:
    """Who writes each row, as its line says it."""
    model = config.model if config.endpoint else config.target
    assert model is not None
    name = Path(model).resolve().name if Path(model).exists() else model  # no paths of this machine
    most = config.max_new_tokens
    return {row: {"model": name, "temperature": config.temperature_of(row), "max_new_tokens": most} for row in rows}


def unanswerable(writer: Writer, rows: list[Row], bad: BadRows) -> dict[int, str]:
    """Rows whose first prompt the target cannot take, and why; ``bad`` takes them."""
    found = {}
    for row in rows:
        try:
            writer.read(Asked(turns(row["messages"])[0], options_of(row)))
        except BadRow as error:
            bad.add(row.place, error)
            found[row.number] = str(error)
    return found


def _append(output: Path, made: list[tuple[Row, Written]], by: dict[int, dict]) -> None:
    if not made:
        return
    lines = []
    for row, written in made:
        complete = written.finish in ("stop", "tool_calls", "refusal")
        line = {"row": row.number, "messages": written.messages, "complete": complete, "by": by[row.number]}
        line |= {key: row[key] for key in TEMPLATE_COLUMNS if key in row}
        if written.finish != "stop":
            line["finish"] = written.finish
        if written.error is not None:
            line["error"] = written.error
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    with open(output, "ab", buffering=0) as out:
        append(out, "".join(lines).encode("utf-8"))


# -- turns -------------------------------------------------------------------------------------------------------------


def turns(chat: Chat) -> list[Chat]:
    """What is given before each answer: every turn but those that are written anew.

    An assistant's turn that a tool answers belongs to that answer and is given, with weight 0; one that nobody asked
    for is left out. What follows the last answer is left out, too.
    """
    given: list[Chat] = [[]]
    asked = False
    for index, message in enumerate(chat):
        following = chat[index + 1]["role"] if index + 1 < len(chat) else None
        if message["role"] == "assistant":
            if following != "tool" or not (asked or len(given) > 1):
                continue
            given[-1].append({**message, "weight": 0})
            asked = False
            continue
        given[-1].append(message)
        asked = asked or message["role"] in ("user", "tool")
        called = following == "assistant" and index + 2 < len(chat) and chat[index + 2]["role"] == "tool"
        if asked and following in (None, "user", "assistant") and not called:
            given.append([])
            asked = False
    return given[:-1]


def _is_written(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


class Conversation:
    """A chat whose turns are answered one after the other; it ends with an answer that did not end by itself."""

    def __init__(self, row: Row):
        self.row, self.given = row, collections.deque(turns(row["messages"]))
        self.written = Written([])
        self.answers = 0

    def question(self, seed: int) -> Question:
        """The next turn to be answered, with all before it."""
        self.written.messages.extend(self.given.popleft())
        seed = (seed * 1_000_003 + self.row.number * 1_009 + self.answers) & 0x7FFFFFFF
        return self.row.number, Asked(self.written.messages, options_of(self.row)), seed

    def take(self, answer: Answer) -> None:
        """Its answer."""
        messages = self.written.messages + ([answer.message] if answer.message else [])
        self.written, self.answers = Written(messages, answer.finish, answer.error), self.answers + 1

    def is_over(self) -> bool:
        """Whether there is nothing more to answer."""
        return not self.given or self.written.finish != "stop"


# -- the output so far -------------------------------------------------------------------------------------------------


def finished_rows(output: Path, chats: dict[int, Row], by: dict[int, dict], resume: bool) -> set[int]:
    """Rows that the output holds already; cuts off a last line that an interruption tore, once all else is in order.

    Raises:
        ValueError: the file exists and the run is not to be resumed, or it holds something else, other prompts or
            another writer's answers.
    """
    if not output.exists():
        return set()
    if not resume:
        raise ValueError(f"{output} exists already; pass --resume to continue it, or name another output.")
    content = output.read_bytes()
    *lines, torn = content.split(b"\n")
    done = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            index, ours, complete = row["row"], _asked(row["messages"]), row["complete"]
            chat: dict = chats.get(index, {})
            writer = row["by"]
            theirs = _asked(list(itertools.chain(*turns(chat.get("messages", [])))))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _not_ours(output, number) from None
        if not complete or "finish" in row:  # the turns after an answer that ended the chat are left out
            theirs = theirs[: len(ours)]
        ours += [f"{key}: {row[key]}" for key in TEMPLATE_COLUMNS if key in row]
        theirs += [f"{key}: {chat[key]}" for key in TEMPLATE_COLUMNS if key in chat]
        for one, other in itertools.zip_longest(ours, theirs, fillvalue="nothing"):
            if one != other:
                shared = max(0, len(os.path.commonprefix((one, other))) - 20)  # long texts are shown where they part
                raise ValueError(
                    f"{output}:{number} answers {one[shared:]!r:.80} as row {index}, but row {index} of --data asks "
                    f"{other[shared:]!r:.80}. Resume with the data and --limit it was made from, or give another "
                    "--output."
                )
        if writer != (expected := by.get(index)):
            raise ValueError(
                f"{output}:{number} was written by {writer}, not by {expected}. Resume with the options it was made "
                "with, or give another --output."
            )
        done.add(index)
    if not HEAD.startswith(re.sub(rb"\d+", b"0", torn, count=1)[: len(HEAD)]):
        raise _not_ours(output, len(lines) + 1)
    if torn:
        os.truncate(output, len(content) - len(torn))
    return done


def _asked(chat: Chat) -> list[str]:
    """What was given of a chat, one text per message, to compare and to show."""
    shown = []
    for message in chat:
        if not _is_written(message):
            more = {key: value for key, value in message.items() if key not in ("role", "content")}
            shown.append(f"{message['role']}: {message['content']}" + (f" {json.dumps(more)}" if more else ""))
    return shown


def _not_ours(output: Path, number: int) -> ValueError:
    return ValueError(f"{output}:{number} was not written by `ppow regenerate`; give another --output.")


def in_row_order(output: Path) -> None:
    """Sort the finished lines by row: they were made in order of length, and readers may take the first few."""
    with open(output, encoding="utf-8", newline="\n") as file:  # str.splitlines would also split inside some texts
        lines = sorted(file, key=lambda line: json.loads(line)["row"])
    with whole(output) as partial:
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
