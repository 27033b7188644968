"""Draws from large vocabularies in a few kernels, as :mod:`acceptance_ppow` does in many: for logits on a GPU.

Torch draws one token of 128,256 in some eight kernels, each over the vocabulary again, and several of them keep one
multiprocessor busy with a whole row. Here every row is divided among blocks twice: a first kernel finds each block's
maximum, sum and winner, a second one puts them together. Random numbers are torch's own, in the same order and number,
so a seed gives the tokens that it gives there, but where two are a rounding apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from .drafting_ppow import DraftWindow, top
from .fused_ppow import reachable
from .triton_ppow import HAS_TRITON, tl, triton

PIECE = 2048  # tokens of a vocabulary that one block looks at
CANDIDATES = 64  # among which a draft distribution's edge is looked for, where top_k names no number


@dataclass(frozen=True)
class Warp:
    """What transformers' warpers make of logits, as far as the kernels know them; None: nothing.

    Attributes:
        temperature, top_k, top_p, min_p: as in ``GenerationConfig``.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @classmethod
    def of(cls, warpers: Sequence[LogitsProcessor]) -> "Warp | None":
        """What these warpers do; None where the kernels cannot."""
        names = {"TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k"}
        names |= {"TopPLogitsWarper": "top_p", "MinPLogitsWarper": "min_p"}
        found: dict[str, float] = {}
        for warper in warpers:
            name = names.get(type(warper).__name__)
            if name is None or name in found or getattr(warper, "filter_value", -math.inf) != -math.inf:
                return None
            found[name] = getattr(warper, name)
        return cls(**found)  # type: ignore[arg-type]

    @property
    def is_exact(self) -> bool:
        """Whether the kernels filter exactly what transformers does, as a target's distribution demands."""
        return self.top_p is None and self.min_p is None

    def lowest(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The lowest logit that is not filtered, (R, V) -> (R,) float32; None: all stay.

        Of ``top_k`` alone as transformers has it, ties included. With the others it is near: tokens that tie at the
        edge all stay, and without ``top_k`` no more than :data:`CANDIDATES` are considered.
        """
        if self.is_exact and self.top_k is None:
            return None
        values = top(logits, min(self.top_k or CANDIDATES, logits.shape[-1]))[0].float()
        if self.is_exact:
            return values[:, -1].contiguous()
        probs = (values / (self.temperature or 1.0)).softmax(-1)
        stays = probs >= (self.min_p or 0.0) * probs[:, :1]
        if self.top_p is not None:
            stays &= probs.cumsum(-1) - probs < self.top_p
        stays[:, 0] = True  # the likeliest, whatever top_p says
        return values.masked_fill(~stays, math.inf).amin(-1)


def draw(logits: torch.Tensor, warp: Warp, with_probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One draw per row from the warped distribution, by an exponential race.

    Args:
        logits: (R, V), :func:`can_draw`.
        with_probs: also give the distributions.

    Returns:
        (R,) int64 ids, and (R, V) float32 or None.
    """
    pieces = _Pieces(logits, warp)
    race = torch.empty(pieces.rows, pieces.size, device=logits.device).exponential_()
    parts, places = pieces.weigh(race)
    found = torch.empty(pieces.rows, dtype=torch.long, device=logits.device)
    probs = torch.empty_like(race) if with_probs else None
    _drawn[(pieces.rows, pieces.count if with_probs else 1)](
        pieces.logits, pieces.lowest, parts, places, found, race if probs is None else probs, *pieces.numbers,
        **pieces.kind, WRITE=with_probs, num_warps=4,
    )  # fmt: skip
    return found, probs


def reject_drawn(
    window: DraftWindow, logits: torch.Tensor, warp: Warp, columns: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`acceptance_ppow.reject` on the target's warped distributions.

    Args:
        window: a sampled chain (with ``draft_ids`` and ``draft_probs``).
        logits: (B, K + 1, V), :func:`can_draw`.
        columns: (D,) target ids of the draft vocabulary; None: it is the target's.
    """
    draft_ids, draft_probs = window.draft_ids, window.draft_probs
    assert draft_ids is not None and draft_probs is not None
    (batch, drafts), device = draft_ids.shape, logits.device
    pieces = _Pieces(logits.flatten(0, 1), warp)
    parts, _ = pieces.weigh(None)
    coins = torch.rand(batch, drafts, device=device)
    accepted = torch.empty(batch, dtype=torch.long, device=device)
    tokens, draft_ids, draft_probs = window.tokens.contiguous(), draft_ids.contiguous(), draft_probs.contiguous()
    _judged[(batch,)](
        pieces.logits, pieces.lowest, parts, tokens, draft_ids, draft_probs, coins, accepted, draft_probs.shape[2],
        drafts, *pieces.numbers, **pieces.kind, NODES=triton.next_power_of_2(drafts), num_warps=4,
    )  # fmt: skip
    spread = draft_probs[torch.arange(batch, device=device), accepted.clamp(max=drafts - 1)]
    if columns is not None:
        spread = torch.zeros(batch, pieces.size, device=device).index_copy_(1, columns, spread)
    race = torch.empty(batch, pieces.size, device=device).exponential_()
    left = torch.empty(batch, pieces.count, 3, device=device)
    places = torch.empty(batch, pieces.count, 2, dtype=torch.long, device=device)
    _left[(batch, pieces.count)](
        pieces.logits, pieces.lowest, parts, accepted, spread, race, left, places, drafts, *pieces.numbers,
        **pieces.kind, num_warps=4,
    )  # fmt: skip
    following = torch.empty(batch, dtype=torch.long, device=device)
    _chosen[(batch,)](left, places, accepted, following, drafts, pieces.count, PARTS=pieces.kind["PARTS"], num_warps=1)
    return accepted, window.depth, following


class _Pieces:
    """Logits (R, V) divided among blocks: what every kernel is given of them."""

    def __init__(self, logits: torch.Tensor, warp: Warp):
        self.logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self.rows, self.size = logits.shape
        self.count = triton.cdiv(self.size, PIECE)
        lowest = warp.lowest(self.logits)
        self.lowest = self.logits if lowest is None else lowest
        temperature = 1.0 if warp.temperature is None else float(warp.temperature)
        self.numbers = self.logits.stride(0), self.size, self.count, temperature
        self.kind = {"CUT": lowest is not None, "BLOCK": PIECE, "PARTS": triton.next_power_of_2(self.count)}

    def weigh(self, race: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every piece: maximum, sum, and by how much who wins the race -> (R, count, 3), its place (R, count)."""
        parts = torch.empty(self.rows, self.count, 3, device=self.logits.device)
        places = torch.empty(self.rows, self.count, dtype=torch.long, device=self.logits.device)
        _weighed[(self.rows, self.count)](
            self.logits, self.lowest, parts if race is None else race, parts, places, *self.numbers,
            CUT=self.kind["CUT"], RACED=race is not None, BLOCK=PIECE, num_warps=4,
        )  # fmt: skip
        return parts, places


def can_draw(logits: torch.Tensor) -> bool:
    """Whether the kernels serve these logits."""
    return reachable(logits) and logits.dtype in (torch.float16, torch.bfloat16, torch.float32)


if HAS_TRITON:

    @triton.jit
    def _scaled(  # type: ignore[no-untyped-def]
        logits, lowest, row, at, stride, inside, temperature, CUT: tl.constexpr
    ):  # fmt: skip
        """Logits / temperature at some places of a row (or of rows); -inf outside, and below what is kept."""
        value = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
        scaled = value / temperature
        if CUT:  # as transformers, which divides first: what is equal then stays
            scaled = tl.where(scaled < tl.load(lowest + row) / temperature, float("-inf"), scaled)
        return scaled

    @triton.jit
    def _together(parts, row, count, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """A row's maximum, and its sum of exp(l - maximum)."""
        each = tl.arange(0, PARTS)
        part = parts + (row * count + each) * 3
        high = tl.load(part, mask=each < count, other=float("-inf"))
        highest = tl.max(high, 0)
        return highest, tl.sum(tl.load(part + 1, mask=each < count, other=0.0) * tl.exp(high - highest), 0)

    @triton.jit
    def _weighed(  # type: ignore[no-untyped-def]
        logits, lowest, race, parts, places, stride, size, count, temperature,
        CUT: tl.constexpr, RACED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One piece of a row: max l, sum exp(l - max l), argmax l - max l - log(race), of l = logits / temperature."""
        row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        scaled = _scaled(logits, lowest, row, at, stride, inside, temperature, CUT)
        high = tl.max(scaled, 0)
        total = tl.sum(tl.where(scaled == float("-inf"), 0.0, tl.exp(scaled - high)), 0)
        part = row * count + piece
        tl.store(parts + part * 3, high)
        tl.store(parts + part * 3 + 1, total)
        if RACED:  # from the maximum on, since beside a large l the race would be rounded away
            near = tl.where(scaled == float("-inf"), float("-inf"), scaled - high)
            score = near - tl.log(tl.load(race + row * size + at, mask=inside, other=1.0))
            best = tl.max(score, 0)
            tl.store(parts + part * 3 + 2, best)
            tl.store(places + part, tl.min(tl.where(score == best, at, size - 1), 0).to(tl.int64))

    @triton.jit
    def _drawn(  # type: ignore[no-untyped-def]
        logits, lowest, parts, places, found, probs, stride, size, count, temperature,
        CUT: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """One piece of a row's distribution; the first also says who won."""
        row, piece, each = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, PARTS)
        if piece == 0:
            part = parts + (row * count + each) * 3
            high = tl.load(part, mask=each < count, other=float("-inf"))
            score = tl.load(part + 2, mask=each < count, other=float("-inf")) + (high - tl.max(high, 0))
            first = tl.min(tl.where(score == tl.max(score, 0), each, count - 1), 0)
            tl.store(found + row, tl.load(places + row * count + first))
        if WRITE:
            highest, total = _together(parts, row, count, PARTS)
            at = piece * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            scaled = _scaled(logits, lowest, row, at, stride, inside, temperature, CUT)
            tl.store(probs + row * size + at, tl.exp(scaled - highest) / total, mask=inside)

    @triton.jit
    def _judged(  # type: ignore[no-untyped-def]
        logits, lowest, parts, tokens, draft_ids, draft_probs, coins, accepted, width, drafts,
        stride, size, count, temperature,
        CUT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, NODES: tl.constexpr,
    ):  # fmt: skip
        """One row of the batch: how many drafts x have u q(x) < p(x), up to the first that has not."""
        batch, node, each = tl.program_id(0).to(tl.int64), tl.arange(0, NODES), tl.arange(0, PARTS)
        inside = node < drafts
        row = batch * (drafts + 1) + tl.where(inside, node, 0)
        part = parts + (row[:, None] * count + each[None, :]) * 3
        known = (each < count)[None, :]
        high = tl.load(part, mask=known, other=float("-inf"))
        highest = tl.max(high, 1)
        total = tl.sum(tl.load(part + 1, mask=known, other=0.0) * tl.exp(high - highest[:, None]), 1)
        token = tl.load(tokens + row + 1)
        p = tl.exp(_scaled(logits, lowest, row, token, stride, inside, temperature, CUT) - highest) / total
        place = batch * drafts + node
        draft = tl.load(draft_ids + place, mask=inside, other=0)
        q = tl.load(draft_probs + place * width + draft, mask=inside, other=0.0)
        coin = tl.load(coins + place, mask=inside, other=1.0)
        fails = inside & ((coin * q < p) == 0)
        tl.store(accepted + batch, tl.min(tl.where(fails, node, drafts), 0).to(tl.int64))

    @triton.jit
    def _left(  # type: ignore[no-untyped-def]
        logits, lowest, parts, accepted, spread, race, left, places, drafts, stride, size, count, temperature,
        CUT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """One piece of what a row draws from: the sum of r = (p - q)+, and who wins the race for r and for p."""
        batch, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row = batch * (drafts + 1) + tl.load(accepted + batch)
        highest, total = _together(parts, row, count, PARTS)
        at = piece * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        p = tl.exp(_scaled(logits, lowest, row, at, stride, inside, temperature, CUT) - highest) / total
        q = tl.load(spread + batch * size + at, mask=inside, other=0.0)
        ran = tl.load(race + batch * size + at, mask=inside, other=1.0)
        rest = tl.maximum(p - q, 0.0)
        to = batch * count + piece
        tl.store(left + to * 3, tl.sum(rest, 0))
        of_rest, of_p = tl.where(inside, rest / ran, -1.0), tl.where(inside, p / ran, -1.0)
        best = tl.max(of_rest, 0)
        tl.store(left + to * 3 + 1, best)
        tl.store(places + to * 2, tl.min(tl.where(of_rest == best, at, size - 1), 0).to(tl.int64))
        best = tl.max(of_p, 0)
        tl.store(left + to * 3 + 2, best)
        tl.store(places + to * 2 + 1, tl.min(tl.where(of_p == best, at, size - 1), 0).to(tl.int64))

    @triton.jit
    def _chosen(left, places, accepted, following, drafts, count, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The winner of a row: of r after a rejection, unless rounding left nothing of it, else of p."""
        batch, each = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
        inside, at = each < count, left + (batch * count + each) * 3
        rest = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        rejected = (tl.load(accepted + batch) < drafts) & (rest > 0)
        of_rest = tl.load(at + 1, mask=inside, other=-1.0)
        of_p = tl.load(at + 2, mask=inside, other=-1.0)
        score = tl.where(rejected, of_rest, of_p)
        first = tl.min(tl.where(score == tl.max(score, 0), each, count - 1), 0)
        place = places + (batch * count + first) * 2
        tl.store(following + batch, tl.where(rejected, tl.load(place), tl.load(place + 1)))
