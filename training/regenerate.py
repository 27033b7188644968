"""Let the target write the answers of a data set of chats, so that a drafter learns the text it will meet.

    ppow regenerate --target TARGET --data CHATS --output answers.jsonl
    ppow regenerate --endpoint http://localhost:8000/v1 --model NAME --data CHATS --output answers.jsonl

Every assistant turn is written anew, in order, each after the turns before it. The output is a JSONL file of
``{"row", "messages", "complete", "by"}``; ``complete`` is false where an answer reached ``max_new_tokens``, ``by`` says
who wrote it: ``{"model", "temperature", "max_new_tokens"}``. Lines are appended as they are made, so an interrupted run
continues with ``--resume``, from the same data and with the same writer.
"""

import functools
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .config import RegenerateConfig
from .data import load_rows
from .prompts import sampling_options

Chat = list[dict]
Answer = tuple[str, bool]  # text, whether it ended by itself
HEAD = b'{"row": 0, "messages": [{"'  # how a line of the output starts, whatever its number


def main(config: RegenerateConfig) -> None:
    rows = load_rows(config.data, config.split, config.limit)
    chats = {i: row["messages"] for i, row in enumerate(rows) if prompt(row.get("messages", []))[1]}
    if not chats:
        raise ValueError(
            f"None of the {len(rows)} rows of {config.data} has a user turn to answer; 'text' has no answers."
        )
    output = Path(config.output)
    model = config.model if config.endpoint else config.target
    name = Path(model).resolve().name if Path(model).is_dir() else model  # no paths of this machine
    by = {"model": name, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    done = finished_rows(output, chats, by, config.resume)
    todo = [index for index in chats if index not in done]
    size, answer = endpoint_writer(config) if config.endpoint else local_writer(config)
    todo.sort(key=lambda index: len(chats[index][0]["content"]))  # alike lengths waste little padding
    output.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(chats), initial=len(done), desc="regenerate") as bar:
        for first in range(0, len(todo), size):
            part = todo[first : first + size]
            seeded = functools.partial(answer, seed=(config.seed * 1_000_003 + part[0]) & 0x7FFFFFFF)
            answered = write_chats([chats[i] for i in part], seeded)
            with open(output, "a", encoding="utf-8") as out:  # after the answers: a run without any leaves no file
                for index, (messages, complete) in zip(part, answered):
                    row = {"row": index, "messages": messages, "complete": complete, "by": by}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
            bar.update(len(part))
    in_row_order(output)


def prompt(chat: Chat) -> tuple[Chat, Chat]:
    """What is kept of a chat: the system messages before its first user turn, and its user turns."""
    opening = itertools.takewhile(lambda message: message["role"] != "user", chat)
    return [m for m in opening if m["role"] == "system"], [m for m in chat if m["role"] == "user"]


def finished_rows(output: Path, chats: dict[int, Chat], by: dict, resume: bool) -> set[int]:
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
            index, answered, complete = row["row"], _asked(row["messages"]), row["complete"]
            asked, writer = _asked(chats.get(index, [])), row["by"]
        except (ValueError, KeyError, TypeError):
            raise _not_ours(output, number) from None
        if not complete:  # the turns after an answer that was cut short are left out
            asked = asked[: len(answered)]
        for ours, theirs in itertools.zip_longest(answered, asked, fillvalue="nothing"):
            if ours != theirs:
                raise ValueError(
                    f"{output}:{number} answers {ours!r:.80} as row {index}, but row {index} of --data asks "
                    f"{theirs!r:.80}. Resume with the data and --limit it was made from, or give another --output."
                )
        if writer != by:
            raise ValueError(
                f"{output}:{number} was written by {writer}, not by {by}. Resume with the options it was made with, or "
                "give another --output."
            )
        done.add(index)
    if not HEAD.startswith(re.sub(rb"\d+", b"0", torn, count=1)[: len(HEAD)]):
        raise _not_ours(output, len(lines) + 1)
    if torn:
        os.truncate(output, len(content) - len(torn))
    return done


