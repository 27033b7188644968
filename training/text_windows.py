"""Drafter and target compared along the target's own text: what the objectives without rollouts learn from.

The drafter is unrolled over windows of the text with the text's own tokens (training-time test; source: EAGLE-3, arXiv
2503.01840). Every state is reduced to a few numbers as soon as its logits exist, and the logits are computed a second
time on the way back (ours), so that no (W, K, D) tensor is kept. Compiled, the reduction keeps nothing but the logits
themselves: where these are few enough, they are, and the step is spared the second time.
"""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from ppow import PPOWDrafter
from ppow.acceptance_ppow import count_accepted

from .blocks import Blocks, unroll
from .data import Batch
from .objectives import Compared, TextWindows, compare, confidence_loss
from .target import FrozenTarget, log_norm
from .unrolled import Unrolled
from .windows import sample_windows, wanted_windows

LOGITS = 1 << 28  # compared together; a float32 tensor of them takes 1 GiB
KEPT = 1 << 31  # of a step, at most, where they are kept; with the target's they take 8 GiB in bfloat16
GREEDY_SHARE = 0.99  # of a text's answer tokens that are the target's argmax, from which on it counts as greedy (ours)


def drawn_windows(batch: Batch, count: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``count`` windows of each text that begin at an answer's token, as :func:`read_windows` takes them; None: all."""
    if count is None:
        return None
    return sample_windows(None, batch.loss_mask[:, 2:], count, batch.generator(), adaptive=False)


def read_windows(
    target: FrozenTarget,
    drafter: PPOWDrafter,
    batch: Batch,
    size: int,
    chosen: tuple[torch.Tensor, torch.Tensor] | None = None,
    fused: bool = False,
) -> tuple[TextWindows, dict]:
    """Compare drafter and target along windows of a batch of texts: -> windows with gradients, metrics.

    Args:
        size: K, the longest window.
        chosen: starts (B, R) and which of them exist (B, R) bool; none: every position from which an answer's token is
            predicted.
        fused: let torch.compile fuse the comparison: for GPUs, where it otherwise waits for memory most of the time.
            Up to ``KEPT`` logits are then kept for the way back instead of being computed again.
    """
    ids = batch.input_ids
    reading = target.read(ids)
    columns = drafter.draft_columns()
    unrolled = unroll(drafter, target.model, ids, reading.taps)
    with torch.no_grad():
        best = reading.logits.argmax(-1)  # (B, T)
        whole = len(columns) == reading.logits.shape[-1]
        labels = reading.logits if whole else reading.logits.index_select(-1, columns)  # (B, T, D)
        to_draft = torch.full((reading.logits.shape[-1],), -1, device=ids.device)
        to_draft[columns] = torch.arange(len(columns), device=ids.device)
        argmax_next = best[:, :-1] == ids[:, 1:]  # (B, T - 1): x_{t+1} is what the target would have chosen
        answers = batch.loss_mask[:, 1:]
        agreeing = (argmax_next & answers).sum(1) / answers.sum(1).clamp(min=1)
        starts, exists = chosen or wanted_windows(batch.loss_mask[:, 2:])  # pair s predicts x_{s+2}
        place = starts[:, :, None] + 1 + torch.arange(size, device=ids.device)  # (B, R, K): the target's position t
        inside = place + 1 < ids.shape[1]
        place = place.clamp(max=ids.shape[1] - 2)

        def along(values: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, R, K)
            return values.gather(1, place.flatten(1)).view(place.shape)

        tokens = along(ids[:, 1:])
        mask = inside & along(batch.loss_mask[:, 1:]) & exists[:, :, None]
        mask = mask.long().cumprod(-1).bool()
        agrees = along(argmax_next).long().cumprod(-1).bool()
        greedy = torch.cat((torch.ones_like(agrees[..., :1]), agrees[..., :-1]), -1)
        best, text = to_draft[along(best)], to_draft[tokens]
        norm = () if whole else (along(log_norm(reading.logits)),)
        labels = labels.flatten(0, 1)
        said = torch.arange(len(ids), device=ids.device)[:, None, None] * ids.shape[1] + place
    facts = (said, best, text, *norm)
    states, surprise = _compare_states(drafter, unrolled, starts, exists, tokens, mask, labels, facts, fused)
    sampled = (agreeing < GREEDY_SHARE)[:, None].expand(exists.shape)[exists]
    windows = TextWindows(mask[exists], states, greedy[exists], sampled, surprise)
    accepted = count_accepted(windows.states.hit & windows.mask).float()
    count = windows.mask.sum().clamp(min=1)
    return windows, {
        "greedy_acceptance_length": 1 + accepted.sum() / max(1, len(accepted)),
        "text_kl": windows.states.kl.detach().sum() / count,
        "overlap": windows.states.overlap.detach().sum() / count,
        "windows": exists.sum().float(),
    }


@functools.cache
def compiled() -> Callable[..., Compared]:
    """:func:`compare`, compiled once for any number of states."""
    return torch.compile(compare, dynamic=True)


def _compare_states(
    drafter: PPOWDrafter,
    unrolled: Unrolled | Blocks,
    starts: torch.Tensor,
    exists: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    facts: tuple[torch.Tensor, ...],
    fused: bool,
) -> tuple[Compared, torch.Tensor | None]:
    """Unroll the drafter over the windows and reduce every state; nothing of size D survives.

    Args:
        starts, exists: (B, R) windows; tokens: (B, R, K) of the text; mask: (B, R, K) states that count.
        labels: (B * T, D) the target's logits over the draft vocabulary.
        facts: which of them, and the further arguments of :func:`compare`, each (B, R, K).

    Returns:
        (W, K) each, for the W windows that exist; the last is the confidence head's loss, if there is one, which
        reaches nothing but the head.
    """
    # found before the drafter runs, since that waits for the device
    states = [mask[:, :, i].flatten().nonzero()[:, 0] for i in range(mask.shape[-1])]  # places in (B * R)
    kept = exists.flatten().nonzero()[:, 0]

    def reduced(
        features: torch.Tensor, previous: torch.Tensor, said: torch.Tensor, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        logits = unrolled.logits(features, previous)
        figures = compiled() if fused and len(features) > 1 else compare  # one row would be compiled on its own
        found = figures(logits, labels.index_select(0, said), *given)
        if not drafter.config.confidence_head:
            return found
        predicted = drafter.acceptance_logits(features.detach(), logits.detach())
        return (*found, confidence_loss(predicted, found.hit, found.overlap))

    again = functools.partial(checkpoint, reduced, use_reentrant=False, preserve_rng_state=False)
    learning = {name.partition(".")[0] for name, p in drafter.named_parameters() if p.requires_grad}
    frozen = learning <= {"confidence_head"}  # its way back needs no logits, so none are kept anyway
    comparison = reduced if frozen or (fused and mask.numel() * labels.shape[-1] <= KEPT) else again
    steps, hidden = [], unrolled.begin(starts)
    for i, here in enumerate(states):
        if i:
            hidden = unrolled.advance(tokens[:, :, i - 1])
        features = hidden.flatten(0, 1).index_select(0, here)
        known = (unrolled.previous, *(values[:, :, i] for values in facts))
        arguments = (features, *(values.flatten().index_select(0, here) for values in known))
        figures = [
            comparison(*part)
            for part in zip(*(values.split(max(1, LOGITS // labels.shape[-1])) for values in arguments))
        ]
        columns = [torch.cat(values) for values in zip(*figures)]
        full = [values.new_zeros(exists.numel()).index_copy(0, here, values) for values in columns]
        steps.append([values.index_select(0, kept) for values in full])
    found = [torch.stack(values, -1) for values in zip(*steps)]
    surprise = found.pop() if drafter.config.confidence_head else None
    return Compared(*found), surprise
