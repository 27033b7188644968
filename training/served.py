"""``ppow evaluate --endpoint URL``: a drafter behind an OpenAI-compatible server, by the server's own counters.

    ppow evaluate --endpoint http://localhost:8000/v1 --model TARGET --prompts gsm8k --output-dir runs/served

The prompts are those of ``ppow evaluate`` on this machine, the table is the same, one request at a time (batch 1).
What was drafted and accepted is read from the server:

    vLLM        the counters vllm:spec_decode_* of /metrics, before and behind each request
    SGLang      the counter sglang:spec_verify_calls_total of /metrics (serve with --enable-metrics)
    llama.cpp   draft_n_accepted in the timings of each answer

Each verification yields its accepted drafts and one token of the target's, and a prompt's first token needs none. So of
a text of n tokens in v verifications the acceptance length is (n - 1) / v, tokens behind the text's end left out, which
is what ``ppow evaluate`` compares drafters by; as engines count, it is 1 + accepted / v. SGLang tells v and not what is
accepted, llama.cpp what was accepted and not v: there the other follows from n, and the two figures are one.
A server without a drafter is measured, too: its speed alone.
"""

import dataclasses
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import provenance
from .config import EvaluateConfig
from .figures import interval, pooled, rate, table
from .files import append, write_json
from .prompts import Prompt, prompt_sets
from .writers import RefusedError, post

ANSWERS = "answers.jsonl"
SETTLED = 0.05  # seconds between two looks at counters that a server brings up to date behind its answer
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\deEinfNa]+)(?:\s+\d+)?$")
_POSITION = re.compile(r'position="(\d+)"')


@dataclasses.dataclass
class Served:
    """One answer of a server: its tokens and seconds, and what its verifications came to; zeros without a drafter.

    Attributes:
        prompt: number of the prompt.
        verifications: windows verified.
        accepted: drafted tokens accepted, per position where the server says so.
        total: drafted tokens accepted.
    """

    prompt: int
    tokens: int
    seconds: float
    verifications: int
    total: int
    accepted: list[int]
    text: str


def evaluate(config: EvaluateConfig) -> float:
    """Measure what stands behind ``config.endpoint``, into ``config.output_dir``: -> seconds of measuring.

    Raises:
        ValueError: a folder that holds something, no such address or model, or a server that gives no token counts.
        OSError: what cannot be read or written.
    """
    folder = Path(config.output_dir)
    if found := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise ValueError(f"--output-dir {folder} holds {', '.join(found[:3])}; give an empty or a new folder.")
    prompts = prompt_sets(config.prompts, config.prompts_dir, config.limit)
    server, results, begun = Server(config), {}, time.perf_counter()
    with (folder / ANSWERS).open("ab", buffering=0) as log:
        for name, chosen in prompts.items():
            for temperature in config.temperatures:
                title = f"{name} T={temperature:g}"
                for _ in range(min(config.warmup, len(chosen))):
                    server.answer(0, chosen[0], temperature, config.seed)
                answers = []
                for number, prompt in enumerate(tqdm(chosen, desc=title, leave=False)):
                    for answer in server.answer(number, prompt, temperature, config.seed + number):
                        answers.append(answer)
                        append(log, json.dumps({"set": title, **dataclasses.asdict(answer)}).encode() + b"\n")
                results[title] = summarize(answers, config.bootstrap, config.seed)
    seconds = time.perf_counter() - begun
    engine = {"endpoint": config.endpoint, "model": config.model, "counters": server.engine}
    write_json(folder / "metrics.json", {"results": results, "server": engine} | provenance.record(config))
    print(table(results))
    if server.engine is None:
        print("The server tells of no drafter: these are its own speeds.")
    return seconds


def summarize(answers: list[Served], resamples: int, seed: int) -> dict:
    """Figures of one prompt set, under the names that ``ppow evaluate`` gives them; None where there was no drafter."""
    found = {
        "prompts": len({answer.prompt for answer in answers}),
        "samples": len(answers),
        "tokens_per_second": rate(answers, "tokens", "seconds"),
    }
    if not any(answer.verifications for answer in answers):
        return found
    reached = [sum(column) for column in zip(*(answer.accepted for answer in answers if answer.accepted))]
    tried = [sum(answer.verifications for answer in answers), *reached]
    return found | {
        "acceptance_length": pooled(answers, lambda answer: answer.tokens - 1),
        "acceptance_length_95": interval(
            lambda some: pooled(some, lambda answer: answer.tokens - 1), resamples, seed, answers
        ),
        "engine_acceptance_length": 1 + pooled(answers, lambda answer: answer.total),
        "per_position": [after / before for before, after in zip(tried, reached) if before],
    }


