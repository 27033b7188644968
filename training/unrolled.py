"""Unrolled drafting with gradients: every window of a text continues from one shared prefix.

Training-time test (stage 1) and rollouts (stage 2) are the same computation: a drafter reads the pairs of a text once,
with true taps, and from each start s takes further steps on its own features, with the next tokens given (the text's
own, or drafted ones). A window attends to the pairs 0..s of the text plus its own earlier steps, with one softmax over
both; source: EAGLE-3 (arXiv 2503.01840), section 3.2.
"""

import torch
from torch import nn

from ppow import PPOWDrafter


class PrefixAttention:
    """``attend`` of :meth:`PPOWDrafter.step` for windows that share a prefix.

    The first pass (``starts`` unset) is causal over the text and is remembered. Every later pass is one more step of
    windows: R query rows, row r seeing prefix pairs ``0..starts[:, r]`` and the earlier steps of row r.
    """

    def __init__(self) -> None:
        self.prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.own: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.visible: torch.Tensor | None = None  # (B, 1, 1, R, T) prefix pairs each row may see

    def begin(self, starts: torch.Tensor) -> None:
        """Start windows at pairs ``starts`` (B, R); forgets earlier windows, keeps the prefix."""
        length = self.prefix[0][0].shape[2]
        self.visible = (torch.arange(length, device=starts.device) <= starts[:, :, None])[:, None, None]
        self.own = {layer: [] for layer in self.prefix}

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend in one layer: query (B, A, R, d), key and value (B, K, R, d) of A and K heads -> (B, A, R, d)."""
        if self.visible is None:
            self.prefix[layer] = (key, value)
            gqa = key.shape[1] != query.shape[1]
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
        self.own[layer].append((key, value))
        prefix_key, prefix_value = self.prefix[layer]
        own_key = torch.stack([k for k, _ in self.own[layer]], dim=-2)[:, :, None]  # (B, K, 1, R, J, d)
        own_value = torch.stack([v for _, v in self.own[layer]], dim=-2)[:, :, None]
        kv_heads, dim = key.shape[1], key.shape[-1]
        query = query.unflatten(1, (kv_heads, -1)) * dim**-0.5  # (B, K, A/K, R, d)
        scores = query @ prefix_key[:, :, None].transpose(-1, -2)  # (B, K, A/K, R, T)
        scores = scores.masked_fill_(~self.visible, -torch.inf)  # in place: the largest tensor of a step
        own_scores = (query[..., None, :] * own_key).sum(-1)  # (B, K, A/K, R, J)
        wide = torch.promote_types(query.dtype, torch.float32)
        weights = torch.cat((scores, own_scores), -1).softmax(-1, dtype=wide).to(query.dtype)
        length = scores.shape[-1]
        out = weights[..., :length] @ prefix_value[:, :, None]
        out = out + (weights[..., length:, None] * own_value).sum(-2)
        return out.flatten(1, 2)


class Unrolled:
    """A drafter unrolled over texts x (B, T).

    Args:
        drafter: the drafter; gradients flow when they are enabled.
        embed: module that embeds token ids.
        input_ids: (B, T).
        taps: (B, T, n_taps * Ht) of the target.

    Attributes:
        features: (B, T - 1, H) after pair t = (taps of x_t, x_{t+1}); its logits predict x_{t+2}.
    """

    # the windows that are open: where they start, the steps they have taken, their features and newest tokens
    starts: torch.Tensor
    steps: int
    hidden: torch.Tensor
    previous: torch.Tensor

    def __init__(self, drafter: PPOWDrafter, embed: nn.Module, input_ids: torch.Tensor, taps: torch.Tensor):
        self.drafter, self.embed, self.attention, self.input_ids = drafter, embed, PrefixAttention(), input_ids
        pairs = input_ids.shape[1] - 1
        hidden = drafter.fuse(taps[:, :pairs].to(drafter.dtype))
        positions = torch.arange(pairs, device=input_ids.device).expand(input_ids.shape[0], -1)
        rotary = drafter.rotary(hidden, positions)
        self.features = drafter.step(embed(input_ids[:, 1:]).to(hidden.dtype), hidden, rotary, self.attention)

    def begin(self, starts: torch.Tensor) -> torch.Tensor:
        """Open windows at pairs ``starts`` (B, R): -> features (B, R, H) whose logits give each first drafted token."""
        self.attention.begin(starts)
        self.starts, self.steps, self.previous = starts, 0, self.input_ids.gather(1, starts + 1)
        self.hidden = self.features.gather(1, starts[:, :, None].expand(-1, -1, self.features.shape[-1]))
        return self.hidden

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give each window its next token (B, R): -> features (B, R, H) for the token after it."""
        self.steps, self.previous = self.steps + 1, tokens
        rotary = self.drafter.rotary(self.hidden, self.starts + self.steps)
        embeds = self.embed(tokens).to(self.hidden.dtype)
        self.hidden = self.drafter.step(embeds, self.hidden, rotary, self.attention)
        return self.hidden

    def logits(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Features (.., H) and the tokens (..) before what they predict -> logits (.., D)."""
        return self.drafter.logits(features, self.embed)  # features know that token already
