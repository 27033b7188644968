"""Rewards of PPOW and the acceptance they rest on. Pure functions.

From the paper (PPOW, arXiv 2605.14978, as summarised): the Cost-Aware Speedup Reward, the Distribution-Based Proximity
Reward and group-relative advantages. Ours: the throughput reward, the division by the group's standard deviation,
credit by token, which tokens of a window count as reachable, and which of the two verifications gives k in training.
"""

import torch


def accepted_greedy(draft_tokens: torch.Tensor, target_argmax: torch.Tensor) -> torch.Tensor:
    """k under greedy verification: leading drafts that equal the target's argmax after the drafts before them.

    For drafts sampled from Q, E[k] = sum_j prod_{i<=j} Q(argmax P_i) along the target's own greedy text.

    Args:
        draft_tokens, target_argmax: (.., K) token ids in one vocabulary.

    Returns:
        (..) int64 in 0 .. K; the bonus token is not counted.

    Raises:
        ValueError: for differing shapes.
    """
    _same_shape(draft_tokens=draft_tokens, target_argmax=target_argmax)
    return (draft_tokens == target_argmax).long().cumprod(-1).sum(-1)


def accepted_sampling(draft_logprobs: torch.Tensor, target_logprobs: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """k under rejection sampling (Leviathan et al., arXiv 2211.17192): draft x stands when its coin u < p(x) / q(x).

    For drafts sampled from Q each stands with probability sum_v min(p, q).

    Args:
        draft_logprobs, target_logprobs: (.., K) log q and log p of the drafted tokens; q must be the distribution they
            were drawn from.
        coins: (.., K) uniform on [0, 1).

    Returns:
        (..) int64 in 0 .. K; the bonus token is not counted.

    Raises:
        ValueError: for differing shapes.
    """
    _same_shape(draft_logprobs=draft_logprobs, target_logprobs=target_logprobs, coins=coins)
    return (coins < (target_logprobs - draft_logprobs).exp()).long().cumprod(-1).sum(-1)


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


def throughput_reward(accepted: torch.Tensor, window_size: int, cost_ratio: float, verify_cost: float) -> torch.Tensor:
    """(k + 1) / (K * gamma + v): tokens per target step's worth of cost for a drafter that always drafts K (ours).

    Args:
        accepted: (..) k.
        window_size: K.
        cost_ratio: gamma, cost of a draft step over a target step.
        verify_cost: v, verifying K + 1 tokens over one target step.

    Returns:
        (..) float32, linear in k.

    Raises:
        ValueError: for a negative draft cost or a verification that costs nothing.
    """
    if cost_ratio < 0 or verify_cost <= 0:
        raise ValueError(f"Expected cost_ratio >= 0 and verify_cost > 0, got {cost_ratio} and {verify_cost}.")
    return (accepted.float() + 1) / (window_size * cost_ratio + verify_cost)


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
    _same_shape(argmax_logprobs=argmax_logprobs, draft_logprobs=draft_logprobs)
    return (argmax_logprobs - draft_logprobs).sum(-1)


def proximity_reward(
    accepted: torch.Tensor, gap: torch.Tensor, bonus: float, margin: float | torch.Tensor
) -> torch.Tensor:
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
    _same_shape(accepted=accepted, gap=gap)
    return bonus * ((accepted == 0) & (gap < margin)).float()


def group_advantages(rewards: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """Rewards (.., G) relative to the mean of their group, the G rollouts of one prefix (paper, as summarised).

    ``normalize`` divides by the group's (population) standard deviation + 1e-6 (ours). Advantages sum to 0.
    A group whose rewards are all equal teaches nothing: its advantages are exactly 0.

    Raises:
        ValueError: for groups of fewer than 2.
    """
    if rewards.dim() == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"A group needs at least 2 rollouts to compare, got rewards of shape {tuple(rewards.shape)}.")
    return _by_deviation(rewards - rewards.mean(-1, keepdim=True), rewards, normalize)


def _by_deviation(advantages: torch.Tensor, rewards: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Advantages (.., G) or (.., G, K) over the deviation of their group's rewards (.., G); 0 where those are equal."""
    group = (..., *[None] * (1 + advantages.dim() - rewards.dim()))
    # the mean of equal rewards can be off by a rounding, which the division would blow up
    flat = rewards.amax(-1) == rewards.amin(-1)
    advantages = advantages.masked_fill(flat[group], 0.0)
    return advantages / (rewards.std(-1, unbiased=False)[group] + 1e-6) if normalize else advantages


def token_advantages(
    rewards: torch.Tensor, accepted: torch.Tensor, stopping: torch.Tensor, normalize: bool = True
) -> torch.Tensor:
    """Credit by token: what a rollout earned over the others of its group that also got as far as the token (ours).

    Token i (from 0) is reached by the rollouts with k >= i. Under greedy verification they share the accepted prefix
    and differ from token i on, so the mean reward of the *others* is the fitting baseline for what the token is worth;
    depending on other rollouts alone, it leaves the expected gradient as it is. Where no other got there, the baseline
    is what stopping there earns.

    Args:
        rewards: (.., G).
        accepted: (.., G) k.
        stopping: (K + 1,) R(k) of k = 0 .. K.
        normalize: divide by the group's (population) standard deviation + 1e-6, as :func:`group_advantages` does.

    Returns:
        (.., G, K), 0 for tokens that were not reached, and exactly 0 where all rewards of a group are equal.

    Raises:
        ValueError: for groups of fewer than 2, or shapes that do not fit.
    """
    if rewards.dim() == 0 or rewards.shape[-1] < 2 or rewards.shape != accepted.shape:
        raise ValueError(
            f"Expected rewards and accepted (.., G) with at least 2 rollouts in a group, got {tuple(rewards.shape)} "
            f"and {tuple(accepted.shape)}."
        )
    reached = reachable(accepted, len(stopping) - 1)  # (.., G, K)
    others = reached.sum(-2, keepdim=True) - 1  # (.., 1, K): of those that got there, all but oneself
    earned = torch.where(reached, rewards[..., None], 0.0)
    mean = (earned.sum(-2, keepdim=True) - earned) / others.clamp(min=1)
    baseline = torch.where(others > 0, mean, stopping[:-1].to(rewards))
    return _by_deviation((rewards[..., None] - baseline).masked_fill(~reached, 0.0), rewards, normalize)


def reachable(accepted: torch.Tensor, window_size: int) -> torch.Tensor:
    """(..) k -> (.., K) bool: the first k + 1 drafted tokens, those verified after a prefix that stands (ours).

    What comes after the first rejection is drafted on a text that will not exist. At k = K all K are reachable.
    """
    return torch.arange(window_size, device=accepted.device) <= accepted[..., None]


def _same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise ValueError(f"Expected tensors of one shape (.., K), got {shapes}.")
