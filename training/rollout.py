"""One rollout of stage 2: draw windows, draft a group of continuations from each, let the target verify all at once.

Every rollout of a batch is drafted in K batched steps that share the texts' prefix, and verified in one target forward
(split only where ``max_forest_nodes`` asks for it): the texts' keys are still cached from reading them, and each
drafted window attends to its own prefix and itself.
"""

from dataclasses import dataclass

import torch

from ppow import PPOWDrafter

from . import rewards
from .config import ReinforceConfig
from .loop import Batch
from .objectives import gto_reward
from .target import FrozenTarget, Reading, log_norm
from .unrolled import Unrolled
from .windows import adaptive_on, criticality, sample_windows, window_priority

CRITICALITY_LOGITS = 1 << 26  # looked at together; a float32 tensor of them takes 256 MiB


@dataclass
class Rollout:
    """G drafted continuations of each of W windows of B texts, verified and rewarded.

    Attributes:
        input_ids: (B, T), taps: (B, T, n_taps * Ht): what the drafter reads again to recompute its policy.
        starts: (B, W) window starts s; window_mask: (B, W) False where a text had fewer windows.
        draft_ids: (B, W, G, K) drafted tokens in the draft vocabulary.
        old_logprobs: (B, W, G, K) their log-probabilities under the drafter that drew them.
        target_logits: (B, W, G, K, D) the target's logits over the draft vocabulary where each token was drafted.
        accepted: (B, W, G); advantages: (B, W, G, K) of every token.
    """

    input_ids: torch.Tensor
    taps: torch.Tensor
    starts: torch.Tensor
    window_mask: torch.Tensor
    draft_ids: torch.Tensor
    old_logprobs: torch.Tensor
    target_logits: torch.Tensor
    accepted: torch.Tensor
    advantages: torch.Tensor


@torch.no_grad()
def roll_out(
    config: ReinforceConfig,
    target: FrozenTarget,
    drafter: PPOWDrafter,
    batch: Batch,
    step: int,
    reference: PPOWDrafter | None = None,
) -> tuple[Rollout, dict]:
    """Draw, draft, verify and reward the windows of one batch: -> the rollout and its metrics.

    With a ``reference`` drafter, each window's group is rewarded as one tree against the reference's own (GTO).
    """
    generator, device = batch.generator(), batch.input_ids.device
    reading = target.read(batch.input_ids, room=forest_rows(config, len(batch.lengths)) * config.window_size)
    embed = drafter.embedding_for(target.model)
    unrolled = Unrolled(drafter, embed, batch.input_ids, reading.taps)
    columns = drafter.draft_columns()

    critical, valid = text_criticality(drafter, unrolled, reading, batch, columns)
    starts, mask, metrics = draw_windows(config, step, critical, valid, generator)
    rows = starts.repeat_interleave(config.group_size, dim=1)  # (B, R): the G rollouts of a window side by side
    uniforms = torch.rand(*rows.shape, 2 * config.window_size, generator=generator).to(device)
    draft_uniforms, coins = uniforms.chunk(2, dim=-1)
    draft_ids, old_logprobs = draft(config, drafter, unrolled, rows, draft_uniforms)
    tokens = drafter.to_target_ids(draft_ids)
    target_argmax, target_logprobs, target_logits = verify(config, target, reading, starts, tokens, columns)

    if config.verification == "greedy":
        accepted = rewards.accepted_greedy(tokens, target_argmax)
    else:
        accepted = rewards.accepted_sampling(old_logprobs, target_logprobs, coins)
    grouped = (config.windows_per_sequence, config.group_size)
    accepted = accepted.unflatten(1, grouped)  # (B, W, G)
    target_logprobs = target_logprobs.unflatten(1, grouped)  # (B, W, G, K)
    nearness, margin = proximity(config, target, reading, batch, starts, mask, accepted, target_logprobs)
    reward = window_reward(config, accepted) + nearness
    if reference is not None:  # GTO: one advantage per tree
        other = reference_reward(config, target, reference, batch, reading, starts, rows, generator)
        trees = gto_reward(target_logprobs) - other
        trees = rewards.group_advantages(trees, normalize=config.normalize_advantages)  # (B, W)
        advantages = trees[:, :, None, None].expand_as(target_logprobs)
    elif config.credit == "token":
        stopping = window_reward(config, torch.arange(config.window_size + 1, device=device))
        advantages = rewards.token_advantages(reward, accepted, stopping, config.normalize_advantages)
    else:
        advantages = rewards.group_advantages(reward, config.normalize_advantages)[..., None].expand_as(target_logprobs)
    rollout = Rollout(
        batch.input_ids,
        reading.taps,
        starts,
        mask,
        draft_ids.unflatten(1, grouped),
        old_logprobs.unflatten(1, grouped),
        target_logits.unflatten(1, grouped),
        accepted,
        advantages,
    )
    metrics |= {
        "reward": _mean(reward, mask),
        "proximity_reward": _mean(nearness, mask),
        "acceptance_length": 1 + _mean(accepted.float(), mask),
        "rejected_at_once": _mean((accepted == 0).float(), mask),
        "flat_groups": _mean((reward.amax(-1) == reward.amin(-1)).float(), mask),
        "windows": mask.sum().float(),
    }
    if config.proximity_share is not None:
        metrics["proximity_margin"] = torch.as_tensor(margin, device=device)
    return rollout, metrics


