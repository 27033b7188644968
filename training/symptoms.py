"""What ``ppow doctor`` measures of a pair, along answers that the target wrote greedily.

Two ways to put a pair together are compared by what a window gains, in tokens with the bonus, if one begins at every
token of the answers and each draft is accepted with the chance that sampling's rule gives it, min(1, Q / P). That is
smoother than greedy's yes or no, one window after the other (:func:`decoding`), so that few prompts tell more. The
thresholds are ours.
"""

import collections
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppow import PPOWDrafter
from ppow.probe_ppow import is_quantized
from ppow.transcript_ppow import Acceptance

from .acceptance import Along, Windows, first_drafts, reach, walk
from .answers import answer
from .config import DoctorConfig
from .evaluate import generation_configs
from .figures import ends_in_a_loop
from .loading import positions
from .preparation import pad_token
from .remedies import IN_ORDER, Finding, beside, command, fixed, imported_again, trained
from .target import FrozenTarget

BETTER, SURE = 0.02, 1.645  # share of a window's length, and standard errors (95%, one side)
TEMPLATE = 1.3  # length without the chat template over that with it, from which on a drafter is made for the former
PARTED = 0.1  # share of what windows gain along the text that generate() may lack: near ties in bfloat16
MISSING = 0.05  # share of the target's tokens that may be missing from the draft vocabulary
PLACES = 10  # where other names must be right before the draft vocabulary is called another run's
FAR = 0.8  # share of the first drafts that must still stand far from a text's beginning
FARTHEST, FEWEST = 4096, 32  # tokens of a long text, and of those in it that must lie far enough
OPENING = 8  # tokens of an answer after a question without template: alone, chat models often end it at once
DRAFTED = 4  # answers that are decoded with drafts, which costs most; the others are decoded together
ROWS = 16  # of these, at a time
BATCH = 4  # texts of one pass
Prompts = list[tuple[list[int], str | None]]  # ids, and what was put through the chat template; None: nothing was


class Text(NamedTuple):
    """A prompt of ``prompt`` tokens and the target's greedy answer, ``ids`` together."""

    ids: list[int]
    prompt: int
    question: str | None  # as in Prompts
    windows: Acceptance | None = None  # of an answer that was decoded with drafts
    whole: bool = True  # whether those kept their size where less room was left

    @property
    def answer(self) -> list[int]:
        """What there is to draft: the answer but for its first token, which the prompt's forward pass yields."""
        return self.ids[self.prompt + 1 :]


@dataclass
class Case:
    """A loaded pair; ``size`` tokens are drafted in each window, and ``bar`` moves with every text."""

    config: DoctorConfig
    target: FrozenTarget
    tokenizer: PreTrainedTokenizerBase
    drafter: PPOWDrafter
    size: int
    bar: tqdm

    def answers(self, prompts: Prompts, title: str, drafted: int) -> list[Text]:
        """The target's answers of two tokens or more, ``drafted`` of them decoded with drafts, to prompts that fit."""
        model = self.target.model
        found: list[Text] = []
        room = (positions(model.config) or FARTHEST) - self.config.max_new_tokens
        left = [(ids, question) for ids, question in prompts if 0 < len(ids) <= room]
        drafting = {"window_size": self.size, "draft_threshold": 0.0}
        plain, ours = generation_configs(model, 0.0, self.config.max_new_tokens, drafting)
        plain.pad_token_id = pad_token(self.tokenizer)
        self.bar.set_description(title)
        self.bar.update(len(prompts) - len(left))
        while left and len(found) < drafted:
            (prompt, question), *left = left
            ids = torch.tensor([prompt], device=model.device)
            given = {"attention_mask": torch.ones_like(ids), "generation_config": ours}
            out = model.generate(ids, **given, assistant_model=self.drafter)
            whole = bool(out.drafting.cuda_graphs)
            text = Text(out.sequences[0].tolist(), len(prompt), question, out.acceptance, whole)
            found += [text] if text.answer else []
            self.bar.update()
        for start in range(0, len(left), ROWS):
            part = left[start : start + ROWS]
            said = answer(model, [prompt for prompt, _ in part], plain)
            texts = [Text(prompt + ids, len(prompt), question) for (prompt, question), ids in zip(part, said)]
            found += [text for text in texts if text.answer]
            self.bar.update(len(part))
        return found

    def along(self, texts: list[Text], drafters: Iterable[PPOWDrafter], title: str) -> list[list[Windows]]:
        """Windows of each drafter along each text (tokens of its answer, K); the target reads a text once for all."""
        drafters, pad = list(drafters), pad_token(self.tokenizer)
        self.bar.set_description(title)
        self.target.taps = sorted({tap for drafter in drafters for tap in drafter.config.target_taps})
        found: list[list[Windows]] = [[] for _ in drafters]
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            read = Along(self.target, [text.ids for text in part], [text.prompt for text in part], pad)
            for drafter, windows in zip(drafters, found):
                rows = zip(*read.windows(drafter, self.size))
                windows += [Windows(*(each[: len(text.answer)] for each in row)) for row, text in zip(rows, part)]
            self.bar.update(len(part))
        return found

    def chances(self, texts: list[Text], title: str) -> list[torch.Tensor]:
        """Of each text, those of the drafter's windows along it (tokens of its answer, K)."""
        return [windows.chances for windows in self.along(texts, [self.drafter], title)[0]]


