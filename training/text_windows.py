"""Drafter and target compared along the target's own text: what the objectives without rollouts learn from.

The drafter is unrolled over windows of the text with the text's own tokens (training-time test; source: EAGLE-3, arXiv
2503.01840). Every state is reduced to a few numbers as soon as its logits exist, and the logits are computed a second
time on the way back (ours), so that no (W, K, D) tensor is kept.
"""

import torch
from torch.utils.checkpoint import checkpoint

from ppow import PPOWDrafter

from .config import ReinforceConfig
from .loop import Batch
from .objectives import TextWindows, compare
from .rollout import draw_windows, text_criticality
from .target import FrozenTarget, log_norm
from .unrolled import Unrolled
from .windows import chosen_windows

GREEDY_SHARE = 0.99  # of a text's answer tokens that are the target's argmax, from which on it counts as greedy (ours)


def read_windows(config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, batch: Batch, step: int):
    """Compare drafter and target along windows of a batch of texts: -> TextWindows with gradients, metrics.

    Windows are drawn as for rollouts (uniformly, by criticality after the switch), or, with ``all_windows``, start at
    every position from which an answer's token is predicted; those may be shorter than ``window_size``.
    """
    ids, size = batch.input_ids, config.window_size
    reading = target.read(ids)
    columns = drafter.draft_columns()
    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), ids, reading.taps)
    metrics = {}
    with torch.no_grad():
        norm = log_norm(reading.logits)  # (B, T)
        best = reading.logits.argmax(-1)  # (B, T)
        labels = reading.logits.index_select(-1, columns)  # (B, T, D)
        to_draft = torch.full((reading.logits.shape[-1],), -1, device=ids.device)
        to_draft[columns] = torch.arange(len(columns), device=ids.device)
        argmax_next = best[:, :-1] == ids[:, 1:]  # (B, T - 1): x_{t+1} is what the target would have chosen
        answers = batch.loss_mask[:, 1:]
        agreeing = (argmax_next & answers).sum(1) / answers.sum(1).clamp(min=1)
        if config.all_windows:
            starts, exists = chosen_windows(batch.loss_mask[:, 2:])  # pair s predicts x_{s+2}
        else:
            critical, valid = text_criticality(drafter, unrolled, reading, batch, columns)
            starts, exists, metrics = draw_windows(config, step, critical, valid, batch.generator())
        place = starts[:, :, None] + 1 + torch.arange(size, device=ids.device)  # (B, R, K): the target's position t
        inside = place + 1 < ids.shape[1]
        place = place.clamp(max=ids.shape[1] - 2)

    def along(values: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, R, K)
        return values.gather(1, place.flatten(1)).view(place.shape)

    with torch.no_grad():
        tokens = along(ids[:, 1:])
        mask = inside & along(batch.loss_mask[:, 1:]) & exists[:, :, None]
        mask = mask.long().cumprod(-1).bool()
        chosen = along(argmax_next).long().cumprod(-1).bool()
        greedy = torch.cat((torch.ones_like(chosen[..., :1]), chosen[..., :-1]), -1)
        best, text, norm = to_draft[along(best)], to_draft[tokens], along(norm)
        row = torch.arange(len(ids), device=ids.device)[:, None, None].expand(place.shape)
    facts = (row, place, norm, best, text)
    figures = _compare_states(config, drafter, unrolled, starts, exists, tokens, mask, labels, facts)
    windows = TextWindows(
        mask[exists],
        *figures,
        greedy[exists],
        (agreeing < GREEDY_SHARE)[:, None].expand(exists.shape)[exists],
    )
    accepted = (windows.hit & windows.mask).long().cumprod(-1).sum(-1).float()
    metrics |= {
        "greedy_acceptance_length": 1 + accepted.sum() / max(1, len(accepted)),
        "text_kl": windows.kl.detach().sum() / windows.mask.sum().clamp(min=1),
        "overlap": windows.overlap.detach().sum() / windows.mask.sum().clamp(min=1),
        "windows": exists.sum().float(),
    }
    return windows, metrics


def _compare_states(config: ReinforceConfig, drafter, unrolled: Unrolled, starts, exists, tokens, mask, labels, facts):
    """Unroll the drafter over the windows and reduce every state; nothing of size D survives.

    Args:
        starts, exists: (B, R) windows; tokens: (B, R, K) of the text; mask: (B, R, K) states that count.
        labels: (B, T, D) the target's logits over the draft vocabulary.
        facts: text, place in it, and the further arguments of :func:`compare`, each (B, R, K).

    Returns:
        the figures of :func:`compare` in its order, each (W, K) for the W windows that exist.
    """
    # found before the drafter runs, since that waits for the device
    states = [mask[:, :, i].flatten().nonzero()[:, 0] for i in range(config.window_size)]  # places in (B * R)
    kept = exists.flatten().nonzero()[:, 0]

    def reduced(features, *given):
        return compare(drafter.logits(features), *given, config.rollout_temperature, config.tree_branches)

    steps, hidden = [], unrolled.begin(starts)
    for i, here in enumerate(states):
        if i:
            hidden = unrolled.advance(tokens[:, :, i - 1])
        row, place, *given = (values[:, :, i].flatten().index_select(0, here) for values in facts)
        features = hidden.flatten(0, 1).index_select(0, here)
        figures = checkpoint(
            reduced, features, labels[row, place], *given, use_reentrant=False, preserve_rng_state=False
        )
        full = [values.new_zeros(exists.numel()).index_copy(0, here, values) for values in figures]
        steps.append([values.index_select(0, kept) for values in full])
    return [torch.stack(values, -1) for values in zip(*steps)]
