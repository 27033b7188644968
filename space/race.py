"""The race: the plain target and the target with each drafter, one after the other on the whole machine.

Every system first writes the whole answer, shown while it is written: that is the warm-up and does not count. Then each
is measured in every round while the page stands still, the order turned around from round to round, and the median
counts. Every token is stamped when it arrives, so that the page can replay the median runs side by side at the speed
that was measured. The settings of a generation are those of ``ppow evaluate``.
"""

import math
import tempfile
import time
import unicodedata
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

PLAIN = "plain target"
MAX_CHARACTERS = 4000
LIMITS = {
    "temperature": (0.0, 2.0),
    "window_size": (1, 16),
    "tree_depth": (1, 10),
    "tree_top_k": (1, 16),
    "tree_nodes": (1, 128),
    "max_new_tokens": (8, 256),
    "seed": (0, 2**31 - 1),
}
ROUNDS = 3  # an odd number: the median is a run
WARM_TOKENS = 16  # that each system writes when the page starts
LIVE_SECONDS = 0.12  # between two looks at a running generation
# All model work has one thread: one generation at a time owns the clock and the random numbers.
MODEL_THREAD = ThreadPoolExecutor(1, "model")
_FOLDER = tempfile.TemporaryDirectory(prefix="ppow-space-")  # removed when the page's process ends
_STOPS = Path(_FOLDER.name)


@dataclass(frozen=True)
class Settings:
    """What a visitor asks for; :meth:`check` is the boundary, whatever the page or a client sent."""

    prompt: str
    temperature: float = 0.0
    drafting: str = "chain"
    window_size: int = 10
    tree_depth: int = 7
    tree_top_k: int = 10
    tree_nodes: int = 60
    max_new_tokens: int = 128
    seed: int = 0

    def check(self) -> "Settings":
        """The settings with whole numbers as int. Raises ValueError with a message for the visitor."""
        check_prompt(self.prompt)
        if self.drafting not in ("chain", "tree"):
            raise ValueError(f"Drafting must be 'chain' or 'tree', got {self.drafting!r:.40}.")
        values = {}
        for name, (low, high) in LIMITS.items():
            value, whole = getattr(self, name), isinstance(low, int)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{name} must be {kind} from {low} to {high}, got {value!r:.40}.")
            values[name] = int(value) if whole else float(value)
        return Settings(self.prompt, drafting=self.drafting, **values)

    @classmethod
    def own(cls, pair, prompt: str) -> "Settings":
        """The drafting of the loaded pair, up to ``LIMITS``. Its threshold and schedule hold without being named."""
        own = pair.drafting
        found = {name: getattr(own, name) for name in ("window_size", "tree_depth", "tree_top_k", "tree_nodes")}
        found = {name: min(value, LIMITS[name][1]) for name, value in found.items() if value is not None}
        return cls(prompt, drafting="tree" if own.is_tree else "chain", **found)

    @property
    def options(self) -> dict:
        """The drafting options in the drafter's own words."""
        names = ("window_size",) if self.drafting == "chain" else ("tree_depth", "tree_top_k", "tree_nodes")
        return {name: getattr(self, name) for name in names}

    @property
    def label(self) -> str:
        """How it drafts and samples; runs are pooled only when this agrees."""
        how = f"chain of {self.window_size}"
        if self.drafting == "tree":
            how = f"tree {self.tree_depth} deep, {self.tree_top_k} wide, {self.tree_nodes} nodes"
        return f"{how}, temperature {self.temperature:g}"


