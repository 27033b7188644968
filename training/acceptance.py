"""Acceptance of a drafter along texts that its target wrote: every position in one batched pass.

Speculative decoding is lossless, so the target's answers are what decoding with any drafter could have written. Greedy:
a draft is accepted when it is the text's token. Sampling: given that the text's token is x, the draft was accepted with
probability min(1, Q(x) / P(x)), independently at every position, which is the exact law of accepted lengths given the
text. The verifications that a text takes follow by recursion over its positions (in expectation at temperature 1, so
the coins add no noise).
"""

from typing import NamedTuple

import torch

from ppow import PPOWDrafter
from ppow.transcript_ppow import Acceptance

from .blocks import unroll
from .target import FrozenTarget, log_norm


class Windows(NamedTuple):
    """What stands of windows along answers, on the CPU; window c has the first c + 1 tokens of an answer as its prefix.

    Attributes:
        chances: (.., R, K) float32; of draft i, that sampling accepts it, given all before it were. 0 behind the end.
        stands: the same of greedy decoding: whether the most probable draft is the text's token, 1 or 0.
        drafts: (.., R, K) these most probable ones, int64 target ids.
    """

    chances: torch.Tensor
    stands: torch.Tensor
    drafts: torch.Tensor


class Along:
    """Answers that a target has read, once, for windows of any drafters along them.

    Args:
        target: its ``taps`` hold all that these drafters read.
        ids: texts, prompt and answer; prompt: tokens of each that are prompt.
        pad: token to put behind the shorter ones.
    """

    def __init__(self, target: FrozenTarget, ids: list[list[int]], prompt: list[int], pad: int):
        device = target.model.device
        self.target, self.taps, width = target, target.taps, max(map(len, ids))
        self.ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device)  # (B, T)
        self.lengths, begun = (torch.tensor(count, device=device) for count in ([len(row) for row in ids], prompt))
        windows = torch.arange(int((self.lengths - begun).max()) - 1, device=device)
        # the pair with the newest committed token
        self.starts = (begun[:, None] - 1 + windows).clamp(max=width - 2)  # (B, R)
        self.reading = target.read(self.ids)
        self.norm = log_norm(self.reading.logits)  # (B, T)

    @torch.no_grad()
    def windows(self, drafter: PPOWDrafter, size: int) -> Windows:
        """Windows of ``size`` drafts from every token of the answers: (B, R, K), R + 1 the longest answer's tokens."""
        states = dict(zip(self.taps, self.reading.taps.chunk(len(self.taps), -1)))
        taps = torch.cat([states[tap] for tap in drafter.config.target_taps], -1)
        unrolled = unroll(drafter, self.target.model, self.ids, taps)
        logits, width = self.reading.logits, self.ids.shape[1]
        row = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        draft_ids = torch.full((logits.shape[-1],), -1, device=self.ids.device)
        draft_ids[drafter.draft_columns()] = torch.arange(drafter.config.draft_vocab_size, device=self.ids.device)
        hidden, token, found = unrolled.begin(self.starts), self.starts, []
        for i in range(size):
            if i:
                hidden = unrolled.advance(token)
            place = self.starts + 2 + i  # of the token that is drafted
            inside = place < self.lengths[:, None]
            place = place.clamp(max=width - 1)
            token = self.ids.gather(1, place)
            scores = unrolled.logits(hidden, unrolled.previous).float()  # (B, R, D)
            drafts = drafter.to_target_ids(scores.argmax(-1))
            wanted = logits[row, place - 1, token].float() - self.norm.gather(1, place - 1)
            known = draft_ids[token]
            drawn = scores.gather(-1, known.clamp(min=0)[..., None])[..., 0] - scores.logsumexp(-1)
            chances = torch.where(inside & (known >= 0), (drawn - wanted).clamp(max=0).exp(), 0.0)
            found.append((chances, (inside & (drafts == token)).float(), drafts))
        return Windows(*(torch.stack(values, -1).cpu() for values in zip(*found)))


def verifications(stands: torch.Tensor, tokens: list[int]) -> list[float]:
    """Expected verifications of each text.

    With c answer tokens after the first committed, Pr(k) = prod_{i<k} a_i * (1 - a_k), and
    N(c) = 1 + sum_k Pr(k) N(min(c + k + 1, tokens)), N(tokens) = 0. A chance of 0 or 1 makes it a plain walk.

    Args:
        stands: (B, R, K) of :class:`Windows`, or its chances; tokens: to gain, of each text.
    """
    batch, rows, size = stands.shape
    reach = torch.cat((torch.ones(batch, rows, 1), stands.cumprod(-1)), -1).double()  # Pr(k >= 0 .. K)
    chance = reach - torch.nn.functional.pad(reach[..., 1:], (0, 1))  # Pr(k = 0 .. K)
    ends = torch.tensor(tokens)
    needed = torch.zeros(batch, rows + size + 1, dtype=torch.float64)  # N(c), 0 from each text's end on
    for c in range(rows - 1, -1, -1):
        value = 1 + (chance[:, c] * needed[:, c + 1 : c + size + 2]).sum(-1)
        needed[:, c] = torch.where(c < ends, value, 0.0)
    return needed[:, 0].tolist()


def walk(stands: list[torch.Tensor], size: int, room: int | None = None) -> Acceptance:
    """What greedy decoding along texts accepts, window by window: of one after committed token c, what stands there.

    Args:
        stands: of each text (tokens to gain, K), rows of :class:`Windows`.
        size: K' <= K, drafted tokens of a window.
        room: tokens that an answer may have (``max_new_tokens``); windows are cut to what fits besides the bonus, as on
            the plain path. None: they keep their size, as on the fast path.

    Returns:
        As a call of ``generate`` returns it, one row per text.
    """
    found = Acceptance([[] for _ in stands], [[] for _ in stands], [[] for _ in stands])
    for number, rows in enumerate(stands):
        place, tokens = 0, len(rows)
        while place < tokens:
            drafted = size if room is None else min(size, room - place - 2)
            accepted = int(rows[place, :drafted].cumprod(-1).sum())
            gained = min(accepted + 1, tokens - place)
            for lists, value in ((found.drafted, drafted), (found.accepted, accepted), (found.gained, gained)):
                lists[number].append(value)
            place += gained
    return found


def reach(stands: torch.Tensor) -> torch.Tensor:
    """Tokens that a window gains if one begins at every token of a text: (.., K) -> (..), 1 (the bonus) to K + 1."""
    return 1 + stands.float().cumprod(-1).sum(-1)


@torch.no_grad()
def first_drafts(target: FrozenTarget, drafter: PPOWDrafter, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first draft after every token of one text of T tokens, and what the target itself would choose there.

    Returns:
        Two (T - 2,) int64 of target ids, on the CPU; entry t is about token t + 2.
    """
    batch = torch.tensor([ids], device=target.model.device)
    reading = target.read(batch)
    unrolled = unroll(drafter, target.model, batch, reading.taps)
    features = unrolled.begin(torch.arange(len(ids) - 2, device=batch.device)[None])
    drafts = drafter.to_target_ids(unrolled.logits(features, unrolled.previous)[0].argmax(-1))
    return drafts.cpu(), reading.logits[0, 1:-1].argmax(-1).cpu()
