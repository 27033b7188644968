"""Objectives of both stages. Pure functions: tensors in, (loss, metrics) out.

An objective of stage 2 takes :class:`Rollouts` and its own coefficients. All distributions live on the draft
vocabulary; the target is restricted to it and renormalised (ours).
"""

from dataclasses import dataclass

import torch

from .rewards import reachable


@dataclass(frozen=True)
class Rollouts:
    """W windows with G drafted continuations of K tokens each, and what the target thinks of them.

    Attributes:
        draft_ids: (W, G, K) int64 drafted tokens, draft vocabulary.
        draft_logits: (W, G, K, D) of the present drafter, with gradients.
        old_logprobs: (W, G, K) log-probabilities of the drafted tokens when they were drawn, at ``temperature``.
        target_logits: (W, G, K, D) of the target over the draft vocabulary, after the same prefixes; -inf allowed.
        advantages: (W, G).
        accepted: (W, G) int64 k.
        window_mask: (W,) bool, False for windows that do not exist; what their entries hold does not matter.
        temperature: of the rollouts; the policy is the drafter at this temperature.
    """

    draft_ids: torch.Tensor
    draft_logits: torch.Tensor
    old_logprobs: torch.Tensor
    target_logits: torch.Tensor
    advantages: torch.Tensor
    accepted: torch.Tensor
    window_mask: torch.Tensor
    temperature: float = 1.0


def ppow_loss(rollouts: Rollouts, clip_range: float, kl_coef: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy objective plus the target-anchored KL term.

    -mean over rollouts of the sum over reachable tokens of min(r * A, clip(r, 1 - c, 1 + c) * A), with the per-token
    ratio r = pi / pi_old, plus kl_coef times the mean over rollouts of the mean over reachable states of KL(P || Q), P
    the target. On policy, the first term's gradient is that of the expected reward: a mean over a rollout's tokens
    would weigh long accepted prefixes less than the reward does, and past the second or third token turn against them.

    From the paper (PPOW, arXiv 2605.14978, as summarised): group-relative advantages, PPO-style clipping, the anchor on
    the target. Ours: per-token ratios, reachable tokens only (:func:`reachable`) for both terms, sum and mean, the
    direction of the KL, which always compares the two at temperature 1.

    Args:
        rollouts: see :class:`Rollouts`.
        clip_range: c.
        kl_coef: beta.

    Returns:
        loss (), and detached metrics: policy_loss, kl (nats per reachable state), clipped (share of reachable tokens
        whose gradient clipping stops), draft_entropy (nats). The loss is 0 when no window exists.

    Raises:
        ValueError: for shapes that do not fit, clip_range <= 0 or a negative kl_coef.
    """
    _check(rollouts)
    if clip_range <= 0 or kl_coef < 0:
        raise ValueError(f"Expected clip_range > 0 and kl_coef >= 0, got {clip_range} and {kl_coef}.")
    reach = reachable(rollouts.accepted, rollouts.draft_ids.shape[-1]) & rollouts.window_mask[:, None, None]
    # only the n reachable states are looked at: less memory, and nothing that lies elsewhere can leak into a gradient
    states = reach.nonzero(as_tuple=True)
    logits = _full_precision(rollouts.draft_logits[states])  # (n, D)
    count = (rollouts.window_mask.sum() * reach.shape[1]).clamp(min=1)  # rollouts that exist
    share = (1 / reach.sum(-1).clamp(min=1).to(logits.dtype))[states[:2]] / count  # (n,) of the mean over states
    advantage = rollouts.advantages[..., None].expand(reach.shape)[states]  # (n,)

    draft = logits.log_softmax(-1)
    policy = draft if rollouts.temperature == 1 else (logits / rollouts.temperature).log_softmax(-1)
    chosen = policy.gather(-1, rollouts.draft_ids[states][:, None])[:, 0]
    ratio = (chosen - rollouts.old_logprobs[states]).exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    policy_loss = -torch.minimum(free, clipped).sum() / count

    target = _full_precision(rollouts.target_logits[states]).log_softmax(-1)
    kl = (target.exp() * (target.clamp(min=-1e4) - draft)).sum(-1)  # KL(P || Q); the clamp keeps 0 * log 0 at 0
    anchor = (share * kl).sum()
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_loss.detach(),
            "kl": anchor.detach(),
            "clipped": (free > clipped).sum() / max(1, len(ratio)),
            "draft_entropy": -(share * (draft.exp() * draft).sum(-1)).sum(),
        }
    return policy_loss + kl_coef * anchor, metrics


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 -> float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(rollouts: Rollouts) -> None:
    logits, tokens = rollouts.draft_logits, rollouts.draft_ids
    if logits.dim() != 4 or logits.shape != rollouts.target_logits.shape:
        raise ValueError(
            f"draft_logits {tuple(logits.shape)} and target_logits {tuple(rollouts.target_logits.shape)} must both be "
            "(W, G, K, D)."
        )
    shape = tuple(logits.shape)
    expected = {"draft_ids": 3, "old_logprobs": 3, "advantages": 2, "accepted": 2, "window_mask": 1}
    for name, dims in expected.items():
        given = tuple(getattr(rollouts, name).shape)
        if given != shape[:dims]:
            raise ValueError(f"{name} must be {shape[:dims]} beside draft_logits (W, G, K, D) {shape}, got {given}.")
    if rollouts.window_mask.dtype != torch.bool or tokens.dtype != torch.int64:
        raise ValueError(
            f"Expected window_mask of bool and draft_ids of int64, got {rollouts.window_mask.dtype} and {tokens.dtype}."
        )
    if rollouts.temperature <= 0:
        raise ValueError(f"Rollouts are drawn at a temperature above 0, got {rollouts.temperature}.")


def supervised_step_loss(draft_logits: torch.Tensor, target_logits: torch.Tensor) -> torch.Tensor:
    """One step of EAGLE-3's training-time test (arXiv 2503.01840): cross-entropy with the target's soft labels.

    The caller weighs step i (by step_weight ** i) and adds up, so that one step's logits need not outlive another's
    loss. That each step is the mean over its own positions is ours.

    Args:
        draft_logits: (n, D) at the positions to learn from.
        target_logits: (n, D) the target's logits over the draft vocabulary; its distribution is renormalised there.

    Returns:
        loss () in nats per position; 0, with a gradient of 0, when there is none.

    Raises:
        ValueError: for differing shapes.
    """
    if draft_logits.dim() != 2 or draft_logits.shape != target_logits.shape:
        raise ValueError(
            f"draft_logits {tuple(draft_logits.shape)} and target_logits {tuple(target_logits.shape)} must both be "
            "(n, D)."
        )
    draft = _full_precision(draft_logits)
    labels = target_logits.to(draft.dtype).softmax(-1)
    total = torch.nn.functional.cross_entropy(draft, labels, reduction="sum")
    return total / max(1, draft.shape[0])
