"""Who writes the answers of ``ppow regenerate``: a target loaded here, or a server that speaks OpenAI's protocol."""

import collections
import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .chats import OPENED, Chat
from .config import RegenerateConfig
from .loading import load_model, load_tokenizer, named, positions
from .prompts import sampling_options
from .rows import normal_message
from .sources import BadRow, say

if TYPE_CHECKING:  # needs torch
    from .slots import Slots

ROWS = {"cuda": 1024, "cpu": 16}  # answers under way, by device, where no --batch-size says
BATCH = 8  # the same, in batches of ``generate``
ROOM = 1024  # tokens of a prompt and its answer that a row has room for, at least
TOLD = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning")  # of a server's message
ENDED = {None, "stop", "eos", "eos_token", "stop_sequence", "end_turn"}  # an answer that ended by itself, by server


class Asked(NamedTuple):
    """A prompt: the messages that an answer is to follow."""

    messages: list[dict]
    options: dict  # of the chat template


class Answer(NamedTuple):
    """What came of a prompt.

    ``finish`` is "stop" for an answer that ended by itself, "tool_calls" and "refusal" for such that ended so,
    "length", "content_filter", "abort" or the server's own word for one that was cut short, and "error" where there is
    no message: ``error`` says why.
    """

    message: dict | None
    finish: str = "stop"
    error: str | None = None


class Given(NamedTuple):
    """A prompt that was handed over; without ids, ``text`` says why it cannot be answered."""

    key: int
    text: str
    ids: list[int]
    room: int
    seed: int
    temperature: float