class Server:
    """An OpenAI-compatible server, asked for one answer at a time.

    ``engine`` is whose counters were found: "vllm", "sglang", "llama.cpp", or None as long as there were none.
    """

    def __init__(self, config: EvaluateConfig):
        assert config.endpoint is not None
        self.config = config
        self.engine: str | None = None
        self.base = config.endpoint.rstrip("/")
        self.metrics = self.base.removesuffix("/v1") + "/metrics"
        self.headers = {"Content-Type": "application/json"}
        if token := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {token}"

    def answer(self, number: int, prompt: Prompt, temperature: float, seed: int) -> list[Served]:
        """Every turn of a prompt, each behind the server's own answers to those before it."""
        found: list[Served] = []
        for turn in range(len(prompt.turns)):
            body = self._body(prompt, [answer.text for answer in found][:turn])
            body |= {"model": self.config.model, "max_tokens": self.config.max_new_tokens}
            body |= {"temperature": temperature, "seed": seed, "stream": False}
            address = f"{self.base}/{'completions' if prompt.raw_completion else 'chat/completions'}"
            before, begun = self._counters(), time.perf_counter()
            reply = post(urllib.request.Request(address, json.dumps(body).encode(), self.headers))
            seconds = time.perf_counter() - begun
            text, tokens = _read(reply)
            verifications, total, accepted = self._drafting(reply, before, tokens)
            found.append(Served(number, tokens, seconds, verifications, total, accepted, text))
        return found

    def _body(self, prompt: Prompt, answers: list[str]) -> dict[str, Any]:
        if prompt.raw_completion:
            return {"prompt": prompt.turns[0]}
        messages = [*prompt.opening]
        for turn, answer in zip(prompt.turns, [*answers, None]):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        options = dict(prompt.options)
        tools = {"tools": options.pop("tools")} if options.get("tools") else {}
        return {"messages": messages, **tools, **({"chat_template_kwargs": options} if options else {})}

    def _drafting(self, reply: dict, before: dict, tokens: int) -> tuple[int, int, list[int]]:
        """Verifications, accepted drafts, and those per position, of the answer that just came."""
        after = self._settled()
        if "vllm:spec_decode_num_drafts_total" in after:
            self.engine = "vllm"
            drafts, accepted = (
                after[f"vllm:spec_decode_num_{name}_total"] - before.get(f"vllm:spec_decode_num_{name}_total", 0)
                for name in ("drafts", "accepted_tokens")
            )
            places = sorted(key for key in after if isinstance(key, tuple))
            return int(drafts), int(accepted), [int(after[key] - before.get(key, 0)) for key in places]
        if "sglang:spec_verify_calls_total" in after:
            self.engine = "sglang"
            name = "sglang:spec_verify_calls_total"
            verifications = int(after[name] - before.get(name, 0))
            return verifications, tokens - 1 - verifications, []
        timings = reply.get("timings") or {}
        if "draft_n_accepted" in timings:
            self.engine = "llama.cpp"
            accepted = int(timings["draft_n_accepted"])
            return max(tokens - 1 - accepted, 0), accepted, []
        if self.engine == "llama.cpp":  # says nothing of an answer without drafts
            return max(tokens - 1, 0), 0, []
        return 0, 0, []

    def _settled(self) -> dict:
        """The counters once two looks agree: they follow an answer, a moment later."""
        found = self._counters()
        for _ in range(100 if found else 0):
            time.sleep(SETTLED)
            again = self._counters()
            if again == found:
                break
            found = again
        return found

    def _counters(self) -> dict:
        """The counters of speculative decoding in /metrics, summed over engines; empty where the server has none."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.metrics, headers=self.headers), timeout=30) as page:
                return counters(page.read().decode("utf-8", "replace"))
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return {}


def counters(page: str) -> dict:
    """Prometheus' text of a server -> counters by name, those per position by (name, position)."""
    found: dict[Any, float] = {}
    for line in page.splitlines():
        match = _LINE.match(line)
        if match is None or not match[1].startswith(("vllm:spec_decode_", "sglang:spec_verify_calls")):
            continue
        name, labels, value = match.groups()
        position = _POSITION.search(labels or "") if name.endswith("_per_pos_total") else None
        if name.endswith("_total"):
            key: Any = (name, int(position[1])) if position else name
            found[key] = found.get(key, 0.0) + float(value)
    return found


def _read(reply: Any) -> tuple[str, int]:
    """Text and tokens of an answer. Raises RefusedError where it is none, or does not count its tokens."""
    try:
        choice, tokens = reply["choices"][0], reply["usage"]["completion_tokens"]
        text = choice["text"] if "text" in choice else choice["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RefusedError(f"answered without choices[0] or usage.completion_tokens: {str(reply)[:200]}") from None
    if not isinstance(tokens, int) or tokens < 1:
        raise RefusedError(f"answered with {tokens!r} tokens: nothing can be measured by it")
    return text or "", tokens