def measure(case: Case, prompts: Prompts, trained_length: int) -> tuple[dict, list[Finding]]:
    """All figures of a pair, and what is wrong by them.

    Args:
        trained_length: tokens of the longest texts that the drafter knows.

    Raises:
        ValueError: fewer than two prompts with something to draft, and what ``generate`` refuses.
    """
    texts = case.answers(prompts, "answers", DRAFTED)
    if len(texts) < 2:
        raise ValueError(
            f"{len(texts)} of {len(prompts)} prompts fit into the target's positions and are answered in two tokens or "
            "more, and two such prompts are needed. Bring others with --data."
        )
    others = list(ways(case.drafter, case.target.model.config.get_text_config(decoder=True).num_hidden_layers))
    read, *tried = case.along(texts, [case.drafter, *(way.drafter for way in others)], "windows along them")
    stands, given = [windows.stands for windows in read], [windows.chances for windows in read]
    first = [windows.drafts[:, 0].tolist() for windows in read]
    figures: dict[str, Any] = {"prompts": len(texts), "window_size": case.size}
    figures |= {"first_draft": float(torch.cat(stands)[:, 0].mean()), "ways": {"as given": _figures(given)}}
    findings = other_ways(case, others, tried, given, figures)
    for found in (
        draft_vocabulary(case, texts, stands, first, figures),
        decoding(case, texts, stands, figures),
        far_from_the_beginning(case, texts, trained_length, first, figures),
        chat_template(case, texts, given, figures),
        other_dtype(case, texts, given, figures),  # last: the pair stays in it
    ):
        findings += found
    return figures, findings


def length(chances: list[torch.Tensor]) -> float:
    """Tokens that a window gains if one begins at every token; ``chances`` of each text (tokens, K)."""
    return float(reach(torch.cat(chances)).mean())


