"""The acceptance rules: which drafted tokens are accepted, and which token follows. Pure functions of tensors.

Decoding's two rules leave the target's distribution untouched:

* :func:`follow`: the target chooses its own next token at every node (argmax, or one draw from its distribution); the
  window is followed as long as it contains the choice, and the first choice outside it is the next token. Exact for
  any window that was chosen without looking at these draws; at a node with children S it accepts with probability
  p(S), the best that a fixed set of candidates allows.
* :func:`reject` (arXiv 2211.17192, algorithm 1): for chains whose tokens were drawn from q, accept x with
  probability min(1, p(x) / q(x)), else draw from the normalised positive part of p - q. :func:`reject_one` is one step
  of it, for logits processors that must see each token before the next.

Rollouts need no next token, only k: :func:`accepted_greedy` is ``follow`` on a chain, :func:`accepted_sampling` is
``reject`` with log-probabilities and given coins.
"""

import torch

from .drafting_ppow import DraftWindow


def sample(probs: torch.Tensor) -> torch.Tensor:
    """One draw per row from probabilities (.., V) -> ids (..), without a host synchronisation (exponential race)."""
    race = torch.empty_like(probs).exponential_()
    return (probs / race).argmax(-1)


def count_accepted(stands: torch.Tensor) -> torch.Tensor:
    """Which drafts of a chain are accepted, (.., K) bool -> k (..) int64: how many before the first that is not."""
    return stands.cumprod(-1).sum(-1)


def follow(window: DraftWindow, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow the target's choices through the window.

    Args:
        window: the drafted window of N nodes.
        choices: (B, N) the token the target chooses after each node.

    Returns:
        accepted (B,): drafted tokens accepted, 0 .. max_depth;
        path (B, max_depth + 1): accepted nodes in order, the root first, 0 beyond ``accepted``;
        next_token (B,): the target's choice after the last accepted node.
    """
    match = window.tokens == choices.gather(1, window.parents)
    match[:, 0] = True
    reached = (match[:, None, :] | ~window.ancestors).all(-1)  # (B, N): all ancestors and itself match
    accepted, leaf = torch.where(reached, window.depth, -1).max(dim=1)
    on_path = window.ancestors.gather(1, leaf[:, None, None].expand(-1, 1, window.tokens.shape[1]))[:, 0]
    node = torch.arange(window.tokens.shape[1], device=leaf.device).expand_as(window.tokens)
    path = torch.zeros(leaf.shape[0], window.max_depth + 1, dtype=torch.long, device=leaf.device)
    # each depth occurs once on a path, so adding equals writing, and nodes off the path add nothing
    path.scatter_add_(1, window.depth, node * on_path)
    return accepted, path, choices.gather(1, leaf[:, None])[:, 0]


def reject(
    window: DraftWindow, target_probs: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rejection sampling of a chain of K drafted tokens.

    Args:
        window: a sampled chain (with ``draft_ids`` and ``draft_probs``).
        target_probs: (B, K + 1, V) the target's distributions after the root and after each drafted token.
        columns: (D,) target ids of the draft vocabulary.

    Returns:
        accepted (B,) in 0 .. K, path (B, K + 1) of all nodes (a chain keeps its first ones), and next_token (B,).
    """
    draft_ids, draft_probs = window.draft_ids, window.draft_probs
    assert draft_ids is not None and draft_probs is not None
    batch, size = draft_ids.shape
    p = target_probs[:, :size].gather(2, window.tokens[:, 1:, None])[:, :, 0]
    q = draft_probs.gather(2, draft_ids[:, :, None])[:, :, 0]
    accepted = count_accepted(torch.rand_like(p) * q < p)
    row = torch.arange(batch, device=accepted.device)
    last = target_probs[row, accepted]  # (B, V)
    spread = torch.zeros_like(last)
    spread[:, columns] = draft_probs[row, accepted.clamp(max=size - 1)].to(last.dtype)
    return accepted, window.depth, sample(residual(last, spread, accepted < size))


def reject_one(window: DraftWindow, target_probs: torch.Tensor, columns: torch.Tensor, row: int, node: int) -> int:
    """The step of :func:`reject` after one node, on the host: the drafted token, or one from what is left of p - q.

    What is left gives the drafted token weight 0 when it was rejected, so the two cases cannot be confused.

    Args:
        window: a sampled chain.
        target_probs: (V,) the target's distribution after ``node`` of ``row``.
        columns: (D,) target ids of the draft vocabulary.
        row: of the batch.
        node: 0 .. K; after the last nothing was drafted, and the token is the target's own.
    """
    draft_ids, draft_probs = window.draft_ids, window.draft_probs
    assert draft_ids is not None and draft_probs is not None
    if node == draft_ids.shape[1]:
        return int(sample(target_probs))
    token, q = int(window.tokens[row, node + 1]), draft_probs[row, node]
    if float(torch.rand(())) * float(q[draft_ids[row, node]]) < float(target_probs[token]):
        return token
    spread = torch.zeros_like(target_probs)
    spread[columns] = q.to(target_probs.dtype)
    rejected = torch.ones(1, dtype=torch.bool, device=target_probs.device)
    return int(sample(residual(target_probs[None], spread[None], rejected)))


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """What to draw from after a rejection: the positive part of p - q (unnormalised); p itself where none was rejected.

    Args:
        target_probs: (B, V) p.
        draft_probs: (B, V) q.
        rejected: (B,) bool.

    Returns:
        (B, V) weights. Where rounding leaves nothing of p - q (then p = q, and a rejection has probability 0), p.
    """
    rest = (target_probs - draft_probs).clamp_(min=0)
    use = rejected & (rest.sum(-1) > 0)
    return torch.where(use[:, None], rest, target_probs)


def accepted_greedy(draft_tokens: torch.Tensor, target_argmax: torch.Tensor) -> torch.Tensor:
    """k under greedy verification: leading drafts that equal the target's argmax after the drafts before them.

    For drafts sampled from Q, E[k] = sum_j prod_{i<=j} Q(argmax P_i) along the target's own greedy text.

    Args:
        draft_tokens: (.., K) token ids, in one vocabulary with
        target_argmax: (.., K).

    Returns:
        (..) int64 in 0 .. K; the bonus token is not counted.

    Raises:
        ValueError: for differing shapes.
    """
    check_same_shape(draft_tokens=draft_tokens, target_argmax=target_argmax)
    return count_accepted(draft_tokens == target_argmax)


def accepted_sampling(draft_logprobs: torch.Tensor, target_logprobs: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """k under rejection sampling (arXiv 2211.17192): draft x is accepted when its coin u < p(x) / q(x).

    For drafts sampled from Q each is accepted with probability sum_v min(p, q). :func:`reject` asks u q < p of
    probabilities; rollouts keep logarithms, whose difference stays exact where p and q are small.

    Args:
        draft_logprobs: (.., K) log q of the drafted tokens; q must be the distribution they were drawn from.
        target_logprobs: (.., K) log p of them.
        coins: (.., K) uniform on [0, 1).

    Returns:
        (..) int64 in 0 .. K; the bonus token is not counted.

    Raises:
        ValueError: for differing shapes.
    """
    check_same_shape(draft_logprobs=draft_logprobs, target_logprobs=target_logprobs, coins=coins)
    return count_accepted(coins < (target_logprobs - draft_logprobs).exp())


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Raise a ValueError unless all ``tensors`` are of one shape (.., K)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise ValueError(f"Expected tensors of one shape (.., K), got {shapes}.")
