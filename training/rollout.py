"""One rollout of stage 2: draw windows, draft a group of continuations from each, let the target verify all at once.

Every rollout of a batch is drafted in K batched steps that share the texts' prefix, and verified in one target forward
(split only where ``max_forest_nodes`` asks for it): the texts' keys are still cached from reading them, and each
drafted window attends to its own prefix and itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ppow import PPOWDrafter
from ppow.acceptance_ppow import accepted_greedy, accepted_sampling

from . import rewards
from .blocks import Blocks, unroll
from .config import ReinforceConfig
from .data import Batch
from .target import FrozenTarget, Reading, log_norm
from .unrolled import Unrolled
from .window_choice import choose_windows, text_criticality
from .windows import masked_mean


class TargetWord(NamedTuple):
    """The target's word where each token was drafted, after its own prefix.

    Attributes:
        argmax: (..) what the target would have chosen.
        logprobs: (..) float32 log-probability of the drafted token.
        logits: (.., D) over the draft vocabulary, in the target's dtype.
    """

    argmax: torch.Tensor
    logprobs: torch.Tensor
    logits: torch.Tensor


@dataclass
class Drawn:
    """G continuations of each of W windows of B texts, as the drafter drew them and the target verified them.

    Attributes:
        reading: what the target said of the texts.
        starts: (B, W) window starts s; window_mask: (B, W) False where a text had fewer windows.
        draft_ids: (B, W, G, K) drafted tokens in the draft vocabulary.
        old_logprobs: (B, W, G, K) their log-probabilities under the drafter that drew them.
        word: of the target on each of them, (B, W, G, K) and more.
        accepted: (B, W, G) k.
    """

    reading: Reading
    starts: torch.Tensor
    window_mask: torch.Tensor
    draft_ids: torch.Tensor
    old_logprobs: torch.Tensor
    word: TargetWord
    accepted: torch.Tensor


@dataclass
class Rollout:
    """What stage 2 learns from: drafted windows with their rewards.

    Attributes:
        input_ids: (B, T), taps: (B, T, n_taps * Ht): what the drafter reads again to recompute its policy.
        starts, window_mask, draft_ids, old_logprobs, accepted: see :class:`Drawn`.
        target_logits: (B, W, G, K, D) the target's logits over the draft vocabulary where each token was drafted.
        reward, advantages: (B, W, G).
    """

    input_ids: torch.Tensor
    taps: torch.Tensor
    starts: torch.Tensor
    window_mask: torch.Tensor
    draft_ids: torch.Tensor
    old_logprobs: torch.Tensor
    target_logits: torch.Tensor
    accepted: torch.Tensor
    reward: torch.Tensor
    advantages: torch.Tensor


@torch.no_grad()
def roll_out(
    config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, batch: Batch, step: int
) -> tuple[Rollout, dict]:
    """Draw, draft, verify and reward the windows of one batch: -> the rollout and its metrics."""
    drawn, metrics = draw(config, target, drafter, batch, step)
    rollout, found = rewarded(config, target, batch, drawn)
    return rollout, metrics | found


def draw(
    config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, batch: Batch, step: int
) -> tuple[Drawn, dict]:
    """Choose this step's windows, draft a group of continuations from each, and let the target verify them."""
    if config.verification == "text":
        raise ValueError("Rollouts are verified by greedy or sampling, got verification='text'.")
    generator, device = batch.generator(), batch.input_ids.device
    reading = target.read(batch.input_ids, room=forest_rows(config, len(batch.lengths)) * config.window_size)
    unrolled = unroll(drafter, target.model, batch.input_ids, reading.taps)
    columns = drafter.draft_columns()

    critical, valid = text_criticality(drafter, unrolled, reading, batch, columns)
    starts, mask, metrics = choose_windows(config, step, critical, valid, generator)
    rows = starts.repeat_interleave(config.group_size, dim=1)  # (B, R): the G rollouts of a window side by side
    uniforms = torch.rand(*rows.shape, 2 * config.window_size, generator=generator).to(device)
    draft_uniforms, coins = uniforms.chunk(2, dim=-1)
    draft_ids, old_logprobs = draft(config, drafter, unrolled, rows, draft_uniforms)
    tokens = drafter.to_target_ids(draft_ids)
    word = target_words(config, target, reading, starts, tokens, columns)

    if config.verification == "greedy":
        accepted = accepted_greedy(tokens, word.argmax)
    else:
        accepted = accepted_sampling(old_logprobs, word.logprobs, coins)
    grouped = (config.windows_per_sequence, config.group_size)
    return Drawn(
        reading,
        starts,
        mask,
        draft_ids.unflatten(1, grouped),
        old_logprobs.unflatten(1, grouped),
        TargetWord(*(value.unflatten(1, grouped) for value in word)),
        accepted.unflatten(1, grouped),
    ), metrics