def better(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether windows gain more in one way, by a share of ``BETTER`` and by ``SURE`` standard errors.

    These are over stretches of the texts, each of as many windows as overlap. Over whole texts a few that gain most
    would widen the error as they raise the mean, and two alike would pass for sure.
    """
    if len(one) < 2:
        return False
    pairs = [(reach(ours) - reach(theirs)).split(ours.shape[-1] + 1) for ours, theirs in zip(one, other)]
    more = torch.stack([stretch.sum() for stretches in pairs for stretch in stretches])
    sure = more.mean() > SURE * more.std() / len(more) ** 0.5
    return bool(sure) and length(one) >= (1 + BETTER) * length(other)


def _figures(chances: list[torch.Tensor]) -> dict:
    return {"length": length(chances), "first_draft": float(torch.cat(chances)[:, 0].mean())}


class Way(NamedTuple):
    """A pair put together otherwise: its name, what that would mean, the statement that leads there, its drafter."""

    name: str
    means: str
    statement: str
    drafter: PPOWDrafter


def ways(drafter: PPOWDrafter, layers: int) -> Iterator[Way]:
    """All that can be tried of a drafter; their weights are its own."""
    config, found = drafter.config, []
    for step, side in ((-1, "earlier"), (1, "later")):
        taps = [tap + step for tap in config.target_taps]
        if 0 <= taps[0] and taps[-1] <= layers:
            means = "Some count the states that enter a block, some what leaves it"
            found.append((f"taps one layer {side}", means, f"drafter.config.target_taps = {taps}"))
    for field in ("norm_output", "norm_before_residual"):
        value = not getattr(config, field)
        found.append((f"{field} {value}", "It was trained with this switch", f"drafter.config.{field} = {value}"))
    if drafter.pruned and not torch.equal(drafter.draft_columns(), drafter.t2d.nonzero()[:, 0]):
        found.append(("draft vocabulary in order", "d2t is not the ascending list of the tokens in t2d", IN_ORDER))
    for name, means, statement in found:
        other = copy.deepcopy(drafter, {id(weight): weight for weight in drafter.parameters()})
        exec(statement, {"drafter": other})  # what is tried is what a user is told to run
        for layer in other.layers:
            layer.norm_before_residual = other.config.norm_before_residual
        yield Way(name, means, statement, other)


def other_ways(
    case: Case, others: list[Way], tried: list[list[Windows]], given: list[torch.Tensor], figures: dict
) -> list[Finding]:
    """The way in which windows reach furthest, if it is better than what is given: such ways exclude each other."""
    found = []
    for (name, means, statement, _), read in zip(others, tried):
        chances = [windows.chances for windows in read]
        figures["ways"][name] = _figures(chances)
        if better(chances, given):
            words = f"With {name} a window gains {length(chances):.2f} tokens, as given {length(given):.2f}. {means}."
            found.append(Finding(name, words, fixed(case.config, statement), length(chances) - length(given)))
    return sorted(found, key=lambda finding: -finding.gain)[:1]


def draft_vocabulary(
    case: Case, texts: list[Text], stands: list[torch.Tensor], first: list[list[int]], figures: dict
) -> Iterator[Finding]:
    """How many of the target's own tokens can be drafted, the ceiling that follows, and whether tokens are misnamed.

    Lengths are greedy here: a draft of a missing token is never accepted.
    """
    size, held = case.drafter.config.vocab_size, case.drafter.config.draft_vocab_size
    known = torch.zeros(size, dtype=torch.bool).index_fill_(0, case.drafter.draft_columns().cpu(), True)
    inside = [known[text.answer] for text in texts]
    behind = torch.zeros(case.size, dtype=torch.bool)  # of windows that reach beyond the end
    can, cannot = (
        [torch.cat((rows == yes, behind)).unfold(0, case.size, 1)[:-1] for rows in inside] for yes in (True, False)
    )
    explained, wrong = misnamed([list(zip(drafts, text.answer)) for drafts, text in zip(first, texts)], known)
    figures["draft vocabulary"] = found = {
        "coverage": float(torch.cat(inside).float().mean()),
        "ceiling": length(can),
        "length": length(stands),
        "length_with_the_missing": length([torch.maximum(rows, gaps.float()) for rows, gaps in zip(stands, cannot)]),
        "wrong": wrong,
        "misnamed": explained,
    }
    if 1 - found["coverage"] > MISSING:
        words = (
            f"{1 - found['coverage']:.0%} of the target's own tokens are not in the draft vocabulary. A window gains "
            f"{found['ceiling']:.2f} tokens at most; drafted right, the missing ones would lift it from "
            f"{found['length']:.2f} to {found['length_with_the_missing']:.2f}."
        )
        again = trained(case.config, "--draft-vocab-size", str(min(size, 2 * held)), fresh=True)
        gain = found["length_with_the_missing"] - found["length"]
        yield Finding("coverage of the draft vocabulary", words, again, gain)
    if explained >= PLACES and explained > wrong / 2 and "draft vocabulary in order" not in figures["ways"]:
        words = (
            f"{explained} of {wrong} wrong first drafts would be right if each stood for the token that it met most in "
            "the other answers: d2t and t2d are not those that it was trained with."
        )
        yield Finding("draft vocabulary of another run", words, imported_again(case.config), first=True)


def misnamed(places: list[list[tuple[int, int]]], known: torch.Tensor) -> tuple[int, int]:
    """How well other names would suit the drafts, read off the places (draft, token) of texts.

    Looked at are drafts that are wrong though the token is ``known`` (V,) bool, and that the other texts hold, too.

    Returns:
        How many of them would be right if they stood for the token that they met most in the other texts, and never
        were right by their own name; and how many these drafts are.
    """
    right = {draft for text in places for draft, token in text if draft == token}
    everywhere: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)
    inside: dict[tuple[int, int], collections.Counter] = collections.defaultdict(collections.Counter)
    for number, text in enumerate(places):
        for draft, token in text:
            everywhere[draft][token] += 1
            inside[number, draft][token] += 1
    explained, wrong = 0, 0
    for number, text in enumerate(places):
        for draft, token in text:
            elsewhere = everywhere[draft] - inside[number, draft]
            if draft != token and known[token] and elsewhere:
                wrong += 1
                explained += draft not in right and elsewhere.most_common(1)[0][0] == token
    return explained, wrong


def decoding(case: Case, texts: list[Text], stands: list[torch.Tensor], figures: dict) -> Iterator[Finding]:
    """What generate() gained, against the same windows along the text, per draft position, and where the two part."""
    decoded = [(text.windows, rows) for text, rows in zip(texts, stands) if text.windows]
    lists = [[row for windows, _ in decoded for row in getattr(windows, n)] for n in ("drafted", "accepted", "gained")]
    room = None if texts[0].whole else case.config.max_new_tokens
    got, read = Acceptance(*lists), walk([rows for _, rows in decoded], case.size, room)
    parts = []
    for prompt, (ours, theirs) in enumerate(zip(got.gained, read.gained), 1):
        if ours != theirs:
            window = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
            where = {"prompt": prompt, "window": window + 1, "token": sum(ours[:window]) + 2}
            parts.append(where | {"generate": ours[window], "along_the_text": theirs[window]})
    figures["decoding"] = {"answers": len(decoded), "parts": parts} | {
        name: {"length": found.acceptance_length, "per_position": found.per_position()}
        for name, found in (("generate", got), ("along the text", read))
    }
    if got.acceptance_length < (1 - PARTED) * read.acceptance_length:
        draft = min(min(part["generate"], part["along_the_text"]) for part in parts)
        words = (
            f"generate() gains {got.acceptance_length:.2f} tokens in a window, the same windows along the text "
            f"{read.acceptance_length:.2f}. They part from draft {draft} on, first at token {parts[0]['token']} of "
            f"answer {parts[0]['prompt']}: decoding feeds the drafter something else than training."
        )
        check = command(case.config, "evaluate", "--no-cuda-graphs", "--output-dir", beside(case.config, "figures"))
        yield Finding("decoding", words, check, read.acceptance_length - got.acceptance_length)


def far_from_the_beginning(
    case: Case, texts: list[Text], limit: int, first: list[list[int]], figures: dict
) -> Iterator[Finding]:
    """First drafts after ``limit`` tokens: of answers alone, and at the end of a text that holds all of them.

    A draft is accepted if the target would choose it there: far from the beginning it may choose otherwise than alone.
    """
    end = min(limit + sum(len(text.ids) for text in texts), FARTHEST, positions(case.target.model.config) or FARTHEST)
    ids: list[int] = []
    alone, places = [], []
    while len(ids) < end:
        for text, drafts in zip(texts, first):
            begun = len(ids) + text.prompt + 1  # of the tokens that are drafted
            there = [c for c in range(len(drafts)) if limit <= begun + c < end]
            alone += [drafts[c] == text.answer[c] for c in there]
            places += [begun + c - 2 for c in there]
            ids += text.ids
    figures["far"] = {"limit": limit, "tokens": end, "places": len(places)}
    if len(places) < FEWEST:
        return
    case.bar.set_description(f"after {limit} tokens")
    case.target.taps = case.drafter.config.target_taps
    stands = torch.eq(*first_drafts(case.target, case.drafter, ids[:end]))
    far, near = float(stands[places].float().mean()), sum(alone) / len(alone)
    case.bar.update()
    figures["far"] |= {"first_draft": far, "first_draft_alone": near}
    if far < FAR * near and near - far > SURE * (0.5 / len(places)) ** 0.5:  # each of the two deviates by 0.5 at most
        words = f"{far:.0%} of its first drafts are accepted after {limit} tokens; {near:.0%} in these answers alone."
        yield Finding("long texts", words, trained(case.config, "--max-length", str(end)), near - far)


def chat_template(case: Case, texts: list[Text], given: list[torch.Tensor], figures: dict) -> Iterator[Finding]:
    """What windows gain in answers to the same questions without the chat template; loops count on neither side."""
    tokenizer = case.tokenizer
    bare: Prompts = []
    for text in texts:
        if text.question is not None:
            opening = tokenizer.decode(text.ids[text.prompt :][:OPENING], skip_special_tokens=True)
            bare.append((tokenizer(f"{text.question}\n{opening}")["input_ids"], None))
    plain = case.answers(bare, "without template", 0)
    if not plain:
        return
    chances = case.chances(plain, "without template")
    figures["ways"]["without the chat template"] = _figures(chances)
    sides = [(text, rows) for text, rows in zip(texts, given) if text.question is not None], zip(plain, chances)
    within, without = ([rows for text, rows in side if not ends_in_a_loop(text.ids)] for side in sides)
    if min(len(within), len(without)) < 2:
        return
    ours, theirs = _figures(within), _figures(without)
    if theirs["length"] > TEMPLATE * ours["length"] and theirs["first_draft"] > ours["first_draft"]:
        words = (
            f"A window gains {theirs['length']:.2f} tokens without the chat template and {ours['length']:.2f} with it, "
            "as with a drafter that was trained without it."
        )
        yield Finding("chat template", words, trained(case.config), theirs["length"] - ours["length"])


def other_dtype(case: Case, texts: list[Text], given: list[torch.Tensor], figures: dict) -> Iterator[Finding]:
    """The same texts in the other of float32 and bfloat16, where the machine has room for it."""
    if is_quantized(case.target.model):  # its products have a precision of their own
        return
    name = "bfloat16" if case.config.dtype == "float32" else "float32"
    models: tuple[PreTrainedModel, ...] = (case.target.model, case.drafter)
    parameters = [parameter for model in models for parameter in model.parameters()]  # tied ones come once
    if name == "float32" and 2 * sum(p.numel() for p in parameters) > free_bytes(case.target.model.device):
        return
    for parameter in parameters:  # buffers stay: rotary frequencies keep their precision
        parameter.data = parameter.data.to(getattr(torch, name))
    chances = case.chances(texts, name)
    figures["ways"][name] = _figures(chances)
    wide, narrow = (given, chances) if name == "bfloat16" else (chances, given)
    if better(wide, narrow):
        words = (
            f"A window gains {length(narrow):.2f} tokens in bfloat16 and {length(wide):.2f} in float32: serve the pair "
            "in float32, or train the drafter on in bfloat16."
        )
        again = trained(case.config, "--dtype", "bfloat16")
        yield Finding("bfloat16", words, again, length(wide) - length(narrow))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
