"""Acceptance rules: which drafted tokens stand, and which token follows them. Pure functions, tensors in and out.

Both rules leave the target's distribution untouched:

* **follow**: the target chooses its own next token at every node (argmax, or one draw from its distribution); the
  window is followed as long as it contains the choice, and the first choice outside it is the next token. Exact for
  any window that was chosen without looking at these draws; at a node with children S it accepts with probability
  p(S), the best that a fixed set of candidates allows.
* **rejection sampling** (arXiv 2211.17192, algorithm 1): for chains whose tokens were drawn from q, accept x with
  probability min(1, p(x) / q(x)), else draw from the normalised positive part of p - q.
"""

import torch

from .drafting_ppow import DraftWindow


def sample(probs: torch.Tensor) -> torch.Tensor:
    """One draw per row from probabilities (.., V) -> ids (..), without a host synchronisation (exponential race)."""
    race = torch.empty_like(probs).exponential_()
    return (probs / race).argmax(-1)


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
    batch, size = window.draft_ids.shape
    draft_probs = window.draft_probs
    p = target_probs[:, :size].gather(2, window.tokens[:, 1:, None])[:, :, 0]
    q = draft_probs.gather(2, window.draft_ids[:, :, None])[:, :, 0]
    stands = torch.rand_like(p) * q < p
    accepted = stands.cumprod(1).sum(1)
    row = torch.arange(batch, device=accepted.device)
    last = target_probs[row, accepted]  # (B, V)
    spread = torch.zeros_like(last)
    spread[:, columns] = draft_probs[row, accepted.clamp(max=size - 1)].to(last.dtype)
    return accepted, window.depth, sample(residual(last, spread, accepted < size))


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