def rewarded(config: ReinforceConfig, target: FrozenTarget, batch: Batch, drawn: Drawn) -> tuple[Rollout, dict]:
    """Both rewards and the advantages of what was drawn."""
    accepted, mask = drawn.accepted, drawn.window_mask
    nearness = proximity(config, target, batch, drawn)
    reward = rewards.speedup_reward(accepted, config.cost_ratio) + nearness
    rollout = Rollout(
        batch.input_ids,
        drawn.reading.taps,
        drawn.starts,
        mask,
        drawn.draft_ids,
        drawn.old_logprobs,
        drawn.word.logits,
        accepted,
        reward,
        rewards.group_advantages(reward),
    )
    return rollout, {
        "reward": masked_mean(reward, mask),
        "proximity_reward": masked_mean(nearness, mask),
        "acceptance_length": 1 + masked_mean(accepted.float(), mask),
        "rejected_at_once": masked_mean((accepted == 0).float(), mask),
        "flat_groups": masked_mean((reward.amax(-1) == reward.amin(-1)).float(), mask),
        "windows": mask.sum().float(),
    }


def proximity(config: ReinforceConfig, target: FrozenTarget, batch: Batch, drawn: Drawn) -> torch.Tensor:
    """Proximity reward (B, W, G) of windows whose first draft was rejected."""
    needed = (drawn.window_mask[..., None] & (drawn.accepted == 0)).any(-1)
    if config.proximity_bonus == 0 or not target.agree(int(needed.any())):
        return torch.zeros(drawn.accepted.shape, device=drawn.accepted.device)
    best = argmax_window_logprobs(target, drawn.reading, batch, drawn.starts, needed, config.window_size)  # (B, W, K)
    logprobs = drawn.word.logprobs
    gap = rewards.proximity_gap(best[:, :, None].expand_as(logprobs), logprobs)
    return rewards.proximity_reward(drawn.accepted, gap, config.proximity_bonus, config.proximity_margin)


