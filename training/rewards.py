"""Rewards of PPOW: from how many drafts were accepted (``ppow.acceptance_ppow``) to advantages. Pure functions.

From the paper (PPOW, arXiv 2605.14978, as summarised): the Cost-Aware Speedup Reward, the Distribution-Based Proximity
Reward and group-relative advantages. Ours: the division by the group's standard deviation, and which tokens of a window
count as reachable.
"""

import torch

from ppow.acceptance_ppow import check_same_shape


def speedup_reward(accepted: torch.Tensor, cost_ratio: float) -> torch.Tensor:
    """Cost-Aware Speedup Reward, R = k / (k * gamma + 1) (paper): leaves out the bonus, charges accepted drafts only.

    Args:
        accepted: (..) k.
        cost_ratio: gamma, cost of a draft step over a target step; 0.12 in the paper.

    Returns:
        (..) float32, accepted drafts per target step's worth of cost.

    Raises:
        ValueError: for a negative cost.
    """
    if cost_ratio < 0:
        raise ValueError(f"cost_ratio must be at least 0, got {cost_ratio}.")
    k = accepted.float()
    return k / (k * cost_ratio + 1)


def proximity_gap(argmax_logprobs: torch.Tensor, draft_logprobs: torch.Tensor) -> torch.Tensor:
    """Delta = sum over the window of log p(y_t | y_<t) - log p(yhat_t | yhat_<t) (paper, as summarised).

    How much likelier the target finds its own argmax window y than the drafted one yhat, each after its own prefix.

    Args:
        argmax_logprobs, draft_logprobs: (.., K) target log-probabilities of y and yhat.

    Returns:
        (..) nats.

    Raises:
        ValueError: for differing shapes.
    """
    check_same_shape(argmax_logprobs=argmax_logprobs, draft_logprobs=draft_logprobs)
    return (argmax_logprobs - draft_logprobs).sum(-1)


def proximity_reward(accepted: torch.Tensor, gap: torch.Tensor, bonus: float, margin: float) -> torch.Tensor:
    """Distribution-Based Proximity Reward, R = eta * 1[Delta < eps] where nothing was accepted (paper, as summarised).

    The sizes of eta and eps are ours.

    Args:
        accepted: (..) k.
        gap: (..) Delta of :func:`proximity_gap`.
        bonus: eta.
        margin: eps, in nats.

    Returns:
        (..) reward, 0 wherever k > 0.

    Raises:
        ValueError: for differing shapes.
    """
    check_same_shape(accepted=accepted, gap=gap)
    return bonus * ((accepted == 0) & (gap < margin)).float()


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (.., G) relative to the mean of their group, the G rollouts of one prefix (paper, as summarised).

    Divided by the group's (population) standard deviation + 1e-6 (ours). Advantages sum to 0. A group whose rewards are
    all equal teaches nothing: its advantages are exactly 0.

    Raises:
        ValueError: for groups of fewer than 2.
    """
    if rewards.dim() == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"A group needs at least 2 rollouts to compare, got rewards of shape {tuple(rewards.shape)}.")
    advantages = rewards - rewards.mean(-1, keepdim=True)
    # the mean of equal rewards can be off by a rounding, which the division would blow up
    flat = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return advantages.masked_fill(flat, 0.0) / (rewards.std(-1, unbiased=False, keepdim=True) + 1e-6)


def reachable(accepted: torch.Tensor, window_size: int) -> torch.Tensor:
    """(..) k -> (.., K) bool: the first k + 1 drafted tokens, those verified after an accepted prefix (ours).

    What comes after the first rejection is drafted on a text that will not exist. At k = K all K are reachable.
    """
    return torch.arange(window_size, device=accepted.device) <= accepted[..., None]
