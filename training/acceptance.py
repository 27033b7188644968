"""Acceptance of a drafter along texts that its target wrote: every position in one batched pass.

Speculative decoding is lossless, so the target's answers are what decoding with any drafter could have written. Greedy:
a draft is accepted when it is the text's token. Sampling: given that the text's token is x, the draft was accepted with
probability min(1, Q(x) / P(x)), independently at every position, which is the exact law of accepted lengths given the
text. The verifications that a text takes follow by recursion over its positions (in expectation at temperature 1, so
the coins add no noise).
"""

import torch

from ppow import PPOWDrafter
from ppow.transcript_ppow import Acceptance

from .blocks import unroll
from .target import FrozenTarget, log_norm


@torch.no_grad()
def acceptance_along(
    target: FrozenTarget,
    drafter: PPOWDrafter,
    ids: list[list[int]],
    prompt: list[int],
    size: int,
    temperature: float,
    pad: int,
) -> torch.Tensor:
    """Chance that draft i of the window after committed token c of an answer is accepted, given all before it were.

    Args:
        ids: texts, prompt and answer; prompt: tokens of each that are prompt.

    Returns:
        (B, L - 1, size) float32 on the CPU, L the longest answer; window c has the answer's first c + 1 tokens as its
        prefix. 0 after the end of a text.
    """
    device = target.model.device
    width = max(map(len, ids))
    batch = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=device)
    lengths, begun = torch.tensor([len(row) for row in ids], device=device), torch.tensor(prompt, device=device)
    reading = target.read(batch)
    unrolled = unroll(drafter, target.model, batch, reading.taps)
    windows = torch.arange(int((lengths - begun).max()) - 1, device=device)
    starts = (begun[:, None] - 1 + windows).clamp(max=width - 2)  # the pair with the newest committed token
    norm = log_norm(reading.logits)  # (B, T)
    row = torch.arange(len(ids), device=device)[:, None]
    draft_ids = torch.full((reading.logits.shape[-1],), -1, device=device)
    draft_ids[drafter.draft_columns()] = torch.arange(drafter.config.draft_vocab_size, device=device)
    hidden, token, found = unrolled.begin(starts), starts, []
    for i in range(size):
        if i:
            hidden = unrolled.advance(token)
        place = starts + 2 + i  # of the token that is drafted
        inside = place < lengths[:, None]
        place = place.clamp(max=width - 1)
        token = batch.gather(1, place)
        logits = unrolled.logits(hidden, unrolled.previous).float()  # (B, R, D)
        if temperature == 0:
            stands = (drafter.to_target_ids(logits.argmax(-1)) == token).float()
        else:
            wanted = reading.logits[row, place - 1, token].float() - norm.gather(1, place - 1)
            known = draft_ids[token]
            drawn = logits.log_softmax(-1).gather(-1, known.clamp(min=0)[..., None])[..., 0]
            stands = torch.where(known >= 0, (drawn - wanted).clamp(max=0).exp(), 0.0)
        found.append(torch.where(inside, stands, 0.0))
    return torch.stack(found, -1).cpu()


def verifications(stands: torch.Tensor, tokens: list[int]) -> list[float]:
    """Expected verifications of each text.

    With c answer tokens after the first committed, Pr(k) = prod_{i<k} a_i * (1 - a_k), and
    N(c) = 1 + sum_k Pr(k) N(min(c + k + 1, tokens)), N(tokens) = 0. A chance of 0 or 1 makes it a plain walk.

    Args:
        stands: (B, R, K) of :func:`acceptance_along`; tokens: to gain, of each text.
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
        stands: of each text (tokens to gain, K), rows of :func:`acceptance_along` at temperature 0.
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