def reference_reward(config, target: FrozenTarget, reference, batch: Batch, reading: Reading, starts, rows, generator):
    """GTO's reward (B, W) of the trees that the ``reference`` drafter draws from the same windows.

    It has chances of its own: with the drafter's it would draw the drafter's own trees at the start, every advantage
    would be zero, and training would never leave that point.
    """
    uniforms = torch.rand(*rows.shape, config.window_size, generator=generator).to(rows.device)
    unrolled = Unrolled(reference, reference.embedding_for(target.model), batch.input_ids, reading.taps)
    draft_ids, _ = draft(config, reference, unrolled, rows, uniforms)
    tokens = reference.to_target_ids(draft_ids)
    _, logprobs, _ = verify(config, target, reading, starts, tokens, reference.draft_columns())
    return gto_reward(logprobs.unflatten(1, (-1, config.group_size)))


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, W, ..) over the windows that exist."""
    return values[mask].mean() if mask.any() else values.new_zeros(())


def proximity(config, target: FrozenTarget, reading: Reading, batch: Batch, starts, mask, accepted, target_logprobs):
    """Proximity reward (B, W, G) of windows whose first draft was rejected, and the margin below which it was paid.

    Args:
        starts, mask: (B, W); accepted: (B, W, G); target_logprobs: (B, W, G, K) of the drafted tokens.
    """
    margin = config.proximity_margin
    rejected = mask[..., None] & (accepted == 0)  # (B, W, G)
    needed = rejected.any(-1)
    if config.proximity_bonus == 0 or not target.agree(int(needed.any())):
        return torch.zeros(accepted.shape, device=accepted.device), margin
    best = argmax_window_logprobs(target, reading, batch, starts, needed, config.window_size)  # (B, W, K)
    gap = rewards.proximity_gap(best[:, :, None].expand_as(target_logprobs), target_logprobs)
    if config.proximity_share is not None and rejected.any():  # without any, no margin matters
        margin = gap[rejected].quantile(config.proximity_share)
    return rewards.proximity_reward(accepted, gap, config.proximity_bonus, margin), margin


def text_criticality(drafter, unrolled: Unrolled, reading: Reading, batch: Batch, columns):
    """Criticality (B, T - 1) of each pair's prediction, and which pairs predict a token of the answers."""
    critical = []
    # pair t predicts x_{t+2}, on which the target's own word is its distribution at t + 1; a few texts at a time, since
    # this takes several float32 tensors of their size times the draft vocabulary
    texts = max(1, CRITICALITY_LOGITS // (unrolled.features.shape[1] * len(columns)))
    for features, logits in zip(unrolled.features.split(texts), reading.logits[:, 1:].split(texts)):
        draft_logprobs = drafter.logits(features).float().log_softmax(-1)  # (texts, T - 1, D)
        critical.append(criticality(logits.index_select(-1, columns).float().log_softmax(-1), draft_logprobs))
    valid = torch.zeros(unrolled.features.shape[:2], dtype=torch.bool, device=columns.device)
    valid[:, :-1] = batch.loss_mask[:, 2:]
    return torch.cat(critical), valid


def draw_windows(config: ReinforceConfig, step: int, critical, valid, generator: torch.Generator):
    """Draw this step's windows of texts with criticality (B, T - 1), by it once ADAW is on.

    Returns:
        window starts (B, W), which of them exist (B, W), and the metrics that tell how they were drawn.
    """
    priority, starts_exist = window_priority(critical, valid, config.window_size)
    adaptive = adaptive_on(step, config.steps, config.adaptive_switch)
    starts, mask = sample_windows(priority, starts_exist, config.windows_per_sequence, generator, adaptive)
    metrics = {
        "window_criticality": _mean(critical.gather(1, starts), mask),
        "text_criticality": critical[valid].mean(),
        "adaptive": torch.tensor(float(adaptive), device=critical.device),
    }
    return starts, mask, metrics


def draft(config: ReinforceConfig, drafter: PPOWDrafter, unrolled: Unrolled, rows: torch.Tensor, uniforms):
    """Draw K tokens per row (B, R) from the drafter at the rollout temperature, by inverting its distribution.

    Returns:
        draft ids (B, R, K) and their log-probabilities at the rollout temperature.
    """
    ids, logprobs = [], []
    hidden = unrolled.begin(rows)
    for i in range(config.window_size):
        if i:
            hidden = unrolled.advance(drafter.to_target_ids(ids[-1]))
        logits = drafter.logits(hidden).float()
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


def verify(config: ReinforceConfig, target: FrozenTarget, reading: Reading, starts, tokens, columns):
    """The target's word on every drafted token, each after its own prefix.

    Args:
        starts: (B, W) window starts; tokens: (B, W * G, K) drafted target ids, the G rollouts of a window side by side.

    Returns:
        argmax (B, W * G, K), log-probability of the drafted token (B, W * G, K) in float32, logits over the draft
        vocabulary (B, W * G, K, D) in the target's dtype.
    """
    size, group = config.window_size, config.group_size
    # the first token is judged by the text's own logits at s + 1, the same for all rollouts of a window
    row = torch.arange(len(starts), device=starts.device)[:, None]
    first = reading.logits[row, starts + 1]  # (B, W, V)
    grouped = tokens[:, :, 0].unflatten(1, (-1, group))  # (B, W, G)
    chosen = (first.gather(-1, grouped).float() - log_norm(first)[..., None]).flatten(1)
    best, drafted_logits = first.argmax(-1), first.index_select(-1, columns)
    best, drafted_logits = (value.repeat_interleave(group, dim=1) for value in (best, drafted_logits))
    found = [(best[..., None], chosen[..., None], drafted_logits[:, :, None])]
    if size > 1:  # the others by those after their predecessor
        prefix, parts = starts.repeat_interleave(group, dim=1) + 2, []
        for part in torch.arange(tokens.shape[1], device=tokens.device).split(forest_rows(config, len(tokens))):
            logits = target.continue_windows(reading, tokens[:, part, :-1], prefix[:, part])
            chosen = logits.gather(-1, tokens[:, part, 1:, None])[..., 0].float() - log_norm(logits)
            parts.append((logits.argmax(-1), chosen, logits.index_select(-1, columns)))
        found.append(tuple(torch.cat(part, 1) for part in zip(*parts)))
    return tuple(torch.cat(part, 2) for part in zip(*found))


def window_reward(config: ReinforceConfig, accepted: torch.Tensor) -> torch.Tensor:
    """The paper's Cost-Aware Speedup Reward, or the one that charges every draft and counts the bonus."""
    if config.reward == "paper":
        return rewards.speedup_reward(accepted, config.cost_ratio)
    return rewards.throughput_reward(accepted, config.window_size, config.cost_ratio, config.verify_cost)


def argmax_window_logprobs(
    target: FrozenTarget, reading: Reading, batch: Batch, starts, needed, size: int
) -> torch.Tensor:
    """Log-probabilities (B, W, K) of the target's own argmax continuation after each window's prefix x_0 .. x_{s+1}.

    Where the text is what the target writes greedily, the text is that continuation and nothing needs to be computed.

    Args:
        needed: (B, W) bool, windows to answer for; the entries of the others mean nothing.
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


def policy_logits(config: ReinforceConfig, target: FrozenTarget, drafter: PPOWDrafter, rollout: Rollout):
    """The drafter's present logits (B, W, G, K, D) along the drafted windows, with gradients."""
    unrolled = Unrolled(drafter, drafter.embedding_for(target.model), rollout.input_ids, rollout.taps)
    tokens = drafter.to_target_ids(rollout.draft_ids.flatten(1, 2))  # (B, R, K)
    hidden = unrolled.begin(rollout.starts.repeat_interleave(config.group_size, dim=1))
    logits = [drafter.logits(hidden)]
    for i in range(config.window_size - 1):
        logits.append(drafter.logits(unrolled.advance(tokens[:, :, i])))
    return torch.stack(logits, 2).unflatten(1, rollout.draft_ids.shape[1:3])