def check_prompt(prompt) -> None:
    """Raise ValueError, with a message for the visitor, unless the prompt is a text that can be answered."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("The prompt is empty. Write something for the target to answer.")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"The prompt has {len(prompt):,} characters; at most {MAX_CHARACTERS:,} are read here.")
    odd = sorted({c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\r\t"})
    if odd:
        codes = ", ".join(f"U+{ord(c):04X}" for c in odd[:5])
        raise ValueError(f"The prompt holds control characters ({codes}). Remove them, please.")


@dataclass
class Run:
    """One answer while it is made and afterwards.

    Attributes:
        name: PLAIN or the drafter's.
        steps: (seconds since the start, tokens that arrived) per forward of the target; while it runs, per token.
        seconds: whole generation, prefill included; None while it runs.
        drafted, accepted, gained: per verification, as in the drafter's ``Acceptance``.
        drafting: how it drafted, read back from what ran.
        differences: why its greedy tokens are not the plain target's (``lossless_ppow`` of the drafter's code): dicts
            with ``verdict``, "near tie" or "fault", and ``text``.
        rates: tokens per second of all rounds that the system has finished, in their order.
    """

    name: str
    steps: list[tuple[float, list[int]]] = field(default_factory=list)
    seconds: float | None = None
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    gained: list[int] = field(default_factory=list)
    drafting: str = ""
    differences: list[dict] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for _, tokens in list(self.steps) for token in tokens]

    @property
    def rate(self) -> float:
        """Tokens per second so far."""
        steps = list(self.steps)
        seconds = self.seconds or (steps[-1][0] if steps else 0.0)
        return sum(len(tokens) for _, tokens in steps) / seconds if seconds else 0.0


class Clock(BaseStreamer):
    """Stamps the tokens of a run as they arrive; the first thing it is handed is the prompt."""

    def __init__(self, run: Run):
        self.run, self.started, self.prompt_seen = run, time.perf_counter(), False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.run.steps.append((time.perf_counter() - self.started, value.reshape(-1).tolist()))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class StopFlag(StoppingCriteria):
    """The wish to stop one race, as a file: also seen from the process of its own in which a ZeroGPU runs."""

    def __init__(self):
        self.path = _STOPS / uuid.uuid4().hex

    def set(self) -> None:
        self.path.touch()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    @property
    def is_set(self) -> bool:
        return self.path.exists()

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_set, device=input_ids.device)


def prompt_ids(pair, settings: Settings) -> torch.Tensor:
    """(1, P) ids of the chat. Raises ValueError when prompt and answer do not fit into the target."""
    chat = [{"role": "user", "content": settings.prompt}]
    ids = pair.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    if ids.shape[1] + settings.max_new_tokens > pair.longest:
        raise ValueError(
            f"The prompt takes {ids.shape[1]} tokens and the answer up to {settings.max_new_tokens}; this target reads "
            f"{pair.longest} in all. Shorten one of the two."
        )
    return ids.to(pair.target.device)


def generation_config(pair, settings: Settings, drafter) -> GenerationConfig:
    """As ``ppow evaluate`` sets it: the target's own distribution, without truncation by top-k or top-p."""
    chosen = {"do_sample": False}
    if settings.temperature > 0:
        chosen = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    chosen |= {"max_new_tokens": settings.max_new_tokens}
    if drafter is not None:
        # a size that a call names is constant, a visitor's is what the drafter makes of it
        chosen |= {"window_schedule": pair.drafting.window_schedule, **settings.options}
        chosen |= {"return_dict_in_generate": True}
    return pair.part("drafting_ppow").call_config(pair.target.generation_config, **chosen)


def by_verification(steps: list[tuple[float, list[int]]], gained: list[int]) -> list[tuple[float, list[int]]]:
    """Steps of single tokens, as they are streamed -> one for the prompt's own token and one per verification."""
    tokens = [(seconds, token) for seconds, some in steps for token in some]
    grouped, at = [], 0
    for count in (1, *gained):
        part, at = tokens[at : at + count], at + count
        if part:
            grouped.append((part[-1][0], [token for _, token in part]))
    return grouped


