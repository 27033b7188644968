"""Objectives of both stages. Pure functions: tensors in, (loss, metrics) out.

An objective of stage 2 takes one of two kinds of batch, :class:`Rollouts` (what the drafter drew and the target said of
it) or :class:`TextWindows` (drafter and target compared along the target's own text), and its own coefficients.
``OBJECTIVES`` names what ``ppow reinforce`` knows; benchmarks/controls.py adds those that PPOW is compared with.
Distributions live on the draft vocabulary, the target restricted to it and renormalised (ours), unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .config import ReinforceConfig
from .rewards import reachable

CLIP_RANGE = 0.2  # of the policy ratio (ours)
STEP_WEIGHT = 0.8  # draft step i weighs STEP_WEIGHT ** i in stage 2's supervised losses, as in EAGLE-3


@dataclass(frozen=True)
class Rollouts:
    """W windows with G drafted continuations of K tokens each, and what the target thinks of them.

    Attributes:
        draft_ids: (W, G, K) int64 drafted tokens, draft vocabulary.
        draft_logits: (W, G, K, D) of the present drafter, with gradients.
        old_logprobs: (W, G, K) log-probabilities of the drafted tokens when they were drawn, at ``temperature``.
        target_logits: (W, G, K, D) of the target over the draft vocabulary, after the same prefixes; -inf allowed.
        advantages: (W, G) of every rollout.
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