def _asked(chat: Chat) -> list[str]:
    """The prompt of a chat, one text per message, to compare and to show."""
    return [f"{message['role']}: {message['content']}" for message in itertools.chain(*prompt(chat))]


def _not_ours(output: Path, number: int) -> ValueError:
    return ValueError(f"{output}:{number} was not written by `ppow regenerate`; give another --output.")


def in_row_order(output: Path) -> None:
    """Sort the finished lines by row: they were made in order of length, and readers may take the first few."""
    with open(output, encoding="utf-8", newline="\n") as file:  # str.splitlines would also split inside some texts
        lines = sorted(file, key=lambda line: json.loads(line)["row"])
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(partial, output)


def write_chats(chats: list[Chat], answer: Callable[[list[Chat]], list[Answer]]) -> Iterator[tuple[Chat, bool]]:
    """Answer every user turn of some chats, turn by turn: -> (messages, complete) in order."""
    written, asked = zip(*map(prompt, chats))
    complete = [True] * len(chats)
    for turn in range(max(map(len, asked))):
        active = [c for c in range(len(chats)) if turn < len(asked[c]) and complete[c]]
        if not active:
            break
        for c in active:
            written[c].append({"role": "user", "content": asked[c][turn]["content"]})
        for c, (text, ended) in zip(active, answer([written[c] for c in active])):
            written[c].append({"role": "assistant", "content": text})
            complete[c] = ended
    return zip(written, complete)


def local_writer(config: RegenerateConfig):
    """-> batch size, and a function that answers a batch of chats, from a seed, with the target."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppow.attention_ppow import without_cudnn_attention

    from .loading import named

    with named("target", config.target):
        tokenizer = AutoTokenizer.from_pretrained(config.target, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(config.target, dtype=getattr(torch, config.dtype))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    sampling = sampling_options(config.temperature)

    @without_cudnn_attention()  # every token meets another number of keys
    def answer(chats: list[Chat], seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=config.max_new_tokens, **sampling)
        answers = []
        for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            answers.append((tokenizer.decode(ids[:end]), end is not None))
        return answers

    return config.batch_size, answer


def endpoint_writer(config: RegenerateConfig):
    """-> batch size, and a function that answers a batch of chats, from a seed, through an OpenAI-compatible server."""
    url = config.endpoint.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {token}"

    def one(chat: Chat, seed: int) -> Answer:
        body = {
            "model": config.model,
            "messages": chat,
            "temperature": config.temperature,
            "max_tokens": config.max_new_tokens,
            "seed": seed,
        }
        reply = post(urllib.request.Request(url, json.dumps(body).encode(), headers))
        try:
            choice = reply["choices"][0]
            return choice["message"]["content"] or "", choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{url} answered without choices[0].message.content: {str(reply)[:200]}") from None

    def answer(chats: list[Chat], seed: int) -> list[Answer]:
        with ThreadPoolExecutor(config.concurrency) as pool:
            return list(pool.map(one, chats, range(seed, seed + len(chats))))

    return config.concurrency, answer


def post(request: urllib.request.Request, tries: int = 5, timeout: float = 600.0, pause: float = 1.0) -> dict:
    """POST and parse; a busy or failing server (429, 5xx, no answer) is asked again with growing pauses.

    Raises:
        ValueError: a refusal, an answer that is not JSON, or no answer after all tries.
    """
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read())
        except json.JSONDecodeError:
            raise ValueError(f"{request.full_url} answered with something that is not JSON.") from None
        except urllib.error.HTTPError as error:
            if error.code != 429 and error.code < 500:
                detail = error.read(300).decode(errors="replace")
                raise ValueError(f"{request.full_url} refused the request with {error.code}: {detail}") from None
            reason = f"status {error.code}"
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = str(error)
        if attempt < tries:
            time.sleep(pause * 2 ** (attempt - 1))
    raise ValueError(f"{request.full_url} did not answer after {tries} tries ({reason}). Is the server up?")
