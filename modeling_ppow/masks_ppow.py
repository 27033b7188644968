"""Attention masks of windows, trees and forests: who sees whom when drafted continuations share one forward.

On a GPU's fast path the same masks travel as bits (``attention_ppow.pack_window``).
"""

import torch


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean "may attend" -> additive mask of ``dtype``: 0, or its most negative number (finite, so no NaN rows)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def ancestors_of(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Which nodes lie on each node's way to the root, itself included.

    Args:
        parents: (B, N) parent of each node; a root is its own parent.
        max_depth: edges of the longest way.

    Returns:
        (B, N, N) bool, entry [b, i, j]: j is an ancestor of i or i itself.
    """
    batch, count = parents.shape
    above = torch.eye(count, dtype=torch.bool, device=parents.device).expand(batch, -1, -1).clone()
    node = parents
    for _ in range(max_depth):
        above.scatter_(2, node[:, :, None], True)
        node = parents.gather(1, node)
    return above


def window_allowed(
    prefix: torch.Tensor,
    ancestors: torch.Tensor,
    depth: torch.Tensor | None,
    slots: torch.Tensor,
    view: int,
    valid: torch.Tensor | None = None,
    sliding_window: int | None = None,
    slot_depth: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which cache slots each node of a window may attend to: its prefix, its ancestors and itself.

    One description serves decoding (every node has the row's whole text as prefix) and the forest of stage 2 (every
    rollout has the text up to its own start).

    Args:
        prefix: (B, N) committed slots each node may see: slots ``0 .. prefix - 1``.
        ancestors: (B, N, W) bool, which of the W nodes in ``slots`` each node sees, as of :func:`ancestors_of`.
        depth: (B, N) distance of each node from the end of its prefix; a node stands at position prefix + depth. Only
            a sliding window needs it.
        slots: (B, W) slot each node is written to; beyond every node's prefix.
        view: slots that attention reads.
        valid: (B, S <= view) bool, False for padding among the first S slots.
        sliding_window: keys further back than this many positions are invisible, counted in slots as transformers does.
        slot_depth: (B, W) ``depth`` of the nodes in ``slots``; None where they are the N nodes themselves.

    Returns:
        (B, 1, N, view) bool.
    """
    index = torch.arange(view, device=prefix.device)
    allowed = index < prefix[:, :, None]  # (B, N, view)
    if sliding_window is not None:
        assert depth is not None
        allowed &= (prefix + depth)[:, :, None] - index < sliding_window
        slot_depth = depth if slot_depth is None else slot_depth
        ancestors = ancestors & (depth[:, :, None] - slot_depth[:, None, :] < sliding_window)
    if valid is not None:
        allowed[:, :, : valid.shape[1]] &= valid[:, None, :]
    allowed.scatter_(2, slots[:, None, :].expand_as(ancestors), ancestors)
    return allowed[:, None]