def draft(
    config: ReinforceConfig,
    drafter: PPOWDrafter,
    unrolled: Unrolled | Blocks,
    rows: torch.Tensor,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw K tokens per row from the drafter at the rollout temperature, by inverting its distribution.

    Args:
        rows: (B, R) window starts.
        uniforms: (B, R, K) chances on [0, 1).

    Returns:
        draft ids (B, R, K) and their log-probabilities at the rollout temperature.
    """
    ids: list[torch.Tensor] = []
    logprobs: list[torch.Tensor] = []
    hidden = unrolled.begin(rows)
    for i in range(config.window_size):
        if i:
            hidden = unrolled.advance(drafter.to_target_ids(ids[-1]))
        logits = unrolled.logits(hidden, unrolled.previous).float()
        tempered = (logits / config.rollout_temperature).log_softmax(-1)
        below = tempered.exp().cumsum(-1) < uniforms[:, :, i : i + 1]
        chosen = below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # (B, R, 1)
        ids.append(chosen[..., 0])
        logprobs.append(tempered.gather(-1, chosen)[..., 0])
    return torch.stack(ids, -1), torch.stack(logprobs, -1)


def forest_rows(config: ReinforceConfig, texts: int) -> int:
    """Rollouts of each of ``texts`` texts that one target forward verifies."""
    rows = config.windows_per_sequence * config.group_size
    return min(rows, max(1, config.max_forest_nodes // (config.window_size * texts)))


def target_words(
    config: ReinforceConfig,
    target: FrozenTarget,
    reading: Reading,
    starts: torch.Tensor,
    tokens: torch.Tensor,
    columns: torch.Tensor,
) -> TargetWord:
    """The target's word on every drafted token, (B, W * G, K).

    Args:
        starts: (B, W) window starts; tokens: (B, W * G, K) drafted target ids, the G rollouts of a window side by side.
        columns: (D,) the draft vocabulary, as target ids.
    """
    size, group = config.window_size, config.group_size
    # the first token is judged by the text's own logits at s + 1, the same for all rollouts of a window
    row = torch.arange(len(starts), device=starts.device)[:, None]
    first = reading.logits[row, starts + 1]  # (B, W, V)
    grouped = tokens[:, :, 0].unflatten(1, (-1, group))  # (B, W, G)
    chosen = (first.gather(-1, grouped).float() - log_norm(first)[..., None]).flatten(1)
    best, drafted_logits = first.argmax(-1), first.index_select(-1, columns)
    best, drafted_logits = (value.repeat_interleave(group, dim=1) for value in (best, drafted_logits))
    found: list[tuple[torch.Tensor, ...]] = [(best[..., None], chosen[..., None], drafted_logits[:, :, None])]
    if size > 1:  # the others by those after their predecessor
        prefix, parts = starts.repeat_interleave(group, dim=1) + 2, []
        for part in torch.arange(tokens.shape[1], device=tokens.device).split(forest_rows(config, len(tokens))):
            logits = target.continue_windows(reading, tokens[:, part, :-1], prefix[:, part])
            chosen = logits.gather(-1, tokens[:, part, 1:, None])[..., 0].float() - log_norm(logits)
            parts.append((logits.argmax(-1), chosen, logits.index_select(-1, columns)))
        found.append(tuple(torch.cat(part, 1) for part in zip(*parts)))
    return TargetWord(*(torch.cat(part, 2) for part in zip(*found)))


def argmax_window_logprobs(
    target: FrozenTarget, reading: Reading, batch: Batch, starts: torch.Tensor, needed: torch.Tensor, size: int
) -> torch.Tensor:
    """Log-probabilities (B, W, K) of the target's own argmax continuation after each window's prefix x_0 .. x_{s+1}.

    Where the text is what the target writes greedily, the text is that continuation and nothing needs to be computed.

    Args:
        starts: (B, W) window starts.
        needed: (B, W) bool, windows to answer for; the entries of the others mean nothing.
        size: K.
    """
    offsets = torch.arange(size, device=starts.device)
    place = (starts[:, :, None] + 1 + offsets).clamp(max=reading.logits.shape[1] - 1)  # (B, W, K)
    along = reading.logits.gather(1, place.flatten(1)[:, :, None].expand(-1, -1, reading.logits.shape[-1])).float()
    along = along.unflatten(1, place.shape[1:])  # (B, W, K, V)
    following = batch.input_ids.gather(1, (place + 1).clamp(max=batch.input_ids.shape[1] - 1).flatten(1))
    greedy = (along.argmax(-1) == following.view_as(place)).all(-1) & (starts + 1 + size < batch.lengths[:, None])
    logprobs = along.log_softmax(-1).amax(-1)
    todo = needed & ~greedy
    count = target.agree(int(todo.sum(1).max()))
    if count == 0:
        return logprobs
    chosen = todo.int().argsort(dim=1, descending=True, stable=True)[:, :count]  # (B, count) windows to continue
    token, found = along[:, :, 0].argmax(-1).gather(1, chosen), [logprobs[:, :, 0].gather(1, chosen)]
    prefix = starts.gather(1, chosen) + 2
    for done in range(size - 1):
        logits = target.continue_windows(reading, token[..., None], prefix, done, size - 1)[:, :, 0].float()
        token = logits.argmax(-1)
        found.append(logits.log_softmax(-1).amax(-1))
    continued = logprobs.scatter(1, chosen[:, :, None].expand(-1, -1, size), torch.stack(found, -1))
    return torch.where(greedy[:, :, None], logprobs, continued)


def policy_logits(
    config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, rollout: Rollout
) -> torch.Tensor:
    """The drafter's present logits (B, W, G, K, D) along the drafted windows, with gradients."""
    unrolled = unroll(drafter, target.model, rollout.input_ids, rollout.taps)
    tokens = drafter.to_target_ids(rollout.draft_ids.flatten(1, 2))  # (B, R, K)
    hidden = unrolled.begin(rollout.starts.repeat_interleave(config.group_size, dim=1))
    logits = [unrolled.logits(hidden, unrolled.previous)]
    for i in range(config.window_size - 1):
        logits.append(unrolled.logits(unrolled.advance(tokens[:, :, i]), unrolled.previous))
    return torch.stack(logits, 2).unflatten(1, rollout.draft_ids.shape[1:3])
