"""The controls of PPOW's comparison: objectives of other methods, in the terms of ppow.training.objectives.

    from benchmarks.controls import ControlConfig
    config = ControlConfig.from_dict({"preset": "eal", "target": ..., ...})

Importing this module adds them to ``OBJECTIVES``; ``ControlConfig`` is `ppow reinforce`'s configuration with their
names. GTO, VAT and Draft-OPD are simplifications of the published methods: see each.
"""

import dataclasses
from typing import Literal

import torch

from ppow import PPOWDrafter
from ppow.acceptance_ppow import count_accepted
from ppow.training.arguments import option
from ppow.training.blocks import unroll
from ppow.training.config import PRESETS, ReinforceConfig
from ppow.training.objectives import (
    CLIP_RANGE,
    OBJECTIVES,
    STEP_WEIGHT,
    Objective,
    Rollouts,
    TextWindows,
    batch_mean,
    check_rollouts,
    d_pace_weights,
    full_precision,
    step_mean,
)
from ppow.training.rewards import group_advantages, reachable
from ppow.training.rollout import Drawn, Rollout, draft, draw, rewarded, target_words
from ppow.training.target import FrozenTarget


def lk_mixed_loss(windows: TextWindows, step_weight: float = STEP_WEIGHT) -> tuple[torch.Tensor, dict]:
    """LK (arXiv 2602.23881), second form: lam * KL + (1 - lam) * (1 - alpha), lam = exp(-3 alpha), not learned."""
    lam = torch.exp(-3 * windows.states.overlap.detach())
    return step_mean(lam * windows.states.kl + (1 - lam) * (1 - windows.states.overlap), windows.mask, step_weight), {}


def eal_loss(windows: TextWindows, verification: str) -> tuple[torch.Tensor, dict]:
    """EAL / WTV (arXiv 2609.24150): minus the expected accepted length, -sum_k prod_{j<=k} b_j, mean over windows.

    b = Q(argmax P) under greedy verification, where windows end with the step at which the text leaves the target's
    argmax (ours); b = sum_v min(P, Q) under sampling.
    """
    if verification == "greedy":
        stands = torch.where(windows.greedy & windows.mask, windows.states.best, 0.0)
    else:
        stands = torch.where(windows.mask, windows.states.overlap, 0.0)
    length = stands.cumprod(-1).sum(-1)  # (W,)
    return -batch_mean(length), {"expected_accepted": batch_mean(length).detach()}


def d_pace_loss(windows: TextWindows, floor: float = 0.5) -> tuple[torch.Tensor, dict]:
    """D-PACE: cross-entropy weighed by ``d_pace_weights``. Ours: soft labels, as in stage 1, and the division by K."""
    return batch_mean((d_pace_weights(windows, floor) * windows.states.kl).sum(-1) / windows.mask.shape[-1]), {}


def vat_loss(windows: TextWindows, step_weight: float = STEP_WEIGHT) -> tuple[torch.Tensor, dict]:
    """VAT (arXiv 2608.30135): verification simulated along the text decides the weights of the cross-entropy.

    Weight 1 up to the first rejection, that one included; behind it step_weight ** distance. Greedy verification of
    the drafter's first choices. Ours: the division by K.
    """
    k = count_accepted(windows.states.hit & windows.mask)  # (W,)
    distance = (torch.arange(windows.mask.shape[-1], device=k.device) - k[:, None]).clamp(min=0)
    weights = step_weight**distance * windows.mask
    return batch_mean((weights * windows.states.kl).sum(-1) / windows.mask.shape[-1]), {}


def draft_opd_loss(rollouts: Rollouts, decay: float = 0.8) -> tuple[torch.Tensor, dict]:
    """Draft-OPD (arXiv 2605.29343): KL(P || Q) on accepted tokens, KL(Q || P) * 0.8^(j - 1) on rejected ones.

    j counts from the first rejected token of the window (our reading). Mean over all tokens of the rollouts (ours).
    """
    check_rollouts(rollouts)
    states = rollouts.window_mask[:, None, None].expand(rollouts.draft_ids.shape).nonzero(as_tuple=True)
    draft = full_precision(rollouts.draft_logits[states]).log_softmax(-1)  # (n, D)
    target = full_precision(rollouts.target_logits[states]).log_softmax(-1).clamp(min=-1e4)
    behind = states[2] - rollouts.accepted[states[:2]]  # 0 at the first rejected token
    forward = (target.exp() * (target - draft)).sum(-1)
    backward = (draft.exp() * (draft - target)).sum(-1)
    values = torch.where(behind < 0, forward, backward * decay ** behind.clamp(min=0))
    return batch_mean(values), {"kl": batch_mean(forward).detach(), "reverse_kl": batch_mean(backward).detach()}


def gto_reward(target_logprobs: torch.Tensor) -> torch.Tensor:
    """GTO's draft tree reward (arXiv 2509.22134): r = log sum_i exp(L_i), L_i = sum_j prod_{l<=j} P(x_l) of branch i.

    Args:
        target_logprobs: (.., G, K) log P of each branch's tokens after its own prefix.

    Returns:
        (..), the tree's softened expected accepted length.
    """
    return target_logprobs.cumsum(-1).exp().sum(-1).logsumexp(-1)