def ppow_loss(
    rollouts: Rollouts, kl_coef: float, clip_range: float = CLIP_RANGE
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
        kl_coef: beta.
        clip_range: c.

    Returns:
        loss (), and detached metrics: policy_loss, kl (nats per reachable state), clipped (share of reachable tokens
        whose gradient clipping stops), draft_entropy (nats). The loss is 0 when no window exists.

    Raises:
        ValueError: for shapes that do not fit, clip_range <= 0 or a negative kl_coef.
    """
    check_rollouts(rollouts)
    if clip_range <= 0 or kl_coef < 0:
        raise ValueError(f"Expected clip_range > 0 and kl_coef >= 0, got {clip_range} and {kl_coef}.")
    reach = reachable(rollouts.accepted, rollouts.draft_ids.shape[-1]) & rollouts.window_mask[:, None, None]
    # only the n reachable states are looked at: less memory, and nothing that lies elsewhere can leak into a gradient
    states = reach.nonzero(as_tuple=True)
    logits = full_precision(rollouts.draft_logits[states])  # (n, D)
    count = (rollouts.window_mask.sum() * reach.shape[1]).clamp(min=1)  # rollouts that exist
    share = (1 / reach.sum(-1).clamp(min=1).to(logits.dtype))[states[:2]] / count  # (n,) of the mean over states
    advantage = rollouts.advantages[states[:2]]  # (n,)

    draft = logits.log_softmax(-1)
    policy = draft if rollouts.temperature == 1 else (logits / rollouts.temperature).log_softmax(-1)
    chosen = policy.gather(-1, rollouts.draft_ids[states][:, None])[:, 0]
    ratio = (chosen - rollouts.old_logprobs[states]).exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage
    policy_loss = -torch.minimum(free, clipped).sum() / count

    target = full_precision(rollouts.target_logits[states]).log_softmax(-1)
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


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 -> float32; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_rollouts(rollouts: Rollouts) -> None:
    """Raise a ValueError for shapes or dtypes other than :class:`Rollouts` says, or a temperature of 0 or less."""
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

    The caller takes the mean over a step's positions (ours), weighs step i (by step_weight ** i) and adds up, so that
    one step's logits need not outlive another's loss.

    Args:
        draft_logits: (n, D) at the positions to learn from.
        target_logits: (n, D) the target's logits over the draft vocabulary; its distribution is renormalised there.

    Returns:
        (n,) in nats. Nothing is added up over positions, so that one compiled kernel serves any number of them.

    Raises:
        ValueError: for differing shapes.
    """
    if draft_logits.dim() != 2 or draft_logits.shape != target_logits.shape:
        raise ValueError(
            f"draft_logits {tuple(draft_logits.shape)} and target_logits {tuple(target_logits.shape)} must both be "
            "(n, D)."
        )
    draft = full_precision(draft_logits)
    labels = target_logits.to(draft.dtype).softmax(-1)
    return -(labels * draft.log_softmax(-1)).sum(-1)


# -- along the target's own text ---------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """What objectives read of states: P is the target and Q the drafter after the same prefix, both at temperature 1.

    All of one shape, (n,) or (W, K); all but ``hit`` with gradient.

    Attributes:
        kl: KL(P || Q) in nats, P restricted to the draft vocabulary and renormalised (ours). Its gradient is that of
            the cross-entropy with soft labels.
        overlap: sum_v min(P, Q), P over the whole vocabulary: how likely rejection sampling accepts.
        best: Q(argmax P), P over the whole vocabulary; 0 where the drafter does not know that token.
        accept: min(1, Q(x) / P(x)) of the text's token x; 0 where the drafter does not know it. Over texts of the
            target its mean after one prefix is ``overlap``.
        text: Q(x) of the text's token x.
        hit: bool, whether the drafter's most probable token is argmax P.
    """

    kl: torch.Tensor
    overlap: torch.Tensor
    best: torch.Tensor
    accept: torch.Tensor
    text: torch.Tensor
    hit: torch.Tensor


@dataclass(frozen=True)
class TextWindows:
    """W windows of K draft steps along the target's own text.

    Step i of a window has seen the text's own tokens, on the drafter's own features (training-time test). All (W, K),
    entries where ``mask`` is False are 0 and mean nothing.

    Attributes:
        mask: bool, False from the first step on whose token is no answer's or lies after the text.
        states: drafter and target compared at each step.
        greedy: bool, whether every token of the window before this step is the target's argmax.
        sampled: (W,) bool, whether the target sampled this text (else it wrote it greedily).
        surprise: (W, K) what the drafter's confidence head is off by (:func:`confidence_loss`); None without a head.
    """

    mask: torch.Tensor
    states: Compared
    greedy: torch.Tensor
    sampled: torch.Tensor
    surprise: torch.Tensor | None = None


def confidence_loss(predicted: torch.Tensor, hit: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of a confidence head with the analytic acceptance of each state, both rules added up.

    Args:
        predicted: (n, 2) log odds of ``PPOWDrafter.acceptance_logits``.
        hit: (n,) bool, the most probable draft is the target's argmax: accepted at temperature 0.
        overlap: (n,) in [0, 1], sum_v min(P, Q): how likely rejection sampling accepts. No gradient passes to it.

    Returns:
        (n,) in nats.
    """
    wanted = torch.stack((hit.to(predicted), overlap.detach().to(predicted)), -1)
    return torch.nn.functional.binary_cross_entropy_with_logits(predicted, wanted, reduction="none").sum(-1)


def head_loss(windows: TextWindows) -> torch.Tensor:
    """Mean of what a confidence head is off by (), which reaches nothing but the head; 0 without one."""
    if windows.surprise is None:
        return windows.states.text.new_zeros(())
    return (windows.surprise * windows.mask).sum() / windows.mask.sum().clamp(min=1)


def compare(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor,
    best: torch.Tensor,
    text: torch.Tensor,
    norm: torch.Tensor | None = None,
) -> Compared:
    """Reduce n states to the figures that objectives read.

    Args:
        draft_logits: (n, D); target_logits: (n, D) over the draft vocabulary.
        best, text: (n,) the target's argmax and the text's token as draft ids, -1 where the drafter lacks them.
        norm: (n,) logsumexp of the target's logits over its whole vocabulary; None: it is the draft vocabulary.
    """
    target = full_precision(target_logits)
    draft = full_precision(draft_logits).log_softmax(-1)
    wanted = target.log_softmax(-1)
    kl = (wanted.exp() * (wanted.clamp(min=-1e4) - draft)).sum(-1)
    whole = wanted if norm is None else target - norm[:, None]  # log P over the whole vocabulary
    overlap = torch.minimum(whole.exp(), draft.exp()).sum(-1)

    def chosen(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, ids.clamp(min=0)[:, None])[:, 0]

    best_prob = torch.where(best >= 0, chosen(draft, best).exp(), 0.0)
    text_prob = torch.where(text >= 0, chosen(draft, text).exp(), 0.0)
    accept = torch.where(text >= 0, (chosen(draft, text) - chosen(whole, text)).clamp(max=0).exp(), 0.0)
    return Compared(kl, overlap, best_prob, accept, text_prob, draft.detach().argmax(-1) == best)


def cst_loss(windows: TextWindows, step_weight: float = STEP_WEIGHT) -> tuple[torch.Tensor, dict]:
    """Continued supervised training: the loss of stage 1 (EAGLE-3, arXiv 2503.01840) up to the labels' own entropy.

    Windows start in answers, as in decoding; stage 1 also unrolls from the prompt into the answer. Of a block drafter
    it is :func:`block_loss`'s kl, whatever stage 1 was: `ppow supervised --drafter` continues that.
    """
    return step_mean(windows.states.kl, windows.mask, step_weight), {}


def lk_loss(windows: TextWindows, step_weight: float = STEP_WEIGHT) -> tuple[torch.Tensor, dict]:
    """LK (arXiv 2602.23881), first form: -log alpha, alpha = sum_v min(P, Q). Step weights as in stage 1 (ours)."""
    return step_mean(-windows.states.overlap.clamp(min=1e-6).log(), windows.mask, step_weight), {}


def d_pace_weights(windows: TextWindows, floor: float = 0.5) -> torch.Tensor:
    """D-PACE's weights (W, K) of cross-entropies: w_i = sum_{k>=i} prod_{j<=k} ((1 - a) q_j + a), detached, a = 0.5.

    q_j = Q of the text's token. Steps that do not count weigh nothing.
    """
    stands = torch.where(windows.mask, (1 - floor) * windows.states.text.detach() + floor, 0.0).cumprod(-1)
    return stands.flip(-1).cumsum(-1).flip(-1)


def block_loss(windows: TextWindows, kind: str, step_weight: float) -> tuple[torch.Tensor, dict]:
    """What stage 1 teaches a block drafter along texts of its target.

    Slot i weighs ``step_weight ** i``, which is the exponential decay exp(-i / g) of DFlash (arXiv 2602.06036) with
    g = -1 / ln(step_weight), in every kind but d_pace:

    * ce: cross-entropy with the text's tokens (DFlash);
    * kl: KL(P || Q), with the gradient of EAGLE-3's cross-entropy with soft labels;
    * d_pace: the same under :func:`d_pace_weights` instead of the decay; the division by K is ours;
    * dspark: 0.1 cross-entropy + 0.9 L1 distance of Q and P (DSpark, arXiv 2607.05147).

    A confidence head learns beside it (:func:`head_loss`).

    Returns:
        loss (), and detached metrics: step_losses (K,), the unweighted mean loss of each slot.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("ce", "kl", "d_pace", "dspark"):
        raise ValueError(f"block_loss must be ce, kl, d_pace or dspark, got {kind!r}.")
    states = windows.states
    values = states.kl if kind == "kl" else -states.text.clamp(min=1e-37).log()  # (W, K)
    if kind == "dspark":
        values = 0.1 * values + 0.9 * 2 * (1 - states.overlap)
    count = windows.mask.sum(0).clamp(min=1)
    metrics = {"step_losses": torch.where(windows.mask, values, 0.0).detach().sum(0) / count}
    if kind == "d_pace":
        weighted = torch.where(windows.mask, d_pace_weights(windows) * values, 0.0)
        return batch_mean(weighted.sum(-1) / windows.mask.shape[-1]) + head_loss(windows), metrics
    return step_mean(values, windows.mask, step_weight) + head_loss(windows), metrics


def exact_loss(
    windows: TextWindows, rewards: torch.Tensor, verification: str, kl_coef: float
) -> tuple[torch.Tensor, dict]:
    """PPOW's objective with the expectation over rollouts in closed form, along text the target wrote itself.

    Greedy verification accepts only the target's argmax, so every accepted prefix is its own greedy text and
    Pr(k >= j) = prod_{i<=j} Q(argmax P_i). Rejection sampling drafts x and accepts it with probability
    min(P, Q)(x) = P(x) a(x), a(x) = min(1, Q(x) / P(x)), so over text sampled from the target Pr(k >= j) is the mean of
    prod_{i<j} a(x_i) times alpha_j, where alpha_j = sum_v min(P, Q)(v) is the mean of a(x_j) taken in closed form.
    Either way E[R] = R(0) + sum_j (R(j) - R(j - 1)) Pr(k >= j) for any reward of k.

    Along sampled text the gradient of a(x_i) is known for one token only, and noisy. What it is worth on average, b_i
    (the mean over the other sampled windows of what follows step i), is therefore credited to alpha_i, which knows all
    tokens: b_i * (alpha_i - a(x_i)) is added, whose mean is 0 (a control variate).

    A greedy window ends with the step at which the text leaves the target's argmax: what would follow is not known, so
    its reward is that of a shorter window. The proximity reward looks off the accepted path and has no closed form.
    ``text`` takes for each text the rule that wrote it. The derivation is ours; the anchor weighs each state by the
    (detached) probability of reaching it, which is what the mean over reachable states of rollouts estimates.

    Args:
        rewards: (K + 1,) R(k) of k = 0 .. K accepted tokens.
        verification: greedy, sampling or text.
        kl_coef: beta.

    Raises:
        ValueError: for rewards of another length, an unknown verification or a negative kl_coef.
    """
    size = windows.mask.shape[-1]
    if rewards.shape != (size + 1,) or kl_coef < 0:
        raise ValueError(
            f"Expected rewards ({size + 1},) of k = 0 .. {size} and kl_coef >= 0, got {tuple(rewards.shape)} and "
            f"{kl_coef}."
        )
    rules = {
        "greedy": torch.zeros_like(windows.sampled),
        "sampling": torch.ones_like(windows.sampled),
        "text": windows.sampled,
    }
    if verification not in rules:
        raise ValueError(f"verification must be {', '.join(rules)}, got {verification!r}.")
    sampled = rules[verification][:, None] & windows.mask  # (W, K)
    greedy = torch.where(windows.greedy, windows.states.best, 0.0)
    stands = torch.where(windows.mask, torch.where(sampled, windows.states.accept, greedy), 0.0)
    chance = torch.where(sampled, windows.states.overlap, stands)  # the mean of ``stands`` after the same prefix
    before = torch.cat((torch.ones_like(stands[:, :1]), stands.cumprod(-1)[:, :-1]), -1)  # the earlier tokens stood
    reached = before * chance  # (W, K): Pr(k >= 1 .. K)
    gains = rewards.to(reached).diff()
    reward = batch_mean(rewards[0].to(reached) + (reached * gains).sum(-1))
    visits = before.detach() * windows.mask
    worth = _worth_of_acceptance(stands, chance, gains, sampled)
    credit = batch_mean((visits * worth * (chance - stands)).sum(-1))
    credit = credit - credit.detach()  # a gradient only; the loss stays minus the reward
    anchor = batch_mean((visits * windows.states.kl).sum(-1) / visits.sum(-1).clamp(min=1e-6))
    length = batch_mean(reached.sum(-1)).detach()
    metrics = {"reward": reward.detach(), "acceptance_length": 1 + length, "kl": anchor.detach()}
    return kl_coef * anchor - reward - credit, metrics


@torch.no_grad()
def _worth_of_acceptance(
    stands: torch.Tensor, chance: torch.Tensor, gains: torch.Tensor, sampled: torch.Tensor
) -> torch.Tensor:
    """(W, K) what is to be expected after an accepted step i: the mean over the other sampled windows; else 0.

    Behind step i a window earns F_{i+1} = gains_{i+1} * chance_{i+1} + stands_{i+1} * F_{i+2}. A window's own future
    depends on its token at step i, and would bias the gradient; so it is left out of its mean.
    """
    follows, futures = torch.zeros_like(stands[:, 0]), []
    for i in range(stands.shape[1] - 1, -1, -1):
        futures.append(follows)  # F after step i
        follows = gains[i] * chance[:, i] + stands[:, i] * follows
    future = torch.where(sampled, torch.stack(futures[::-1], -1), 0.0)
    others = sampled.sum(0) - 1
    return torch.where(sampled & (others > 0), (future.sum(0) - future) / others.clamp(min=1), 0.0)


def step_mean(values: torch.Tensor, mask: torch.Tensor, step_weight: float) -> torch.Tensor:
    """Mean (W, K) -> () over the windows of each step, steps weighed by step_weight ** i, as in stage 1."""
    weights = step_weight ** torch.arange(mask.shape[-1], device=mask.device)
    steps = torch.where(mask, values, 0.0).sum(0) / mask.sum(0).clamp(min=1)
    return (weights * steps).sum() / weights.sum()


def batch_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over the first dimension; 0, with a gradient of 0, when it is empty."""
    return values.sum(0) / max(1, values.shape[0])


# -- by name -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What stage 2 can optimise.

    Attributes:
        batch: what it learns from, "rollouts" (:class:`Rollouts`) or "text" (:class:`TextWindows`).
        function: (batch, config, rewards) -> loss (), metrics; ``rewards`` (K + 1,) is R(k) for k = 0 .. K.
    """

    batch: Literal["rollouts", "text"]
    function: Callable[[Any, ReinforceConfig, torch.Tensor], tuple[torch.Tensor, dict]]


OBJECTIVES = {
    "ppow rollout": Objective("rollouts", lambda b, c, r: ppow_loss(b, c.kl_coef)),
    "ppow exact": Objective("text", lambda b, c, r: exact_loss(b, r, c.verification, c.kl_coef)),
    "cst": Objective("text", lambda b, c, r: cst_loss(b)),
    "lk": Objective("text", lambda b, c, r: lk_loss(b)),
}


def objective_of(config: ReinforceConfig) -> Objective:
    """What a ReinforceConfig asks for: its ``objective``, for ``ppow`` with its ``estimator``."""
    return OBJECTIVES[f"ppow {config.estimator}" if config.objective == "ppow" else config.objective]