def stream(pair, settings: Settings, ids: torch.Tensor, name: str, stop: StopFlag) -> Iterator[Run]:
    """Generate once; yield the growing run now and then, and at last the finished one."""
    run, drafter = Run(name), pair.drafters.get(name)
    config = generation_config(pair, settings, drafter)

    def generate():
        torch.manual_seed(settings.seed)
        clock = Clock(run)
        out = pair.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=clock,
            **({} if drafter is None else {"assistant_model": drafter}),
        )
        run.seconds = time.perf_counter() - clock.started
        if drafter is not None:
            run.drafting = str(pair.part("drafting_ppow").what_was_drafted(out, settings.options))
            figures = out.acceptance
            run.drafted, run.accepted, run.gained = figures.drafted[0], figures.accepted[0], figures.gained[0]
            run.steps = by_verification(run.steps, run.gained)

    work = MODEL_THREAD.submit(generate)
    try:
        yield run
        while not wait([work], LIVE_SECONDS).done:
            yield run
    finally:  # also when the visitor has left: the machine belongs to the next one
        if not work.done():
            stop.set()
            wait([work])
            stop.clear()
    work.result()  # raises what the generation raised
    run.stopped = stop.is_set
    yield run


def race(pair, settings: Settings, stop: StopFlag) -> Iterator[list[Run]]:
    """All systems, round by round; yields the runs to show, again and again. Ends early once ``stop`` is set.

    Shown are the runs of the warm-up, which grow while they are written, and at last the run of every system whose time
    is the median. A measured round yields too, though nothing new: whoever takes the runs may leave at any moment.
    """
    ids, names = prompt_ids(pair, settings), [PLAIN, *pair.drafters]
    yield [Run(PLAIN)]  # before anything is done
    shown: dict[str, Run] = {}
    for name in names:
        for run in stream(pair, settings, ids, name, stop):
            yield [*shown.values(), run]
        if run.stopped:
            return
        shown[name] = run
    rounds: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            for run in stream(pair, settings, ids, name, stop):
                if run.seconds is None:
                    yield [*shown.values()]
            shown[name].stopped = run.stopped
            if not run.stopped:
                rounds[name].append(run)
                shown[name].rates.append(run.rate)
            yield [*shown.values()]
            if run.stopped:
                return
    plain, *others = (middle(made, shown[name].rates) for name, made in rounds.items())
    for run in others if settings.temperature == 0 else ():
        odd = next((made for made in (shown[run.name], *rounds[run.name]) if made.tokens != plain.tokens), None)
        if odd:  # in whichever run
            run.differences = MODEL_THREAD.submit(explain, pair, settings, ids, odd, plain).result()
    yield [plain, *others]


def middle(rounds: list[Run], rates: list[float]) -> Run:
    """The run of the median rate, which keeps the rates of all."""
    found = sorted(rounds, key=lambda run: run.rate)[len(rounds) // 2]
    found.rates = rates
    return found


def speedup(run: Run, plain: Run) -> tuple[float, float, float]:
    """Of the median rates, and the lowest and the highest of one round."""
    each = [ours / theirs for ours, theirs in zip(run.rates, plain.rates)]
    return run.rate / plain.rate, min(each), max(each)


def explain(pair, settings: Settings, ids: torch.Tensor, run: Run, plain: Run) -> list[dict]:
    """Why a run's greedy tokens are not the plain target's."""
    drafter = pair.drafters[run.name]
    config = generation_config(pair, settings, drafter)
    found = drafter.explain(pair.target, ids, run.tokens, plain.tokens, config)
    return [{"verdict": difference.verdict, "text": str(difference)} for difference in found]


def identical(runs: list[Run], temperature: float) -> bool | None:
    """Whether every drafter gave the plain target's tokens; None where that is not to be expected or not known."""
    finished = len(runs) > 1 and not any(run.stopped or run.seconds is None for run in runs)
    same = all(run.tokens == runs[0].tokens and not run.differences for run in runs[1:])
    return same if finished and temperature == 0 else None


def warm_up(pair) -> None:
    """Let every system run once, so that nobody's race pays for first-time work."""
    for drafting in ("chain", "tree"):
        settings = Settings("Hello", drafting=drafting, max_new_tokens=WARM_TOKENS)
        for name in [PLAIN, *pair.drafters]:
            for _ in stream(pair, settings, prompt_ids(pair, settings), name, StopFlag()):
                pass
