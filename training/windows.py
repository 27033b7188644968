"""Which windows to train on: criticality, and Adaptive Divergence-Aware Windowing (ADAW). Pure functions.

From the paper (PPOW, arXiv 2605.14978, as summarised): criticality v_t = C(P_t) * KL(P_t || Q_t) with the confidence
C(P) = 1 - H(P) / log|V|, a window's priority as the mean of v over its K positions, windows drawn by priority, and a
switch part-way through training.

Ours: the sampling formula and its exponent, the moment of the switch, and the vocabulary. P and Q must live on one
vocabulary, and a pruned drafter knows only D of the target's tokens; so the target is restricted to the draft
vocabulary and renormalised, for the confidence as well (|V| is D then). What the target would put on other tokens
counts nowhere: no drafter can draft them.

Position convention: entry t of a text belongs to the drafter's pair t, which predicts x_{t+2}. The window that starts
at s covers the pairs s .. s + K - 1.
"""

import math

import torch

# Stands for log 0, so that an excluded token costs much but leaves every sum finite.
_LOG_ZERO = -1e4


def confidence(target_logprobs: torch.Tensor) -> torch.Tensor:
    """C(P) = 1 - H(P) / log V (paper, as summarised): 1 for a one-hot target, 0 for a uniform one.

    Args:
        target_logprobs: (.., V) normalised log-probabilities, -inf allowed; V is whatever vocabulary they live on
            (in training the draft vocabulary, see above).

    Returns:
        (..) in [0, 1].

    Raises:
        ValueError: for fewer than two tokens, where log V is 0.
    """
    size = target_logprobs.shape[-1] if target_logprobs.dim() else 0
    if size < 2:
        raise ValueError(
            f"Confidence needs log-probabilities (.., V) of at least 2 tokens, got {tuple(target_logprobs.shape)}."
        )
    entropy = -(target_logprobs.exp() * target_logprobs.clamp(min=_LOG_ZERO)).sum(-1)
    return (1 - entropy / math.log(size)).clamp(0, 1)  # rounding can leave a hair outside


def divergence(target_logprobs: torch.Tensor, draft_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(P || Q) in nats, P anchored on the target (paper, as summarised).

    Args:
        target_logprobs, draft_logprobs: (.., V) over one vocabulary, the draft vocabulary: the target is restricted to
            it and renormalised (ours). A token that Q excludes counts as log q = -1e4, so the result is finite.

    Returns:
        (..), 0 where P = Q.

    Raises:
        ValueError: for differing shapes.
    """
    if target_logprobs.shape != draft_logprobs.shape:
        raise ValueError(
            f"Distributions over {target_logprobs.shape[-1]} and {draft_logprobs.shape[-1]} tokens (shapes "
            f"{tuple(target_logprobs.shape)} and {tuple(draft_logprobs.shape)}) cannot be compared; both must be "
            "(.., D): restrict the target to the draft vocabulary first."
        )
    gap = target_logprobs.clamp(min=_LOG_ZERO) - draft_logprobs.clamp(min=_LOG_ZERO)
    return (target_logprobs.exp() * gap).sum(-1)


def criticality(target_logprobs: torch.Tensor, draft_logprobs: torch.Tensor) -> torch.Tensor:
    """v_t = C(P_t) * KL(P_t || Q_t): large where a confident target disagrees with the drafter (paper, as summarised).

    Both factors read the same (.., D) log-probabilities over the draft vocabulary (ours). -> (..)
    """
    return confidence(target_logprobs) * divergence(target_logprobs, draft_logprobs)


def window_priority(critical: torch.Tensor, valid: torch.Tensor, window_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean criticality of the window starting at each pair (paper, as summarised).

    Args:
        critical: (B, T) criticality per pair.
        valid: (B, T) bool, pairs that predict a token to learn from.
        window_size: K.

    Returns:
        priority (B, T), entry s for pairs s .. s + K - 1, 0 where no window starts; exists (B, T) bool, whether all K
        pairs from here lie in the text and are valid.

    Raises:
        ValueError: when ``critical`` and ``valid`` are not (B, T) and bool (B, T), or K < 1.
    """
    if critical.dim() != 2 or critical.shape != valid.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"critical {tuple(critical.shape)} and valid {tuple(valid.shape)} ({valid.dtype}) must have one shape "
            "(B, T), valid of bool."
        )
    if window_size < 1:
        raise ValueError(f"A window holds at least 1 token, got window_size={window_size}.")
    length = critical.shape[1]
    exists = torch.zeros_like(valid)
    priority = torch.zeros_like(critical)
    if length >= window_size:
        starts = length - window_size + 1
        exists[:, :starts] = valid.unfold(1, window_size, 1).all(-1)
        priority[:, :starts] = critical.unfold(1, window_size, 1).mean(-1)
    return torch.where(exists, priority, 0.0), exists