def gto_loss(rollouts: Rollouts, clip_range: float = CLIP_RANGE) -> tuple[torch.Tensor, dict]:
    """GTO (arXiv 2509.22134): PPO on the length-normalised ratio of each tree's longest accepted path.

    ``advantages`` hold one value per tree, the same for all of its branches: :func:`gto_reward` minus that of a
    frozen reference drafter, standardised over the trees of a text. The path includes the first rejected token, so
    that a tree of which nothing was accepted still learns (ours); our tree is the G rollouts of a window.
    """
    check_rollouts(rollouts)
    longest = rollouts.accepted.argmax(1)  # (W,)
    row = torch.arange(len(longest), device=longest.device)
    ids, accepted = rollouts.draft_ids[row, longest], rollouts.accepted[row, longest]
    logits = full_precision(rollouts.draft_logits[row, longest]) / rollouts.temperature  # (W, K, D)
    path = reachable(accepted, ids.shape[-1]) & rollouts.window_mask[:, None]
    change = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] - rollouts.old_logprobs[row, longest]
    ratio = (torch.where(path, change, 0.0).sum(-1) / path.sum(-1).clamp(min=1)).exp()  # (W,)
    advantage = torch.where(rollouts.window_mask, rollouts.advantages[:, 0], 0.0)
    free, clipped = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    count = rollouts.window_mask.sum().clamp(min=1)
    loss = -torch.minimum(free, clipped).sum() / count
    return loss, {"policy_loss": loss.detach(), "clipped": (free > clipped).sum() / count}


def gto_rollout(config, target: FrozenTarget, drafter, reference, batch, step: int) -> tuple[Rollout, dict]:
    """A rollout whose advantages are GTO's: each window's group is a tree, rewarded over the ``reference`` drafter's.

    The reference has chances of its own: with the drafter's it would draw the drafter's own trees at the start, every
    advantage would be zero, and training would never leave that point.

    Args:
        reference: the drafter as it was when training began.
    """
    with torch.no_grad():
        drawn, metrics = draw(config, target, drafter, batch, step)
        rollout, found = rewarded(config, target, batch, drawn)
        other = reference_reward(config, target, reference, batch, drawn)
        trees = group_advantages(gto_reward(drawn.word.logprobs) - other)  # (B, W)
        rollout.advantages = trees[:, :, None].expand_as(rollout.reward)
    return rollout, metrics | found


def reference_reward(config, target: FrozenTarget, reference: PPOWDrafter, batch, drawn: Drawn) -> torch.Tensor:
    """GTO's reward (B, W) of the trees that the ``reference`` drafter draws from the same windows."""
    rows = drawn.starts.repeat_interleave(config.group_size, dim=1)
    generator = torch.Generator().manual_seed(batch.seed ^ 0x5DEECE66)  # no step's own
    uniforms = torch.rand(*rows.shape, config.window_size, generator=generator).to(rows.device)
    unrolled = unroll(reference, target.model, batch.input_ids, drawn.reading.taps)
    draft_ids, _ = draft(config, reference, unrolled, rows, uniforms)
    tokens = reference.to_target_ids(draft_ids)
    word = target_words(config, target, drawn.reading, drawn.starts, tokens, reference.draft_columns())
    return gto_reward(word.logprobs.unflatten(1, (-1, config.group_size)))


# -- by name -----------------------------------------------------------------------------------------------------------

OBJECTIVES |= {
    "lk_mixed": Objective("text", lambda b, c, r: lk_mixed_loss(b)),
    "eal": Objective("text", lambda b, c, r: eal_loss(b, c.verification)),
    "d_pace": Objective("text", lambda b, c, r: d_pace_loss(b)),
    "vat": Objective("text", lambda b, c, r: vat_loss(b)),
    "gto": Objective("rollouts", lambda b, c, r: gto_loss(b)),
    "draft_opd": Objective("rollouts", lambda b, c, r: draft_opd_loss(b)),
}
_ROLLED = {**PRESETS["published"], "proximity_bonus": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlConfig(ReinforceConfig):
    """The configuration of stage 2, with the controls' objectives beside its own."""

    @classmethod
    def command(cls) -> str:
        """As of the class that it extends."""
        return ReinforceConfig.command()

    presets = {
        **PRESETS,
        **{name: {**PRESETS["cst"], "objective": name, "verification": "greedy"} for name in ("eal", "d_pace", "vat")},
        "lk_mixed": {**PRESETS["cst"], "objective": "lk_mixed"},
        **{name: {**_ROLLED, "objective": name} for name in ("gto", "draft_opd")},
    }

    objective: Literal["ppow", "cst", "lk", "lk_mixed", "eal", "d_pace", "vat", "gto", "draft_opd"] = option(
        "what to optimise", "ppow"
    )