class LocalWriter:
    """The target, on this machine: ``size`` prompts under way, in :class:`ppow.training.slots.Slots` where it can be.

    Where not, they are answered in batches of ``generate``, which wait for their longest answer.
    """

    def __init__(self, config: RegenerateConfig):
        import torch

        from .slots import obstacle

        assert config.target is not None
        self.config = config
        with named("target", config.target):
            self.tokenizer = load_tokenizer(config.target, padding_side="left")
            self.model = load_model(config.target, dtype=getattr(torch, config.dtype))
        self.tokenizer.get_chat_template()  # says what is missing
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if self.tokenizer.pad_token is None:  # padding is masked, so any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.positions = positions(self.model.config)
        self.waiting: collections.deque[Given] = collections.deque()
        self.answering: dict[int, Given] = {}
        self.slots: Slots | None = None
        self.size, self.obstacle = config.batch_size or ROWS[self.model.device.type], obstacle(self.model)
        if self.obstacle is not None:
            self._give_up_slots(self.obstacle)

    def read(self, prompt: Asked) -> tuple[str, list[int], int]:
        """(text, its tokens, how many its answer may have). Raises BadRow: no prompt that the target can answer."""
        text = Chat(prompt.messages, prompt.options, self.tokenizer).render(prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.positions is None:
            return text, ids, self.config.max_new_tokens
        if len(ids) >= self.positions:
            raise BadRow(f"a prompt of {len(ids)} tokens does not fit the target's {self.positions} positions.")
        return text, ids, min(self.config.max_new_tokens, self.positions - len(ids))

    def ask(self, key: int, prompt: Asked, seed: int) -> None:
        """Take a prompt of row ``key``, whose answer :meth:`collect` will bring under it; ``seed`` draws it."""
        try:
            read = self.read(prompt)
        except BadRow as error:
            read = str(error), [], 0
        self.waiting.append(Given(key, *read, seed, self.config.temperature_of(key)))

    def collect(self) -> dict[int, Answer]:
        """Wait for answers: -> those that are ready, at least one while any prompt is under way."""
        from ppow.attention_ppow import without_cudnn_attention

        refused = [given for given in self.waiting if not given.ids]
        if refused:
            self.waiting = collections.deque(given for given in self.waiting if given.ids)
            return {given.key: Answer(None, "error", given.text) for given in refused}
        with without_cudnn_attention():  # every token meets another number of keys
            return self._in_batches() if self.obstacle is not None else self._in_slots()

    def _in_slots(self) -> dict[int, Answer]:
        from .slots import Request

        if self.slots is None or (not self.answering and self._length(self.waiting[0]) > self.slots.capacity):
            self.slots = None  # frees the old buffers first
            try:
                self.slots = self._new_slots()
            except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:  # too little memory, too
                self._give_up_slots(f"rows for it cannot be laid out ({error})")
                return self._in_batches()
        slots = self.slots
        taken: list[Given] = []
        while self.waiting and len(taken) < slots.free and self._length(self.waiting[0]) <= slots.capacity:
            taken.append(self.waiting.popleft())
        slots.fill([Request(given.key, given.ids, given.room, given.seed, not given.temperature) for given in taken])
        self.answering |= {given.key: given for given in taken}
        done = slots.collect()
        return {key: self._read_answer(self.answering.pop(key).text, ids) for key, ids in done}

    @staticmethod
    def _length(given: "Given") -> int:
        return len(given.ids) + given.room

    def _new_slots(self) -> "Slots":
        """Rows that hold the next prompt, and longer ones that follow it, as many as memory allows."""
        from .slots import Slots, rows_that_fit

        capacity = max(2 * self._length(self.waiting[0]), ROOM)
        capacity = min(capacity, self.positions or capacity)
        rows = rows_that_fit(self.model, self.size, capacity)
        return Slots(self.model, rows, capacity, self.config.temperature, self.ends)

    def _give_up_slots(self, reason: str) -> None:
        self.obstacle, self.size = reason, self.config.batch_size or BATCH
        say(f"{self.config.target} answers in batches that wait for their longest answer: {reason}.")

    def _in_batches(self) -> dict[int, Answer]:
        """The answers to all prompts that wait and have the room and the temperature of the first."""
        import torch

        first = self.waiting[0]
        alike = [given for given in self.waiting if (given.room, given.temperature) == (first.room, first.temperature)]
        batch = alike[: self.size]
        keys = {given.key for given in batch}
        self.waiting = collections.deque(given for given in self.waiting if given.key not in keys)
        torch.manual_seed(first.seed)
        inputs = self.tokenizer(
            [given.text for given in batch], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        given_ids = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        options = sampling_options(first.temperature)
        out = self.model.generate(**given_ids, max_new_tokens=first.room, **options)
        made = out[:, given_ids["input_ids"].shape[1] :].tolist()
        return {given.key: self._read_answer(given.text, ids) for given, ids in zip(batch, made)}

    def _read_answer(self, prompt: str, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = self.tokenizer.decode(ids[:end])
        if opened := OPENED.search(prompt):  # the answer's thought began in the prompt
            text = f"{prompt[opened.start() :]}{text}"
        return Answer({"role": "assistant", "content": text}, "length" if end is None else "stop")


class EndpointWriter:
    """An OpenAI-compatible server: ``size`` requests in flight."""

    def __init__(self, config: RegenerateConfig):
        assert config.endpoint is not None
        self.config, self.size = config, config.concurrency
        self.url = config.endpoint.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if token := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {token}"
        self.answers: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()

    def read(self, prompt: Asked) -> None:
        """Nothing is known of a prompt before the server has answered it."""

    def ask(self, key: int, prompt: Asked, seed: int) -> None:
        """As in :class:`LocalWriter`; the server is asked at once."""

        def wait() -> None:
            try:
                self.answers.put((key, self._one(key, prompt, seed)))
            except BaseException as error:
                self.answers.put((key, error))

        # a daemon, unlike a pool's threads: a server that never answers holds up no end of the process
        threading.Thread(target=wait, daemon=True).start()

    def collect(self) -> dict[int, Answer]:
        """As in :class:`LocalWriter`. Raises what concerns every request, as :func:`post` does."""
        answers: dict[int, Answer] = {}
        while not answers or not self.answers.empty():
            key, answer = self.answers.get()
            if isinstance(answer, BaseException):
                if not answers:
                    raise answer
                self.answers.put((key, answer))  # what came before it is not lost
                break
            answers[key] = answer
        return answers

    def _one(self, key: int, prompt: Asked, seed: int) -> Answer:
        options = dict(prompt.options)
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": _for_server(prompt.messages),
            "temperature": self.config.temperature_of(key),
            "max_tokens": self.config.max_new_tokens,
            "seed": seed,
        }
        if tools := options.pop("tools", None):
            body["tools"] = tools
        if options:  # as vLLM and SGLang take them
            body["chat_template_kwargs"] = options
        try:
            return _read_reply(post(urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)))
        except RefusedError as error:
            return Answer(None, "error", str(error))


Writer: TypeAlias = LocalWriter | EndpointWriter
Question: TypeAlias = tuple[int, Asked, int]  # (key, prompt, seed), as ``ask`` takes them


def answers(writer: Writer, waiting: collections.deque[Question]) -> Iterator[tuple[int, Answer]]:
    """What comes of questions, by key, with at most ``writer.size`` under way; more may be put in between answers."""
    under_way = 0
    while waiting or under_way:
        while waiting and under_way < writer.size:
            writer.ask(*waiting.popleft())
            under_way += 1
        for key, answer in sorted(writer.collect().items()):
            under_way -= 1
            yield key, answer


def _for_server(messages: list[dict]) -> list[dict]:
    """Messages as OpenAI's protocol has them: calls with ids and arguments as text, results that name their call."""
    sent: list[dict] = []
    open_calls: list[str] = []
    for message in messages:
        message = {key: value for key, value in message.items() if key not in ("weight", "reasoning_content")}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "id": call.get("id", f"call_{len(sent)}_{number}"),
                    "type": "function",
                    "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])},
                }
                for number, call in enumerate(calls)
            ]
            open_calls = [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and "tool_call_id" not in message and open_calls:
            message["tool_call_id"] = open_calls.pop(0)
        sent.append(message)
    return sent


def _as_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _read_reply(reply: Any) -> Answer:
    """What a server answered, for what it is. Raises RefusedError: no chat completion."""
    try:
        choice = reply["choices"][0]
        given, finish = choice["message"], choice.get("finish_reason")
        told, refusal = {key: given[key] for key in TOLD if given.get(key)}, given.get("refusal")
        if not told and not refusal:
            told = {"content": given["content"] or ""}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RefusedError(f"answered without choices[0].message: {str(reply)[:200]}") from None
    if isinstance(refusal, str) and refusal and not told:
        return Answer({"role": "assistant", "content": refusal}, "refusal")
    try:
        called = "tool_calls" in told or "function_call" in told
        message = normal_message({"role": "assistant", "content": None if called else "", **told})
    except BadRow as error:
        raise RefusedError(f"answered with something else than a message: {error}") from None
    if message.get("tool_calls"):
        return Answer(message, "tool_calls" if finish in ENDED | {"tool_calls", "function_call"} else str(finish))
    return Answer(message, "stop" if finish in ENDED else str(finish))


class RefusedError(ValueError):
    """A server's no to one request."""


def post(request: urllib.request.Request, tries: int = 5, timeout: float = 600.0, pause: float = 1.0) -> dict:
    """POST and parse; a busy or failing server (429, 5xx, no answer) is asked again with growing pauses.

    Raises:
        RefusedError: the server does not like this request, or answers it with nonsense.
        ValueError: whatever concerns every request: no access, no such model or address, no answer after all tries.
    """
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read())
        except ValueError:
            raise RefusedError("answered with something that is not JSON") from None
        except urllib.error.HTTPError as error:
            reason, detail = f"status {error.code}", error.read(300).decode(errors="replace")
            if error.code in (401, 403, 404, 405):
                raise ValueError(f"{request.full_url} refused the request with {error.code}: {detail}") from None
            if error.code not in (408, 429) and error.code < 500:
                raise RefusedError(f"refused the request with {error.code}: {detail}") from None
            if error.code == 500 and attempt == tries:  # others were tried as often: it is this request
                raise RefusedError(f"failed at the request with 500, {tries} times: {detail}") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = str(error)
        if attempt < tries:
            time.sleep(pause * 2 ** (attempt - 1))
    raise ValueError(f"{request.full_url} did not answer after {tries} tries ({reason}). Is the server up?")