def wanted_windows(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All wanted windows of every text, so that only those are drafted.

    Args:
        wanted: (B, S) bool, whether the window that starts at pair s is wanted.

    Returns:
        starts (B, R) int64 in the order of the text, R the most of any text, but at least 1; mask (B, R) bool, False
        where a text has fewer.
    """
    rows = max(1, int(wanted.sum(1).max()))
    starts = wanted.long().argsort(dim=1, descending=True, stable=True)[:, :rows]
    return starts, wanted.gather(1, starts)


def sample_windows(
    priority: torch.Tensor | None,
    exists: torch.Tensor,
    count: int,
    generator: torch.Generator,
    adaptive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows of every text without replacement: uniformly, or one after the other by priority.

    The paper draws windows by priority after the switch; the formula is ours. Gumbel's trick: the largest ``count`` of
    log weight + Gumbel noise are such a draw, in the order of drawing. Where every priority of a text is 0, the draw
    is uniform.

    Args:
        priority, exists: (B, T) of :func:`window_priority`; the priority is needed for an adaptive draw only.
        count: W, windows per text.
        generator: on the CPU; decides the draw alone, whatever the device.
        adaptive: by priority (ADAW) instead of uniformly.

    Returns:
        starts (B, W) int64, 0 where there is none; mask (B, W) bool, False where a text has fewer windows.

    Raises:
        ValueError: for shapes that do not fit, count < 1, an adaptive draw without priorities.
    """
    if exists.dim() != 2 or exists.dtype != torch.bool:
        raise ValueError(f"exists must be bool (B, T), got {exists.dtype} {tuple(exists.shape)}.")
    if adaptive and (priority is None or priority.shape != exists.shape):
        given = None if priority is None else tuple(priority.shape)
        raise ValueError(f"An adaptive draw needs a priority of shape {tuple(exists.shape)}, got {given}.")
    if count < 1:
        raise ValueError(f"Expected count >= 1, got count={count}.")
    noise = torch.rand(exists.shape, generator=generator).clamp(min=1e-20)
    keys = -(-noise.log()).log().to(exists.device)
    if adaptive and priority is not None:
        keys = priority.clamp(min=1e-12).log() + keys
    keys = keys.masked_fill(~exists, -torch.inf)
    found = min(count, keys.shape[1])
    top, starts = keys.topk(found, dim=1)
    mask = top > -torch.inf
    pad = (0, count - found)
    return torch.nn.functional.pad(starts * mask, pad), torch.nn.functional.pad(mask, pad)


def adaptive_on(step: int, total_steps: int, switch: float) -> bool:
    """Whether ADAW is on in ``step`` (from 1): after the fraction ``switch`` of all steps; 0 is always, 1 never.

    That there is a switch part-way is the paper's (as summarised); where it lies is ours.
    """
    return step > switch * total_steps


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of (B, W, ..) over the windows that exist; 0 when none does."""
    return values[mask].mean() if mask.any() else values.new_zeros(())
